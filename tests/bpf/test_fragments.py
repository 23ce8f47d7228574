# SPDX-License-Identifier: Apache-2.0
"""Datagrams in fragments that come in any order: each fragment goes where its first one goes, once that has come.

What was kept comes in again by the interface of the packet, here a loopback device, where the test takes it and gives
it to the program as the kernel would.
"""

from __future__ import annotations

import random
import socket

import pytest
from scapy.layers.inet import IP, UDP, defragment
from scapy.layers.inet6 import IPv6, defragment6

from mesh._abi import SETTING_GUARD
from tests.bpf.again import Again
from tests.bpf.plane import DENY_RULE, SHOT, Plane
from tests.bpf.plane import UDP as UDP_PROTOCOL
from tests.support.fragments import ORDERS, Order, cut, in_order, last_first, packet, shuffled, swapped
from tests.support.frames import CLIENT4, CLIENT6, NODE4, NODE6, TASK4, TASK6

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere")]

CLIENT, NODE, TASK = {4: CLIENT4, 6: CLIENT6}, {4: NODE4, 6: NODE6}, {4: TASK4, 6: TASK6}
CALLED = {4: 53, 6: 56}
MAC = bytes(6) + bytes.fromhex("020000000001")
DATA = bytes(range(251)) * 20
RING = 2048  # chunks, EARLY_BITS


@pytest.fixture
def guarded(plane: Plane) -> Plane:
    plane.configure(settings=SETTING_GUARD)
    return plane


def framed(pieces: list[bytes]) -> list[bytes]:
    return [MAC + (b"\x86\xdd" if piece[0] >> 4 == 6 else b"\x08\0") + piece for piece in pieces]


def question(version: int, ident: int = 7, data: bytes = DATA, piece: int = 1024) -> tuple[list[bytes], list[bytes]]:
    """A client's datagram in fragments, and what its task gets."""
    client, called, task = (CLIENT[version], 40000), (NODE[version], CALLED[version]), (TASK[version], 5353)
    return framed(cut(client, called, data, ident, piece)), framed(cut(client, task, data, ident, piece, ttl=63))


def answer(version: int, ident: int = 9) -> tuple[list[bytes], list[bytes]]:
    client, called, task = (CLIENT[version], 40000), (NODE[version], CALLED[version]), (TASK[version], 5353)
    return framed(cut(task, client, DATA, ident)), framed(cut(called, client, DATA, ident, ttl=63))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("program", ["mesh_ingress", "mesh_bridge"])
def test_a_question_in_any_order(guarded: Plane, version: int, order: Order, program: str) -> None:
    frames, expected = question(version)
    with Again(guarded, program) as node:
        node.run(order(frames))
        assert sorted(node.sent) == sorted(expected)
        assert node.sent[0] == expected[0]  # who gets them next may know no better order
    early = len(order(frames)[: order(frames).index(frames[0])])
    counted = guarded.verdicts()
    assert (counted.pop("EARLY", 0), counted) == (early, {"FORWARD": len(frames)})


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_an_answer_in_any_order(guarded: Plane, version: int, order: Order) -> None:
    with Again(guarded, "mesh_ingress") as node:
        node.run(question(version)[0])
    frames, expected = answer(version)
    with Again(guarded, "mesh_task") as node:
        node.run(order(frames))
        assert sorted(node.sent) == sorted(expected)
        assert node.sent[0] == expected[0]
    assert guarded.verdicts()["REPLY"] == len(frames)


def test_scapy_puts_them_together(guarded: Plane) -> None:
    """Checksums as a stranger computes them."""
    for version, together in ((4, defragment), (6, defragment6)):
        with Again(guarded, "mesh_ingress") as node:
            node.run(shuffled(question(version)[0]))
        layer = IPv6 if version == 6 else IP
        whole = together([layer(frame[14:]) for frame in node.sent])
        whole = whole if version == 6 else whole[0]
        assert (whole.src, whole.dst, whole[UDP].dport) == (CLIENT[version], TASK[version], 5353)
        assert bytes(whole[UDP].payload) == DATA
        check = whole[UDP].chksum
        del whole[UDP].chksum
        assert layer(bytes(whole))[UDP].chksum == check


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("piece", [8, 1480, 2048, 2056, 8952, 16000])
def test_fragments_of_all_sizes(guarded: Plane, version: int, piece: int) -> None:
    """What is kept in one chunk or several; to and from the longest packets of each size."""
    data = bytes(random.Random(piece).randbytes(min(piece * 5 // 2, 40000)))
    for ident, order in enumerate(ORDERS.values()):
        frames, expected = question(version, ident, data, piece)
        with Again(guarded, "mesh_ingress") as node:
            node.run(order(frames))
            assert sorted(node.sent) == sorted(expected)


def test_a_whole_datagram_of_the_largest_size(guarded: Plane) -> None:
    frames, expected = question(4, data=random.Random(1).randbytes(65000), piece=1480)
    with Again(guarded, "mesh_ingress") as node:
        node.run(last_first(frames))
        assert sorted(node.sent) == sorted(expected)


def test_what_is_too_large_to_be_kept_is_dropped(guarded: Plane) -> None:
    frames, _ = question(4, data=bytes(60000), piece=20000)
    with Again(guarded, "mesh_ingress") as node:
        assert node.run(last_first(frames))[:2] == [SHOT] * 2
    assert guarded.verdicts()["NO_PORTS"] >= 2


@pytest.mark.parametrize("order", [swapped, last_first, shuffled])
def test_many_datagrams_in_mixed_order(guarded: Plane, order: Order) -> None:
    """Of two clients by the same ids, to ports of ours and others; those of others come to the kernel whole."""
    frames, expected, passed = [], [], 0
    for ident in range(60):
        for client, called in ((CLIENT4, 53), ("198.51.100.10", 53), (CLIENT4, 54)):
            source = client, 40000
            pieces = framed(cut(source, (NODE4, called), DATA[ident:], ident + (1000 if called == 54 else 0)))
            frames += pieces
            if called == 53:
                expected += framed(cut(source, (TASK4, 5353), DATA[ident:], ident, ttl=63))
            else:
                passed += len(pieces)
    with Again(guarded, "mesh_ingress") as node:
        node.run(order(frames))
        assert sorted(node.sent) == sorted(expected)
        assert node.actions.count(0xFFFFFFFF) == passed


def test_a_first_fragment_that_never_comes_leaves_nothing(guarded: Plane) -> None:
    frames, _ = question(4)
    with Again(guarded, "mesh_ingress") as node:
        assert set(node.run(frames[1:])) == {SHOT}
        assert not node.sent
    assert guarded.verdicts() == {"EARLY": len(frames) - 1}


def test_duplicates_are_as_on_any_path(guarded: Plane) -> None:
    frames, expected = question(4)
    with Again(guarded, "mesh_ingress") as node:
        node.run([frames[2], frames[2], *frames, frames[0]])
        assert sorted(node.sent) == sorted([expected[2], expected[2], *expected, expected[0]])


def test_a_flood_of_strays_replaces_the_oldest_only(guarded: Plane) -> None:
    """Bounded memory: what was kept before the flood is gone, what comes after it is not."""
    before, _ = question(4, 1)
    after, expected = question(4, 2)
    with Again(guarded, "mesh_ingress") as node:
        node.run(before[1:])
        for number in range(RING):
            ends = socket.inet_aton(f"198.18.{number >> 8}.{number & 255}") + socket.inet_aton(NODE4)
            guarded.run("mesh_ingress", framed([packet(ends, bytes(64), 1, 8, more=False)])[0])
        node.run(before[:1])
        assert len(node.sent) == 1
        node.run(last_first(after))
        assert sorted(node.sent[1:]) == sorted(expected)


@pytest.mark.parametrize("program", ["mesh_ingress", "mesh_guard", "mesh_bridge_guard"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_source_rules_hold_in_any_order(guarded: Plane, program: str, version: int, order: Order) -> None:
    guarded.rule(9, f"{CLIENT[version]}/{32 if version == 4 else 128}", DENY_RULE)
    number = 3 if version == 4 else 4
    slots = [(number + 1, number + 1)]
    guarded.frontend(number, CALLED[version], slots, protocol=UDP_PROTOCOL, acl=9)
    frames, _ = question(version)
    with Again(guarded, program) as node:
        node.run(order(frames))
        assert set(node.actions) == {SHOT}
    assert guarded.verdicts()["DENIED"] == len(frames)


def test_guards_pass_what_nobody_denies_whole(guarded: Plane) -> None:
    for program in ("mesh_guard", "mesh_bridge_guard"):
        for version in (4, 6):
            frames, _ = question(version, ident=50 + version + len(program))
            with Again(guarded, program) as node:
                node.run(last_first(frames))
                assert node.actions.count(0xFFFFFFFF) == len(frames)


def test_another_hosts_fragments_are_left_alone(guarded: Plane) -> None:
    frames = [b"\x02" + frame[1:] for frame in question(4)[0]]
    with Again(guarded, "mesh_ingress") as node:
        assert set(node.run(last_first(frames))) == {0xFFFFFFFF}
    assert guarded.verdicts() == {}


def test_ports_of_an_old_datagram_are_not_taken_for_anothers(guarded: Plane) -> None:
    """The id is used again: its fragments may belong to another flow of the same client."""
    frames, _ = question(4)
    with Again(guarded, "mesh_ingress") as node:
        node.run(in_order(frames))
        for key, value in guarded.maps["mesh_fragments"].rows():
            stamp = int.from_bytes(value[4:], "little") - 4
            guarded.maps["mesh_fragments"].update(key, value[:4] + stamp.to_bytes(4, "little"))
        assert node.run(frames[1:2]) == [SHOT]
    assert guarded.verdicts()["EARLY"] == 1

