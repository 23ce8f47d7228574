# SPDX-License-Identifier: Apache-2.0
"""What the domain knows as keys and values of the programs' maps, and back. Pure.

How a struct lies in memory is `mesh._abi`'s. Here is what goes beyond one struct: which words are stored at once, which
numbers the maps hold as they are, and how frontends, networks and flows become keys.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mesh import _abi, netaddr
from mesh.model import Frontend, Network, Protocol

WORD: Final = 8  # bytes that are stored at once
ALL_BITS: Final = (1 << 64) - 1  # of mesh_backend.networks
REVNAT_CLOSED: Final = _abi.REVNAT_FIN_IN | _abi.REVNAT_FIN_OUT  # of mesh_revnat.flags: both ends have closed


def pack_u32(value: int) -> bytes:
    """A key or value that is a plain __u32."""
    return value.to_bytes(4, sys.byteorder)


def unpack_u32(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def unpack_u32s(data: bytes) -> list[int]:
    """An array of __u32."""
    return memoryview(data).cast("I").tolist()


def unpack_u64s(data: bytes) -> list[int]:
    """An array of __u64."""
    return memoryview(data).cast("Q").tolist()


def word_at(data: bytes, offset: int) -> int:
    """The word of a struct's bytes that is stored at once."""
    return int.from_bytes(data[offset : offset + WORD], sys.byteorder)


def track(slots: bytes) -> bytes:
    """A mesh_slot array with SLOT_TRACKED in every slot."""
    mark = _abi.SLOT.pack(_abi.Slot(previous=_abi.SLOT_TRACKED)) * (len(slots) // _abi.SLOT.size)
    both = int.from_bytes(slots, "little") | int.from_bytes(mark, "little")
    return both.to_bytes(len(slots), "little")


def port_index(port: int, protocol: Protocol) -> int:
    """Index of a port in mesh_ports."""
    return port + (_abi.PORT_UDP if protocol is Protocol.UDP else _abi.PORT_TCP)


@dataclass(frozen=True, slots=True)
class Table:
    """mesh_table: where a frontend's slots are. Size 0: not served."""

    arena: int
    offset: int
    size: int


def frontend_words(table: Table, flags: int, acl: int) -> tuple[int, int]:
    """A mesh_frontend as the two words that are stored: where its table is, and its options."""
    first = table.arena << _abi.ARENA_BITS | table.offset
    row = _abi.Frontend(table=_abi.Table(first=first, size=table.size), flags=flags, acl=acl)
    data = _abi.FRONTEND.pack(row)
    return word_at(data, _abi.FRONTEND_TABLE_WORD), word_at(data, _abi.FRONTEND_OPTIONS_WORD)


def unpack_frontend(data: bytes) -> tuple[Table, int, int]:
    """(table, flags, acl) of a mesh_frontend."""
    row = _abi.FRONTEND.unpack(data)
    first = row.table.first
    return Table(first >> _abi.ARENA_BITS, first & (_abi.ARENA_SLOTS - 1), row.table.size), row.flags, row.acl


def pack_frontend_key(frontend: Frontend) -> bytes:
    key = _abi.FrontendKey(address=frontend.address, port=frontend.port, protocol=frontend.protocol)
    return _abi.FRONTEND_KEY.pack(key)


def unpack_frontend_key(data: bytes) -> Frontend:
    key = _abi.FRONTEND_KEY.unpack(data)
    return Frontend(key.address, key.port, Protocol(key.protocol))


def pack_acl_key(acl: int, network: Network) -> bytes:
    bits = _abi.ACL_KEY_RULE_BITS + netaddr.prefix_length(network)
    return _abi.ACL_KEY.pack(_abi.AclKey(bits=bits, acl=acl, source=network.network_address))


def unpack_acl_key(data: bytes) -> tuple[int, Network]:
    key = _abi.ACL_KEY.unpack(data)
    return key.acl, netaddr.network_of(key.source, key.bits - _abi.ACL_KEY_RULE_BITS)


def pack_network_key(owner: int, network: Network) -> bytes:
    """The key of one of a backend's own networks in mesh_networks."""
    bits = _abi.ACL_KEY_RULE_BITS + netaddr.prefix_length(network)
    return _abi.NETWORK_KEY.pack(_abi.NetworkKey(bits=bits, owner=owner, client=network.network_address))


def unpack_network_key(data: bytes) -> tuple[int, Network]:
    key = _abi.NETWORK_KEY.unpack(data)
    return key.owner, netaddr.network_of(key.client, key.bits - _abi.ACL_KEY_RULE_BITS)


def network_bits(networks: Iterable[Network]) -> int:
    """mesh_backend.networks: a bit for each pair of first bytes that addresses in these networks may have."""
    found = 0
    for network in networks:
        first = int.from_bytes(network.network_address.packed[:2], "big")
        for pair in range(first, first + (1 << max(0, 16 - network.prefixlen))):
            found |= 1 << ((pair >> 8 ^ pair) & 63)
            if found == ALL_BITS:
                return found
    return found


def pack_id(seed: bytes, port: int, protocol: int) -> bytes:
    """A mesh_id: a backend as all nodes call it. `seed`: its first bytes are taken."""
    key = _abi.Id(seed=seed[: len(_abi.Id().seed)], port=port, protocol=protocol)
    return _abi.ID.pack(key)
