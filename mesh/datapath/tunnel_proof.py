# SPDX-License-Identifier: Apache-2.0
"""Proofs in the tunnel: what the programs and the tunnel's trials prove by. bpf/include/mesh/geneve.h has the format.

Every pair of nodes has keys of its own, one for each direction, that both derive from the swarm's: what a node has sent
to another one is worth nothing elsewhere, and cannot be sent back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mesh import _abi, netaddr
from mesh._siphash import siphash
from mesh.model import Address

KIND: Final = 4  # the first byte of what a key is derived from; proofs at the peer port begin with 1, 2 or 3
NAMES: Final = 0x10000  # how many keys the wire tells apart


def key_between(secret: bytes, sender: Address, receiver: Address) -> bytes:
    """The key of one direction between two nodes, 16 bytes. Pure."""
    ends = netaddr.pack(sender) + netaddr.pack(receiver)
    return b"".join(siphash(secret, bytes([KIND, half]) + ends).to_bytes(8, "little") for half in (0, 1))


def pack_keys(keys: Iterable[tuple[int, bytes]], own: Address, other: Address) -> bytes:
    """mesh_node.keys of another node, first the one to prove by. Pure.

    Args:
        keys: (number, secret) of the swarm's.
        own: this node's address, as the other one knows it.
    """
    rows = [
        _abi.NodeKey(
            name=number % NAMES,
            valid=1,
            sent=_numbers(key_between(secret, own, other)),
            taken=_numbers(key_between(secret, other, own)),
        )
        for number, secret in keys
    ][: _abi.NODE_KEYS]
    return _abi.NODE_KEY.pack_rows(rows).ljust(_abi.NODE_KEYS * _abi.NODE_KEY.size, b"\0")


def _numbers(key: bytes) -> _abi.SipKey:
    """A key as the programs read it."""
    return _abi.SipKey(first=int.from_bytes(key[:8], "little"), second=int.from_bytes(key[8:], "little"))


def write(key: tuple[int, bytes], sender: Address, receiver: Address, flow: _abi.Flow, ident: bytes, now: int) -> bytes:
    """A struct mesh_proof of a packet that is no fragment and no ICMP error. Pure.

    Args:
        key: number and secret of the swarm's.
        flow: of the inner packet.
        ident: the option, a struct mesh_id.
        now: Unix nanoseconds.
    """
    number, secret = key
    epoch = (now >> _abi.EPOCH_SHIFT) & 0xFFFFFFFF
    ports = flow.source_port.to_bytes(2, "big") + flow.destination_port.to_bytes(2, "big")
    what = ports + bytes([flow.protocol, 0, flow.source.version, 0]) + ident + epoch.to_bytes(4, "big")
    mac = siphash(key_between(secret, sender, receiver), flow.source.packed + flow.destination.packed + what)
    return _abi.PROOF.pack(
        _abi.Proof(key=number % NAMES, epoch=epoch & 0xFFFF, mac=mac.to_bytes(8, "little")),
    )
