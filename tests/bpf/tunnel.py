# SPDX-License-Identifier: Apache-2.0
"""The tunnel between nodes: its packets, and both of its ends."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tests.bpf.plane import Plane, u32
from tests.oracle import tunnel_proof as oracle
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    ETHER,
    IP,
    NODE4,
    NODE6,
    TASK4,
    TASK6,
    UDP,
    Ether,
    IPv6,
)

PEER4 = "192.0.2.2"
PORT = 6084
SEED = bytes(range(1, 9))
KEY = (0xC0FFEE42, bytes(range(16)))  # of the swarm


def identity(port: int = 8080, protocol: int = 6, seed: bytes = SEED, flags: int = 0) -> bytes:
    return seed + struct.pack("!HBB", port, protocol, flags)


PEER6 = "2001:db8::2"
HERE = {4: NODE4, 6: NODE6}
THERE = {4: PEER4, 6: PEER6}
CLIENT = {4: CLIENT4, 6: CLIENT6}
TASK = {4: TASK4, 6: TASK6}
REPLY = identity(0, 0, bytes(8), 1)
VERSIONS = pytest.mark.parametrize(("inner", "outer"), [(4, 4), (6, 4), (4, 6), (6, 6)])


def wrapped(inner: bytes, source: str, destination: str, ident: bytes, proof: bytes = b"", **changes: Any) -> bytes:
    """An inner frame's IP packet in the tunnel, as it arrives, with a proof where nodes give one (Plane.proofs).

    `changes`: of the Geneve header's fields.
    """
    if Plane.proofs[0] and not proof:
        proof = oracle.proof(KEY, source, destination, inner[14:], ident, oracle.now())
    more = len(proof) // 4
    fields = {"words": 4 + more, "flags": 0x40, "type": struct.unpack("!H", inner[12:14])[0], "vni": 0}
    fields |= {"class": 0xFF6D, "option": 0x81, "length": 3 + more, "sport": 50000, "dport": PORT} | changes
    geneve = struct.pack("!BBHIHBB", *list(fields.values())[:7]) + ident + proof
    ip = IPv6(src=source, dst=destination) if ":" in source else IP(src=source, dst=destination, flags="DF")
    udp = UDP(sport=fields["sport"], dport=fields["dport"], chksum=0)
    return bytes(ETHER / ip / udp / (geneve + inner[14:]))


def unwrapped(frame: bytes, outer: int) -> tuple[bytes, bytes]:
    """(the option's value, the inner packet) of a frame that left; a proof must be right, and there if nodes give one
    (Plane.proofs)."""
    parsed = Ether(frame)
    network = parsed[IP] if outer == 4 else parsed[IPv6]
    assert parsed.type == (0x0800 if outer == 4 else 0x86DD)
    at = 14 + (20 if outer == 4 else 40)
    assert (parsed[UDP].dport, parsed[UDP].chksum, parsed[UDP].len) == (PORT, 0, len(frame) - at)
    assert (network.ttl if outer == 4 else network.hlim) == 64
    more = 3 if Plane.proofs[0] & 1 else 0
    head = bytes([4 + more, 0x40]) + frame[at + 10 : at + 12] + bytes(4) + b"\xff\x6d\x81" + bytes([3 + more])
    assert frame[at + 8 : at + 20] == head
    inner, ident = frame[at + 32 + 4 * more :], frame[at + 20 : at + 32]
    if more:
        epoch = oracle.now()
        epoch -= (epoch - int.from_bytes(frame[at + 34 : at + 36], "big")) % 65536
        assert oracle.now() - epoch <= 1
        assert frame[at + 32 : at + 44] == oracle.proof(KEY, network.src, network.dst, inner, ident, epoch)
    assert frame[at + 10 : at + 12] == (b"\x08\0" if inner[0] >> 4 == 4 else b"\x86\xdd")
    return ident, inner


def near(inner: int = 4, outer: int = 4, protocol: int = 6, *, mtu: int = 1500) -> Plane:
    """The node that is called; the task is on the other."""
    plane = Plane.fresh()
    plane.local(HERE[inner], HERE[outer])
    plane.tunnel(7, THERE[outer], HERE[outer], mtu=mtu)
    plane.away(2, THERE[outer], 8080, SEED, protocol=protocol, version=inner)
    plane.frontend(1, 80, [(2, 2)], protocol=protocol)
    return plane


def far(inner: int = 4, outer: int = 4, protocol: int = 6, *, mtu: int = 1500) -> Plane:
    """The node where the task is; the other one was called."""
    plane = Plane.fresh()
    plane.local(THERE[outer])
    plane.tunnel(7, HERE[outer], THERE[outer], mtu=mtu)
    plane.backend(3, TASK[inner], 8080, protocol=protocol)
    plane.maps["mesh_ids"].update(identity(8080, protocol), u32(3))
    return plane


def prepared(*, settings: int = 0, mtu: int = 1500, own: str = NODE4, peer: str = PEER4) -> Plane:
    plane = Plane.fresh()
    plane.local(own)
    plane.configure(settings=settings)
    plane.tunnel(7, peer, own, mtu=mtu)
    return plane


def caller(**options: int) -> Plane:
    """The node that is called: the backend is on PEER4."""
    plane = prepared(**options)  # type: ignore[arg-type]
    plane.away(2, PEER4, 8080, SEED)
    plane.frontend(1, 80, [(2, 2)])
    return plane


def owner(**options: int) -> Plane:
    """The node where the backend is; NODE4 is the one that was called."""
    plane = prepared(own=PEER4, peer=NODE4, **options)
    plane.backend(3, TASK4, 8080)
    plane.frontend(1, 80, [(3, 3)])
    plane.maps["mesh_ids"].update(identity(), u32(3))
    return plane
