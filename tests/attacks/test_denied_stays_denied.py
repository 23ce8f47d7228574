# SPDX-License-Identifier: Apache-2.0
"""A denied client cuts its packets so that source rules cannot read the ports, and reaches Docker's mesh (item 4).

Tiny fragments and headers split over fragments (RFC 1858, RFC 3128), IPv6 extension headers, and fragments that come
before their first one. Every program that filters meets every row, from a denied source and from an admitted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from scapy.layers.inet import IPOption_Router_Alert
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN

from mesh._abi import SETTING_GUARD
from tests.bpf.plane import DENY_RULE, OK, SHOT, UDP, Plane
from tests.bpf.wires import apart
from tests.support.frames import ETHER, IP, NODE4, NODE6, IPv6, Raw, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere")]

FLOATING4, FLOATING6 = "203.0.113.80", "2001:db8::80"
DENIED = {4: "198.51.100.66", 6: "2001:db8:9::66"}
ADMITTED = {4: "198.51.100.9", 6: "2001:db8:9::9"}
FILTERS = ("mesh_ingress", "mesh_bridge", "mesh_guard", "mesh_bridge_guard", "mesh_task")


@dataclass(frozen=True)
class Row:
    """Frames as a client sends them, one after the other; `judged`: which of them the source rules judge."""

    name: str
    frames: tuple[bytes, ...]
    judged: int = 0
    blind: bool = False  # no ports to be judged by: dropped whoever sends it


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[None]:
    """A network namespace of its own: fragments that were kept come in again."""
    with apart("denied"):
        yield


def payload(source: str, target: str, protocol: int) -> bytes:
    whole = (datagram if protocol == UDP else segment)(source, 40000, target, 53 if protocol == UDP else 80)
    return bytes(whole.payload.payload)


def fragment(source: str, target: str, protocol: int, data: bytes, at: int, more: bool) -> bytes:
    ip = IP(src=source, dst=target, proto=protocol, id=77, flags="MF" if more else 0, frag=at // 8)
    return bytes(ETHER / ip / Raw(data))


def cut(source: str, target: str, protocol: int, *sizes: int) -> tuple[bytes, ...]:
    """A packet in fragments of these sizes, and the rest."""
    data, at, out = payload(source, target, protocol), 0, []
    for size in (*sizes, len(data)):
        piece, more = data[at : at + size], at + size < len(data)
        out.append(fragment(source, target, protocol, piece, at, more))
        at += size
        if not more:
            break
    return tuple(out)


def rows4(source: str, target: str, protocol: int) -> Iterator[Row]:
    make = datagram if protocol == UDP else segment
    port = 53 if protocol == UDP else 80
    yield Row("whole", (bytes(make(source, 40000, target, port)),))
    yield Row("fragments of 8", cut(source, target, protocol, 8, 8))
    if protocol != UDP:
        yield Row("first of 16", cut(source, target, protocol, 16))
        yield Row("first of 24, options behind", cut(source, target, protocol, 24))
    yield Row(
        "overlapping at 8",
        (*cut(source, target, protocol, 8)[:1], fragment(source, target, protocol, b"x" * 16, 8, False)),
    )
    yield Row("later one first", cut(source, target, protocol, 24)[::-1], judged=1)
    odd = IP(src=source, dst=target, proto=protocol, options=[IPOption_Router_Alert()])
    yield Row("IP options", (bytes(ETHER / odd / Raw(payload(source, target, protocol))),))


def rows6(source: str, target: str, protocol: int) -> Iterator[Row]:
    make = datagram if protocol == UDP else segment
    yield Row("whole", (bytes(make(source, 40000, target, 53 if protocol == UDP else 80)),))
    data = payload(source, target, protocol)

    def behind(*headers: Any, data: bytes = data) -> bytes:
        frame: Any = ETHER / IPv6(src=source, dst=target)
        for header in headers:
            frame = frame / header
        frame.lastlayer().nh = protocol
        return bytes(frame / Raw(data))

    yield Row("destination options", (behind(IPv6ExtHdrDestOpt()),))
    yield Row("hop by hop and options", (behind(IPv6ExtHdrHopByHop(options=PadN(optdata=b"12")), IPv6ExtHdrDestOpt()),))
    yield Row("atomic fragment", (behind(IPv6ExtHdrFragment(id=7)),))
    yield Row("first fragment of 8", (behind(IPv6ExtHdrFragment(id=7, m=1), data=data[:8]),))
    first, later = (
        behind(IPv6ExtHdrFragment(id=7, m=more, offset=3 - 3 * more), data=data[24:] if not more else data[:24])
        for more in (1, 0)
    )
    yield Row("fragments", (first, later))
    yield Row("later fragment", (first, later), judged=1)
    yield Row("later one first", (later, first), judged=1)
    yield Row("too many headers", (behind(*(IPv6ExtHdrDestOpt() for _ in range(9))),), blind=True)
    yield Row("header cut off", (behind(IPv6ExtHdrFragment(id=7, m=1), data=b""),), blind=True)


def rows(version: int, source: str, target: str, protocol: int) -> list[Row]:
    return list((rows4 if version == 4 else rows6)(source, target, protocol))


def plane() -> Plane:
    """Port 80/tcp and 53/udp of any address, with the rule; tasks are of no consequence."""
    p = Plane.fresh()
    p.configure(settings=SETTING_GUARD)
    p.local(NODE4, NODE6, FLOATING4, FLOATING6)
    p.backend(2, "172.18.0.3", 8080)
    p.backend(4, "172.18.0.3", 5353, protocol=UDP)
    p.frontend(1, 80, [(2, 2)], acl=7)
    p.frontend(3, 53, [(4, 4)], protocol=UDP, acl=7)
    for address in DENIED.values():
        p.rule(7, f"{address}/{128 if ':' in address else 32}", DENY_RULE)
    return p


def fate(p: Plane, program: str, row: Row) -> list[int]:
    return [p.run(program, frame.ljust(60, b"\0")).retval for frame in row.frames]


@pytest.mark.parametrize("program", FILTERS)
@pytest.mark.parametrize("protocol", [6, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_what_is_denied_stays_denied(program: str, protocol: int, version: int) -> None:
    for target in (NODE4, FLOATING4) if version == 4 else (NODE6, FLOATING6):
        for row in rows(version, DENIED[version], target, protocol):
            assert (row.name, fate(plane(), program, row)[row.judged]) == (row.name, SHOT)
        for row in rows(version, ADMITTED[version], target, protocol):
            assert (row.name, fate(plane(), program, row)[row.judged] == SHOT) == (row.name, row.blind)


@pytest.mark.parametrize("program", FILTERS)
def test_other_ports_and_other_hosts_are_nobodys_business(program: str) -> None:
    p = plane()
    for target, protocol in (("192.0.2.99", 6), ("192.0.2.99", UDP)):
        for row in rows(4, DENIED[4], target, protocol):
            assert (row.name, fate(p, program, row)) == (row.name, [OK] * len(row.frames))
    data = bytes(datagram(DENIED[4], 40000, NODE4, 5000, b"x" * 64).payload.payload)
    pieces = [fragment(DENIED[4], NODE4, UDP, data[at : at + 24], at, at + 24 < len(data)) for at in range(0, 72, 24)]
    assert [p.run(program, frame.ljust(60, b"\0")).retval for frame in pieces] == [OK] * 3


def test_a_first_fragment_that_never_comes_leaves_nothing_behind() -> None:
    """Half a datagram fills a reassembly queue, the node's or the task's, until all fragmented traffic is lost."""
    p = plane()
    later = [fragment(ADMITTED[4], NODE4, UDP, b"x" * 8, at, at == 8).ljust(60, b"\0") for at in (8, 16)]
    for program in FILTERS:
        assert [p.run(program, frame).retval for frame in later] == [SHOT] * 2
    assert p.verdicts() == {"EARLY": 2 * len(FILTERS)}


def test_without_rules_and_udp_fragments_pass_as_ever() -> None:
    p = Plane.fresh()
    p.local(NODE4)
    later = fragment(ADMITTED[4], NODE4, UDP, b"x" * 8, 8, False).ljust(60, b"\0")
    assert p.run("mesh_ingress", later).retval == OK
    assert p.verdicts() == {"FRAGMENT": 1}
