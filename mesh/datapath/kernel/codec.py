# SPDX-License-Identifier: Apache-2.0
"""The only byte order code: addresses and the structs of bpf/include/mesh/abi.h as bytes, and back. Pure.

Ports and addresses are network order in the kernel, everything else host order. Every `pack_*` gives just the bytes of
the struct; every `unpack_*` takes them.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from dataclasses import dataclass
from typing import Final

from mesh.model import Address, Flow, Frontend, Network, Protocol

MAPPED: Final = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2

TABLE: Final = struct.Struct("=II")
FRONTEND: Final = struct.Struct("=IIII")
FRONTEND_KEY: Final = struct.Struct("=16sHB5x")
BACKEND: Final = struct.Struct("=16sHBBIII6sBx8s16x")
ID: Final = struct.Struct("=8sHBx")
NODE: Final = struct.Struct("=16sIII12x")
ACL_KEY: Final = struct.Struct("=II16s")
FLOW: Final = struct.Struct("=16s16sHHB3x")
NOTE: Final = struct.Struct("=IIII")
REPLY: Final = struct.Struct("=16s16sHHIIIII")
COUNTS: Final = struct.Struct("=6Q")
CONFIG: Final = struct.Struct("=Q16s16sIHH")
ADDRESS_SIZE: Final = 16


class NETWORK:
    """Headers on the wire (RFC 791, 8200, 9293, 768), without options."""

    ipv4: Final = struct.Struct(">BBHHHBBH4s4s")
    ipv6: Final = struct.Struct(">IHBB16s16s")
    tcp: Final = struct.Struct(">HHIIBBHHH")
    udp: Final = struct.Struct(">HHHH")


ARENA_BITS: Final = 20
ARENA_SLOTS: Final = 1 << ARENA_BITS
SLOT_SIZE: Final = 8
MAX_ARENAS: Final = 256
MAX_BACKENDS: Final = 65536
MAX_FRONTENDS: Final = 16384
MAX_NODES: Final = 4096

PORT_EXACT: Final = 0x80000000
PORT_TUNNEL: Final = 0x40000000
PORT_FRONTEND: Final = 0x3FFFFFFF
PORT_UDP: Final = 65536

ADDRESS_OWN: Final = 1
ADDRESS_FLOATING: Final = 2

FRONTEND_CLIENT: Final = 0x1
FRONTEND_DENY: Final = 0x2
FRONTEND_PASS_IF_NONE: Final = 0x4
FRONTEND_HOLD: Final = 0x8
NOTE_ASKED: Final = 0x80000000

BACKEND_FREE: Final = 0
BACKEND_ACTIVE: Final = 1
BACKEND_DRAINING: Final = 2
BACKEND_STATE_OFFSET: Final = 16  # of the word with port, protocol and state

LOOPBACK: Final = 1  # as `bridge` of a backend: its address is the node's own

SETTING_DIRECT: Final = 0x1

ACL_ALLOW: Final = 1
ACL_DENY: Final = 2


STAMP_SHIFT: Final = 30  # stamps are CLOCK_MONOTONIC nanoseconds >> STAMP_SHIFT


def be16(value: int) -> int:
    """A 16-bit number as the host-order integer whose bytes are in network order; its own inverse."""
    return int.from_bytes(value.to_bytes(2, "big"), sys.byteorder)


def pack_address(address: Address) -> bytes:
    """16 bytes, IPv4 as IPv4-mapped."""
    return MAPPED + address.packed if address.version == 4 else address.packed


def unpack_address(data: bytes) -> Address:
    """The address of 16 bytes; an IPv4-mapped one is IPv4.

    Raises:
        ValueError: not 16 bytes.
    """
    if len(data) != ADDRESS_SIZE:
        raise ValueError(f"an address is {ADDRESS_SIZE} bytes, not {len(data)}")
    return ipaddress.IPv4Address(data[12:]) if data.startswith(MAPPED) else ipaddress.IPv6Address(data)


def pack_u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def unpack_u32(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def unpack_u64(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def port_index(port: int, protocol: Protocol) -> int:
    """Index of a port in mesh_ports."""
    return port + (PORT_UDP if protocol is Protocol.UDP else 0)


@dataclass(frozen=True, slots=True)
class Table:
    """mesh_table: where a frontend's slots are. Size 0: not served."""

    arena: int
    offset: int
    size: int


def table_word(table: Table) -> int:
    """A mesh_table as the one 64-bit word that is stored."""
    return int.from_bytes(TABLE.pack(table.arena << ARENA_BITS | table.offset, table.size), sys.byteorder)


def table_of(word: int) -> Table:
    first, size = TABLE.unpack(word.to_bytes(8, sys.byteorder))
    return Table(first >> ARENA_BITS, first & (ARENA_SLOTS - 1), size)


def options_word(flags: int, acl: int) -> int:
    """The second word of a mesh_frontend."""
    return int.from_bytes(TABLE.pack(flags, acl), sys.byteorder)


def options_of(word: int) -> tuple[int, int]:
    """(flags, acl) of the second word of a mesh_frontend."""
    flags, acl = TABLE.unpack(word.to_bytes(8, sys.byteorder))
    return flags, acl


def pack_frontend_key(frontend: Frontend) -> bytes:
    return FRONTEND_KEY.pack(pack_address(frontend.address), be16(frontend.port), int(frontend.protocol))


def unpack_frontend_key(data: bytes) -> Frontend:
    address, port, protocol = FRONTEND_KEY.unpack(data)
    return Frontend(unpack_address(address), be16(port), Protocol(protocol))


@dataclass(frozen=True, slots=True)
class BackendSlot:
    """mesh_backend. `mac` 6 bytes, zeros: unknown; interfaces by index, 0: unknown. `seed` 8 bytes, not zeros: it runs
    on the node that has the address, and serves IP `version`."""

    address: Address
    port: int
    protocol: int
    state: int
    epoch: int
    ifindex: int = 0
    bridge: int = 0
    mac: bytes = bytes(6)
    version: int = 0
    seed: bytes = bytes(8)


def pack_backend(backend: BackendSlot) -> bytes:
    return BACKEND.pack(
        pack_address(backend.address),
        be16(backend.port),
        backend.protocol,
        backend.state,
        backend.epoch,
        backend.ifindex,
        backend.bridge,
        backend.mac,
        backend.version,
        backend.seed,
    )


def unpack_backend(data: bytes) -> BackendSlot:
    address, port, *rest = BACKEND.unpack(data)
    return BackendSlot(unpack_address(address), be16(port), *rest)


def pack_id(seed: bytes, port: int, protocol: int) -> bytes:
    """A mesh_id: a backend as all nodes call it. `seed`: its first 8 bytes are taken."""
    return ID.pack(seed[:8], be16(port), protocol)


@dataclass(frozen=True, slots=True)
class NodeSlot:
    """mesh_node. `source`: the address from which this node's packets to it come; `mtu` 0: it takes no tunnel."""

    source: Address
    ifindex: int
    mtu: int
    id: int


def pack_node(node: NodeSlot) -> bytes:
    return NODE.pack(pack_address(node.source), node.ifindex, node.mtu, node.id)


def unpack_node(data: bytes) -> NodeSlot:
    source, ifindex, mtu, number = NODE.unpack(data)
    return NodeSlot(unpack_address(source), ifindex, mtu, number)


def pack_acl_key(acl: int, network: Network) -> bytes:
    length = network.prefixlen + (96 if network.version == 4 else 0)
    return ACL_KEY.pack(32 + length, acl, pack_address(network.network_address))


def unpack_acl_key(data: bytes) -> tuple[int, Network]:
    bits, acl, source = ACL_KEY.unpack(data)
    address, length = unpack_address(source), bits - 32
    if address.version == 4 and length >= 96:
        return acl, ipaddress.IPv4Network((address, length - 96))
    return acl, ipaddress.IPv6Network((source, length))


def pack_flow(flow: Flow) -> bytes:
    return FLOW.pack(
        pack_address(flow.source),
        pack_address(flow.destination),
        be16(flow.source_port),
        be16(flow.destination_port),
        int(flow.protocol),
    )


def unpack_flow(data: bytes) -> Flow:
    source, destination, source_port, destination_port, protocol = FLOW.unpack(data)
    return Flow(
        unpack_address(source),
        be16(source_port),
        unpack_address(destination),
        be16(destination_port),
        Protocol(protocol),
    )


@dataclass(frozen=True, slots=True)
class Note:
    """mesh_note: the owner of a flow whose slot is in transition. `stamp`: when it was last seen."""

    owner: int
    epoch: int
    stamp: int
    frontend: int
    asked: bool = False


def unpack_note(data: bytes) -> Note:
    owner, epoch, stamp, frontend = NOTE.unpack(data)
    return Note(owner, epoch, stamp, frontend & ~NOTE_ASKED, frontend >= NOTE_ASKED)


def pack_note(note: Note) -> bytes:
    return NOTE.pack(note.owner, note.epoch, note.stamp, note.frontend | (NOTE_ASKED if note.asked else 0))


@dataclass(frozen=True, slots=True)
class ConfigSlot:
    """mesh_config: what holds for the whole node."""

    netns_cookie: int
    hairpin: Address
    hairpin6: Address
    settings: int
    tunnel_port: int
    error_rate: int


def pack_config(config: ConfigSlot) -> bytes:
    hairpin, hairpin6, port = pack_address(config.hairpin), pack_address(config.hairpin6), be16(config.tunnel_port)
    return CONFIG.pack(config.netns_cookie, hairpin, hairpin6, config.settings, port, config.error_rate)


def unpack_config(data: bytes) -> ConfigSlot:
    cookie, hairpin, hairpin6, settings, port, rate = CONFIG.unpack(data)
    return ConfigSlot(cookie, unpack_address(hairpin), unpack_address(hairpin6), settings, be16(port), rate)
