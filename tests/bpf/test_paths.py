# SPDX-License-Identifier: Apache-2.0
"""Rare paths: containers that call their own node, fragments, tagged and malformed frames, large packets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import fragment
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Dot1Q

from mesh.errors import BpfError
from tests.bpf.plane import HAIRPIN, HAIRPIN6, OK, REDIRECT, SHOT, Plane
from tests.bpf.wires import inside
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    ETHER,
    IP,
    NODE4,
    NODE6,
    OTHER4,
    TASK4,
    TASK6,
    TCP,
    Ether,
    IPv6,
    become,
    datagram,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]


MAC = "02:00:00:00:00:33"


def passed(plane: Plane, frame: bytes, program: str = "mesh_ingress") -> None:
    out = plane.run(program, frame)
    assert (out.retval, out.data) == (OK, frame)


# Hairpin


def test_a_container_calls_its_own_node(plane: Plane) -> None:
    frame = segment(OTHER4, 40000, NODE4, 80)
    out = plane.run("mesh_task", bytes(frame))
    assert (out.retval, out.data) == (REDIRECT, become(frame, dst=TASK4, dport=8080))
    reply = segment(TASK4, 8080, OTHER4, 40000, "SA")
    out = plane.run("mesh_task", bytes(reply))
    assert (out.retval, out.data) == (REDIRECT, become(reply, src=NODE4, sport=80))


@pytest.mark.parametrize(
    ("node", "port", "task", "stranger"), [(NODE4, 80, TASK4, HAIRPIN), (NODE6, 86, TASK6, HAIRPIN6)]
)
def test_a_container_that_is_given_itself_sees_a_stranger(
    plane: Plane, node: str, port: int, task: str, stranger: str
) -> None:
    frame = segment(task, 40000, node, port)
    out = plane.run("mesh_task", bytes(frame))
    assert (out.retval, out.data) == (REDIRECT, become(frame, src=stranger, dst=task, dport=8080))
    reply = segment(task, 8080, stranger, 40000, "SA")
    out = plane.run("mesh_task", bytes(reply))
    assert (out.retval, out.data) == (REDIRECT, become(reply, src=node, sport=port, dst=task))


def test_a_containers_other_traffic_is_untouched(plane: Plane) -> None:
    for frame in (
        segment(TASK4, 40000, CLIENT4, 80),
        segment(TASK4, 40000, OTHER4, 80),
        segment(TASK4, 8080, CLIENT4, 5),
    ):
        passed(plane, bytes(frame), "mesh_task")
    assert plane.verdicts() == {}


# Backends of this node


def test_backends_at_own_addresses_are_left_to_the_kernel(plane: Plane) -> None:
    """In transition too, where their flows are noted like others."""
    plane.backend(9, NODE4, 8080, ifindex=0, bridge=1)
    plane.frontend(9, 90, [(9, 9)])
    plane.frontend(10, 91, [(9, 2)])
    passed(plane, bytes(segment(CLIENT4, 40000, NODE4, 90)))
    passed(plane, bytes(segment(CLIENT4, 40000, NODE4, 91)))
    passed(plane, bytes(segment(CLIENT4, 40000, NODE4, 91, "A")))
    passed(plane, bytes(segment(OTHER4, 40000, NODE4, 90)), "mesh_task")
    assert plane.verdicts() == {"HOST_BACKEND": 4}
    assert plane.run("mesh_ingress", bytes(segment(CLIENT4, 40001, NODE4, 91, "A"))).retval == REDIRECT
    assert plane.verdicts() == {"HOST_BACKEND": 4, "KEPT": 1}


# Fragments


def pieces(frame: Any, size: int) -> list[Any]:
    """The frame's fragments; the datagram's checksum is computed first."""
    return [ETHER / p for p in fragment(Ether(bytes(frame))[IP], size)]


def test_fragments_follow_their_first_one(plane: Plane) -> None:
    frame = datagram(CLIENT4, 40000, NODE4, 53, bytes(range(256)) * 12, id=77)
    whole = Ether(become(frame, dst=TASK4, dport=5353))
    for piece, expected in zip(pieces(frame, 1000), pieces(whole, 1000), strict=True):
        out = plane.run("mesh_ingress", bytes(piece))
        assert (out.retval, out.data) == (REDIRECT, bytes(expected))
    answer = datagram(TASK4, 5353, CLIENT4, 40000, bytes(range(256)) * 12, id=99)
    whole = Ether(become(answer, src=NODE4, sport=53))
    for piece, expected in zip(pieces(answer, 1000), pieces(whole, 1000), strict=True):
        out = plane.run("mesh_task", bytes(piece))
        assert (out.retval, out.data) == (REDIRECT, bytes(expected))
    assert plane.verdicts() == {"FORWARD": 4, "REPLY": 4}


def test_without_rules_and_udp_fragments_without_their_first_one_pass(plane: Plane) -> None:
    frame = datagram(CLIENT4, 40000, NODE4, 53, bytes(3000), id=77)
    first, *rest = pieces(frame, 1000)
    for piece in rest:
        passed(plane, bytes(piece))
    assert plane.verdicts() == {"FRAGMENT": len(rest)}
    plane.run("mesh_ingress", bytes(first))
    other = pieces(datagram(CLIENT4, 40000, NODE4, 53, bytes(3000), id=78), 1000)[1]
    passed(plane, bytes(other))


def test_fragments_for_others_are_not_even_counted(plane: Plane) -> None:
    for piece in pieces(datagram(CLIENT4, 40000, "192.0.2.99", 53, bytes(3000)), 1000):
        passed(plane, bytes(piece))
    for piece in pieces(datagram(CLIENT4, 40000, NODE4, 99, bytes(3000)), 1000)[:1]:
        passed(plane, bytes(piece))
    assert plane.verdicts() == {}


# Frames that pass


@pytest.mark.parametrize("program", ["mesh_ingress", "mesh_task"])
def test_tagged_frames_are_left_to_the_tags_interface(plane: Plane, program: str) -> None:
    for tags in (Dot1Q(vlan=5), Dot1Q(vlan=5) / Dot1Q(vlan=6)):
        frame = ETHER / tags / segment(CLIENT4, 40000, NODE4, 80)[IP]
        out = plane.run(program, bytes(frame))
        assert out.retval == OK
    assert plane.verdicts() == {}


@pytest.mark.parametrize(
    "extension",
    [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment(), IPv6ExtHdrDestOpt() / IPv6ExtHdrFragment(m=1)],
    ids=["hop-by-hop", "destination", "atomic-fragment", "fragment-behind-another"],
)
def test_extension_headers_pass(plane: Plane, extension: Any) -> None:
    for node, counted in ((NODE6, True), ("2001:db8::99", False)):
        passed(plane, bytes(ETHER / IPv6(src=CLIENT6, dst=node) / extension / TCP(sport=40000, dport=86)))
        assert plane.verdicts() == {"EXTENSION": 1}
        assert counted or node != NODE6


def test_malformed_packets_pass(plane: Plane) -> None:
    tcp = segment(CLIENT4, 40000, NODE4, 80)
    tcp[TCP].dataofs = 4
    passed(plane, bytes(tcp))
    tcp[TCP].dataofs = 15
    passed(plane, bytes(tcp))
    assert plane.verdicts() == {"MALFORMED": 2}
    short = segment(CLIENT4, 40000, NODE4, 80, len=30)
    passed(plane, bytes(short))


@pytest.mark.parametrize(
    "frame",
    [segment(CLIENT4, 40000, NODE4, 80), segment(CLIENT6, 40000, NODE6, 86), datagram(CLIENT4, 40000, NODE4, 53)],
    ids=["tcp4", "tcp6", "udp4"],
)
@pytest.mark.parametrize("program", ["mesh_ingress", "mesh_task"])
def test_truncated_packets_pass(plane: Plane, program: str, frame: Any) -> None:
    raw = bytes(frame)
    for length in range(14, len(raw)):
        try:
            passed(plane, raw[:length], program)
        except BpfError:  # some kernels do not run a packet without its IP header
            assert length < 14 + (40 if IPv6 in frame else 20)
    assert set(plane.verdicts()) <= {"MALFORMED"}


@pytest.mark.parametrize("version", [0, 5, 6, 15])
@pytest.mark.parametrize("ihl", [0, 4, 5, 6, 15])
def test_wrong_ip_headers_pass(plane: Plane, version: int, ihl: int) -> None:
    raw = bytearray(bytes(segment(CLIENT4, 40000, NODE4, 80)))
    raw[14] = version << 4 | ihl
    passed(plane, bytes(raw))


def test_mapped_addresses_on_the_wire_pass(plane: Plane) -> None:
    passed(plane, bytes(segment(CLIENT6, 40000, f"::ffff:{NODE4}", 80)))
    passed(plane, bytes(segment(f"::ffff:{CLIENT4}", 40000, NODE6, 86)))


def test_lengths_from_smallest_to_largest(plane: Plane) -> None:
    for size in (0, 1, 7, 63, 64, 65, 1459, 1460):
        frame = segment(CLIENT4, 40000, NODE4, 80, "PA", bytes(size))
        assert plane.run("mesh_ingress", bytes(frame)).data == become(frame, dst=TASK4, dport=8080)


# Large replies


@pytest.fixture
def narrow() -> Iterator[tuple[str, int]]:
    """A namespace with an interface of MTU 1400."""
    name = f"mesh{os.getpid()}-mtu"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(
            ["ip", "-n", name, "link", "add", "name", "mesha", "mtu", "1400", "type", "veth", "peer", "name", "meshb"],
            check=True,
        )
        shown = subprocess.run(["ip", "-n", name, "link", "show", "mesha"], check=True, capture_output=True, text=True)
        subprocess.run(["ip", "-n", name, "link", "set", "mesha", "address", MAC, "up"], check=True)
        yield name, int(shown.stdout.split(":")[0])
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_reply_larger_than_the_interface_is_left_to_the_kernel(plane: Plane, narrow: tuple[str, int]) -> None:
    name, ifindex = narrow
    with inside(name):
        start = segment(CLIENT4, 40000, NODE4, 80)
        start[Ether].dst = MAC
        assert plane.run("mesh_ingress", bytes(start), ifindex=ifindex).retval == REDIRECT

        def reply(size: int, flags: str, gso: int = 0) -> int:
            frame = segment(TASK4, 8080, CLIENT4, 40000, "PA", bytes(size - 40))
            frame[IP].flags = flags
            return plane.run("mesh_task", bytes(frame), gso=gso).retval

        assert reply(1400, "DF") == REDIRECT
        assert reply(1401, "DF") == OK
        assert reply(1401, "") == SHOT
        assert plane.verdicts() == {"FORWARD": 1, "REPLY": 1, "TOO_BIG": 2}
