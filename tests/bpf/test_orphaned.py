# SPDX-License-Identifier: Apache-2.0
"""Tables that no agent has kept for orphan_timeout: the programs hand them back, and nothing that lives is cut."""

from __future__ import annotations

import struct

import pytest

from tests.bpf.plane import DENY, NONE, OK, PASS, REDIRECT, SHOT, TCP, TRACKED, UDP, Plane, explained, u32
from tests.oracle.packets import Model
from tests.oracle.state import Backend, Frontend
from tests.support.frames import CLIENT4, IP, NODE4, Ether, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

A, B = 2, 3
TASKS = {A: "172.18.0.3", B: "172.18.0.4"}
LONG = 66  # past MESH_ORPHAN_UDP, also by the stamp of an earlier packet, which those that start no flow use


@pytest.fixture
def plane() -> Plane:
    """80/tcp (frontend 1) and 53/udp (2), each one settled slot of A."""
    p = Plane.fresh()
    p.local(NODE4)
    for owner, address in TASKS.items():
        p.backend(owner, address, 8080)
    p.frontend(1, 80, [(A, A)])
    p.frontend(2, 53, [(A, A)], protocol=UDP)
    send(p, "S", 1)  # a start reads the clock, for all others
    p.verdicts()
    return p


def send(p: Plane, flags: str = "S", sport: int = 40000) -> int:
    """The owner that a TCP packet (flags) or a datagram (no flags) meets; PASS leaves it as it is."""
    frame = segment(CLIENT4, sport, NODE4, 80, flags) if flags else datagram(CLIENT4, sport, NODE4, 53)
    out = p.run("mesh_ingress", bytes(frame))
    if out.retval == OK:
        assert out.data == bytes(frame)
        return PASS
    to = Ether(out.data)[IP].dst
    return next(owner for owner, address in TASKS.items() if address == to)


def answer(p: Plane, flags: str, sport: int = 40000) -> None:
    """A's task sends a segment of a flow."""
    assert p.run("mesh_task", bytes(segment(TASKS[A], 8080, CLIENT4, sport, flags))).retval == REDIRECT


def new_verdicts(p: Plane) -> dict[str, int]:
    """Those of the test's own packets, not of the fixture's."""
    found = p.verdicts()
    found["FORWARD"] -= 1
    return {name: count for name, count in found.items() if count}


def test_starts_pass_and_flows_under_way_stay(plane: Plane) -> None:
    assert send(plane, "A", 40000) == A  # before: the slot needs no state
    answer(plane, "A")
    plane.orphan()
    assert send(plane, "S", 40001) == PASS
    assert send(plane, "A", 40001) == PASS
    assert send(plane, "PA", 40001) == PASS
    assert send(plane, "A", 40000) == A
    assert send(plane, "FA", 40000) == A
    assert new_verdicts(plane) == {"FORWARD": 1, "REPLY": 1, "ORPHANED": 1, "PASS": 2, "NOTED": 2}


def test_a_flow_that_nothing_knows_stays_with_its_owner(plane: Plane) -> None:
    plane.orphan(1000)
    assert send(plane, "A", 40000) == A
    assert send(plane, "A", 40000) == A
    assert new_verdicts(plane) == {"KEPT": 1, "NOTED": 1}


def test_nothing_is_handed_back_before_the_stamp_nor_without_one(plane: Plane) -> None:
    plane.orphan(-5)
    assert [send(plane, flags) for flags in ("S", "A")] == [A, A]
    plane.maps["mesh_heartbeat"].update(u32(0), u32(0))  # MESH_ORPHAN_NEVER
    assert [send(plane, flags) for flags in ("S", "A")] == [A, A]
    assert plane.maps["mesh_flows"].dump()[0] == plane.maps["mesh_flows_new"].dump()[0] == b""


@pytest.mark.parametrize(("stamps", "owner"), [(2**31 - 100, PASS), (-(2**31 - 100), A)])
def test_stamps_are_compared_by_their_signed_difference(plane: Plane, stamps: int, owner: int) -> None:
    """One of both is beyond the wrap of 32 bits, whatever the time is now."""
    plane.orphan(stamps)
    assert send(plane, "S") == owner


def test_a_slot_in_transition_keeps_its_notes_and_its_previous_owner(plane: Plane) -> None:
    plane.frontend(1, 80, [(A, B | TRACKED)])
    assert send(plane, "S", 40001) == A
    plane.orphan()
    assert send(plane, "A", 40001) == A
    assert send(plane, "A", 40000) == B
    assert send(plane, "S", 40002) == PASS


def test_a_flow_whose_note_is_lost_is_known_by_its_reverse_entry(plane: Plane) -> None:
    plane.frontend(1, 80, [(A, B | TRACKED)])
    assert send(plane) == A
    answer(plane, "SA")
    assert send(plane, "A") == A
    for name in ("mesh_flows", "mesh_flows_new"):
        plane.maps[name].delete_batch(plane.maps[name].dump()[0])
    plane.orphan()
    assert send(plane, "A") == A


def test_a_slot_without_owner_and_one_that_passes_already(plane: Plane) -> None:
    plane.frontend(1, 80, [(NONE, NONE)])
    plane.orphan()
    assert [send(plane, "S", 40000), send(plane, "A", 40001)] == [PASS, PASS]
    assert new_verdicts(plane) == {"ORPHANED": 2}
    plane.frontend(1, 80, [(PASS, PASS)])
    assert send(plane, "S", 40002) == PASS
    assert new_verdicts(plane) == {"ORPHANED": 2, "PASS": 1}


def test_denied_sources_stay_denied(plane: Plane) -> None:
    plane.frontend(1, 80, [(A, A)], flags=DENY)
    plane.orphan()
    assert plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80))).retval == SHOT


def test_udp_flows_have_time_to_be_noted_and_then_only_they_stay(plane: Plane) -> None:
    for _ in range(2):
        assert send(plane, "", 40000) == A
    plane.orphan(LONG - 30)
    assert send(plane, "", 40001) == A  # nothing tells it from one under way
    assert send(plane, "", 40001) == A
    plane.orphan(LONG)
    assert send(plane, "", 40001) == A  # noted
    assert send(plane, "", 40000) == A  # known by its reverse entry
    assert send(plane, "", 40002) == PASS
    assert send(plane, "", 40002) == PASS
    assert new_verdicts(plane) == {"FORWARD": 2, "KEPT": 1, "NOTED": 3, "ORPHANED": 1, "PASS": 1}


def test_who_returns_leaves_the_flows_of_both_where_they_are(plane: Plane) -> None:
    """As mesh.datapath.kernel.restore.rejoined does: the notes count in every slot, and then the heartbeat."""
    assert send(plane, "A", 40000) == A
    plane.orphan()
    assert send(plane, "S", 40001) == PASS
    plane.frontend(1, 80, [(A, A | TRACKED)])
    plane.orphan(-900)
    assert send(plane, "A", 40001) == PASS
    assert send(plane, "A", 40000) == A
    assert send(plane, "S", 40002) == A


def test_explain_says_so_and_notes_nothing(plane: Plane) -> None:
    plane.orphan()
    name, *_, owner = explained(plane.run("mesh_explain", bytes(segment(CLIENT4, 40000, NODE4, 80))))
    assert (name, owner) == ("ORPHANED", PASS)
    assert plane.maps["mesh_flows_new"].dump()[0] == b""


@pytest.mark.parametrize("stamps", [-9, 0, LONG])
@pytest.mark.parametrize("slot", [(A, A), (A, B | TRACKED), (NONE, NONE), (PASS, A | TRACKED), (A, PASS | TRACKED)])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_as_the_model_says(plane: Plane, stamps: int, slot: tuple[int, int], protocol: int) -> None:
    port, number = (80, 1) if protocol == TCP else (53, 2)
    plane.frontend(number, port, [slot], protocol=protocol)
    model = Model(bytes(16), bytes(16), now=10**6, orphan_at=10**6 - stamps)
    model.addresses.add(address(NODE4))
    model.any_address[protocol, port] = number
    model.frontends[number] = Frontend([slot])
    model.backends = {owner: Backend(address(where), 8080, 1, 1) for owner, where in TASKS.items()}
    plane.orphan(stamps)
    before = plane.verdicts()
    packets = [("S", 1), ("A", 1), ("A", 2), ("A", 2), ("PA", 1), ("S", 2), ("A", 2)]
    for flags, sport in packets if protocol == TCP else [("", 1), ("", 2), ("", 1)]:
        frame = segment(CLIENT4, sport, NODE4, port, flags) if flags else datagram(CLIENT4, sport, NODE4, port)
        expected = model.ingress(bytes(frame))
        assert plane.run("mesh_ingress", bytes(frame)).retval == expected.action, (flags, sport)
        after = plane.verdicts()
        told = {name for name, count in after.items() if count != before.get(name, 0)}
        assert told == {expected.verdict}, (flags, sport)
        before = after


def address(text: str) -> bytes:
    return bytes(10) + b"\xff\xff" + bytes(map(int, text.split(".")))


def test_the_note_is_that_of_a_hand_back(plane: Plane) -> None:
    plane.orphan()
    send(plane, "S", 40001)
    key, note = plane.maps["mesh_flows_new"].dump()
    assert struct.unpack_from("!H", key, 32)[0] == 40001
    assert struct.unpack_from("=II", note) == (PASS, 0)
