# SPDX-License-Identifier: Apache-2.0
"""Who owns a flow: slots in transition, PASS, no backend, affinity, source rules."""

from __future__ import annotations

import struct

import pytest

from tests.bpf.plane import (
    ACTIVE,
    ALLOW_RULE,
    CLIENT,
    DENY,
    DENY_RULE,
    DRAINING,
    FREE,
    HAIRPIN,
    HOLD,
    NONE,
    OK,
    PASS,
    PASS_IF_NONE,
    REDIRECT,
    SHOT,
    TRACKED,
    UDP,
    Plane,
    explained,
    packed,
)
from tests.oracle import selection
from tests.support.frames import CLIENT4, CLIENT6, IP, NODE4, NODE6, TCP, Ether, IPv6, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

A, B = 2, 3
TASKS = {A: "172.18.0.3", B: "172.18.0.4", 4: "172.18.0.5"}


@pytest.fixture
def plane() -> Plane:
    """80/tcp (frontend 1) and 53/udp (2), each one slot; the test gives the slots."""
    p = Plane.fresh()
    p.local(NODE4, NODE6)
    for owner, address in TASKS.items():
        p.backend(owner, address, 8080)
    return p


def owner(p: Plane, flags: str = "S", sport: int = 40000) -> int | str:
    """The owner that a TCP packet (flags) or a datagram (no flags) meets."""
    frame = segment(CLIENT4, sport, NODE4, 80, flags) if flags else datagram(CLIENT4, sport, NODE4, 53)
    out = p.run("mesh_ingress", bytes(frame))
    if out.retval == OK:
        assert out.data == bytes(frame)
        return PASS
    if out.retval != REDIRECT:
        return "dropped"
    to = Ether(out.data)[IP].dst
    return next((o for o, address in TASKS.items() if address == to), "refused")


def answer(p: Plane, task: int, sport: int) -> None:
    """The task answers a start: the client's next segment then proves the flow."""
    assert p.run("mesh_task", bytes(segment(TASKS[task], 8080, CLIENT4, sport, "SA"))).retval == REDIRECT


def tcp(p: Plane, current: int, previous: int, flags: int = 0) -> None:
    p.frontend(1, 80, [(current, previous | (TRACKED if current != previous else 0))], flags=flags)


def udp(p: Plane, current: int, previous: int, flags: int = 0) -> None:
    p.frontend(2, 53, [(current, previous | (TRACKED if current != previous else 0))], protocol=UDP, flags=flags)


def test_stable_slot_needs_no_state(plane: Plane) -> None:
    tcp(plane, A, A)
    assert owner(plane, "S") == owner(plane, "A") == A
    assert plane.maps["mesh_flows"].dump()[0] == b""


def test_starts_go_to_the_current_owner_and_others_stay(plane: Plane) -> None:
    tcp(plane, A, B)
    assert owner(plane, "A", 40000) == B  # under way before the change
    assert owner(plane, "S", 40001) == A
    assert owner(plane, "A", 40001) == A
    assert owner(plane, "PA", 40000) == B
    assert plane.verdicts() == {"KEPT": 1, "STARTED": 1, "NOTED": 2}


def test_port_that_is_used_again_starts_anew(plane: Plane) -> None:
    tcp(plane, A, B)
    assert owner(plane, "A") == B
    assert owner(plane, "S") == A
    assert owner(plane, "A") == A


def test_noted_flows_outlive_further_changes(plane: Plane) -> None:
    tcp(plane, A, B)
    assert owner(plane, "S", 40001) == A
    tcp(plane, 4, B)
    assert owner(plane, "A", 40001) == A
    tcp(plane, B, B)
    plane.frontend(1, 80, [(B, B | TRACKED)])
    assert owner(plane, "A", 40001) == A
    assert owner(plane, "A", 40002) == B


def test_flows_leave_an_owner_that_is_gone(plane: Plane) -> None:
    tcp(plane, A, B)
    assert owner(plane, "A") == B
    plane.backend(B, TASKS[B], 8080, state=FREE)
    assert owner(plane, "A") == A  # noted, but gone
    assert owner(plane, "A") == A
    assert owner(plane, "A", 40001) == A  # un-noted, its owner gone
    assert plane.verdicts() == {"KEPT": 1, "MOVED": 2, "NOTED": 1}


def test_note_of_an_id_that_was_given_anew_is_void(plane: Plane) -> None:
    tcp(plane, A, B)
    assert owner(plane, "A") == B
    plane.backend(B, TASKS[B], 8080, epoch=2)
    assert owner(plane, "A") == A


def test_draining_keeps_tcp_flows_and_gives_up_unknown_udp_flows(plane: Plane) -> None:
    tcp(plane, A, B)
    udp(plane, A, B)
    assert owner(plane, "", 40000) == B
    plane.backend(B, TASKS[B], 8080, state=DRAINING)
    assert owner(plane, "A", 40000) == B
    assert owner(plane, "", 40000) == B  # noted
    assert owner(plane, "", 40001) == A
    assert owner(plane, "S", 40001) == A


def test_take_over_leaves_flows_under_way_to_whoever_had_them(plane: Plane) -> None:
    tcp(plane, A, PASS)
    assert owner(plane, "A", 40000) == PASS
    assert owner(plane, "S", 40001) == A
    assert owner(plane, "A", 40001) == A
    assert owner(plane, "FA", 40000) == PASS
    assert plane.verdicts() == {"PASS": 2, "STARTED": 1, "NOTED": 1}


def test_handing_back_keeps_flows_under_way(plane: Plane) -> None:
    tcp(plane, PASS, A)
    assert owner(plane, "A", 40000) == A
    assert owner(plane, "S", 40001) == PASS
    assert owner(plane, "A", 40001) == PASS


def test_udp_is_taken_over_at_once_unless_the_frontend_holds(plane: Plane) -> None:
    udp(plane, A, PASS)
    assert owner(plane, "", 40000) == A
    udp(plane, A, PASS, HOLD)
    assert owner(plane, "", 40000) == A
    assert owner(plane, "", 40001) == PASS
    udp(plane, A, PASS)
    assert owner(plane, "", 40001) == PASS  # noted


def test_udp_stays_with_an_active_previous_owner(plane: Plane) -> None:
    udp(plane, A, B)
    assert owner(plane, "") == B
    assert owner(plane, "") == B
    assert plane.verdicts() == {"KEPT": 1, "NOTED": 1}


def test_previous_owner_none_has_no_flows(plane: Plane) -> None:
    tcp(plane, A, NONE)
    assert owner(plane, "A") == A


def test_current_owner_none_keeps_flows_of_the_previous(plane: Plane) -> None:
    tcp(plane, NONE, A)
    assert owner(plane, "A", 40000) == A
    assert owner(plane, "S", 40001) not in (A, PASS)
    plane.backend(A, TASKS[A], 8080, state=FREE)
    assert owner(plane, "A", 40000) not in (A, PASS)


def test_no_backend_passes_where_the_frontend_says_so(plane: Plane) -> None:
    tcp(plane, NONE, NONE, PASS_IF_NONE)
    assert owner(plane) == PASS
    assert plane.verdicts() == {"NO_BACKEND": 1}


def test_frontend_without_table_passes(plane: Plane) -> None:
    tcp(plane, A, A)
    plane.maps["mesh_frontends"].update(struct.pack("=I", 1), bytes(16))
    assert owner(plane) == PASS


@pytest.mark.parametrize("flags", [0, CLIENT])
@pytest.mark.parametrize(("client", "node"), [(CLIENT4, NODE4), (CLIENT6, NODE6)])
def test_slot_is_that_of_the_reference(plane: Plane, flags: int, client: str, node: str) -> None:
    size = 1021
    plane.frontend(1, 80, [(A + i % 2, A + i % 2) for i in range(size)], flags=flags)
    for sport in range(1, 60000, 997):
        frame = segment(client, sport, node, 80)
        _, frontend, value, slot, chosen = explained(plane.run("mesh_explain", bytes(frame)))
        if flags:
            expected = selection.client_hash(packed(client))
        else:
            expected = selection.flow_hash(packed(client), sport, packed(node), 80, 6)
        assert (frontend, value, slot) == (1, expected, selection.slot_for(expected, size))
        assert chosen == A + slot % 2


def test_known_answers_where_no_frontend_is(plane: Plane) -> None:
    for case in selection.golden()["flows"]:
        source, sport, destination, dport, protocol = case["flow"]
        if protocol not in (6, 17):
            continue
        build = segment if protocol == 6 else datagram
        answer = explained(plane.run("mesh_explain", bytes(build(source, sport, destination, dport))))
        assert answer == ("", 0, case["hash"], case["client"], 0)
    for sport in range(1, 60000, 4999):
        frame = datagram(CLIENT6, sport, NODE6, 99)
        assert frame[IPv6].dst == NODE6
        name, frontend, value, slot, _ = explained(plane.run("mesh_explain", bytes(frame)))
        assert (name, frontend) == ("", 0)
        assert value == selection.flow_hash(packed(CLIENT6), sport, packed(NODE6), 99, 17)
        assert slot == selection.client_hash(packed(CLIENT6))


def test_source_rules(plane: Plane) -> None:
    plane.rule(7, "198.51.100.0/24", ALLOW_RULE)
    plane.rule(7, "198.51.100.8/30", DENY_RULE)
    plane.rule(7, "2001:db8:9::/48", ALLOW_RULE)
    plane.backend(4, "fd00::4", 8080)
    plane.frontend(1, 80, [(A, A)], acl=7, flags=DENY)
    plane.frontend(3, 86, [(4, 4)], acl=7, flags=DENY)

    def action(client: str, node: str, port: int) -> int:
        return plane.run("mesh_ingress", bytes(segment(client, 40000, node, port))).retval

    assert action("198.51.100.7", NODE4, 80) == REDIRECT
    assert action("198.51.100.9", NODE4, 80) == SHOT
    assert action("203.0.113.5", NODE4, 80) == SHOT
    assert action(CLIENT6, NODE6, 86) == REDIRECT
    assert action("2001:db8:a::1", NODE6, 86) == SHOT
    plane.frontend(1, 80, [(A, A)], acl=7)
    assert action("203.0.113.5", NODE4, 80) == REDIRECT
    assert action("198.51.100.9", NODE4, 80) == SHOT
    plane.frontend(1, 80, [(A, A)], acl=8)
    assert action("198.51.100.9", NODE4, 80) == REDIRECT
    assert plane.verdicts()["DENIED"] == 4
    assert ACTIVE


def forget(p: Plane) -> None:
    """Lose every note."""
    for name in ("mesh_flows", "mesh_flows_new"):
        p.maps[name].delete_batch(p.maps[name].dump()[0])


def notes(p: Plane, name: str) -> list[tuple[int, int]]:
    """(client's port, owner) of a table of notes."""
    keys, values = p.maps[name].dump()
    found = zip(range(0, len(keys), 40), range(0, len(values), 16), strict=True)
    return sorted((*struct.unpack_from("!H", keys, k + 32), *struct.unpack_from("=I", values, v)) for k, v in found)


def test_flows_that_the_cache_has_lost_are_known_by_their_reverse_entries(plane: Plane) -> None:
    tcp(plane, A, PASS)
    assert owner(plane, "S", 40000) == A
    answer(plane, A, 40000)
    assert owner(plane, "A", 40000) == A
    assert [owner(plane, flags, 40001) for flags in ("S", "A")] == [A, A]  # an opening alone is no proof
    forget(plane)
    assert owner(plane, "A", 40000) == A
    assert owner(plane, "A", 40001) == PASS
    assert owner(plane, "A", 40002) == PASS
    assert plane.verdicts() == {"STARTED": 2, "NOTED": 3, "PASS": 2, "REPLY": 1}
    forget(plane)
    plane.backend(A, TASKS[A], 8080, epoch=2)
    assert owner(plane, "A", 40000) == PASS  # another backend than the entry's


def test_a_flow_is_kept_among_those_that_go_on_once_it_is_proven(plane: Plane) -> None:
    """So that starts, stray packets and pairs of them from invented addresses never push out a flow that goes on."""
    tcp(plane, A, B)
    for flags, sport in (("S", 40000), ("A", 40001), ("S", 40002), ("A", 40002)):
        owner(plane, flags, sport)
    answer(plane, A, 40000)
    assert notes(plane, "mesh_flows") == []
    assert notes(plane, "mesh_flows_new") == [(40000, A), (40001, B), (40002, A)]
    assert [owner(plane, "A", 40000), owner(plane, "A", 40001)] == [A, B]
    assert notes(plane, "mesh_flows") == [(40000, A)]
    assert notes(plane, "mesh_flows_new") == [(40001, B), (40002, A)]  # B's is B's without a note, too
    packet = bytearray(bytes(segment(CLIENT4, 0, NODE4, 80)))
    for sport in range(10000, 15000):
        struct.pack_into("!H", packet, 34, sport)
        for packet[47] in (2, 16):
            plane.run("mesh_ingress", bytes(packet))
    assert [owner(plane, "A", 40000), owner(plane, "A", 40001)] == [A, B]
    tcp(plane, 4, PASS)  # neither owner that is left is that of the first flow
    assert owner(plane, "A", 40000) == A


def test_the_task_proves_a_flow_by_going_on_with_it(plane: Plane) -> None:
    """The entry of an established connection was lost, or its start was not seen: the client's word alone is none."""
    tcp(plane, A, A)
    for flags in ("A", "A", "PA", "FA"):
        assert owner(plane, flags, 40000) == A
    assert plane.maps["mesh_revnat"].dump()[0] == b""
    for flags in ("R", "SA"):  # what a kernel without the connection answers
        assert plane.run("mesh_task", bytes(segment(TASKS[A], 8080, CLIENT4, 40001, flags))).retval == OK
        owner(plane, "A", 40001)
        assert plane.run("mesh_task", bytes(segment(TASKS[A], 8080, CLIENT4, 40001, flags))).retval == REDIRECT
        assert plane.maps["mesh_revnat"].dump()[0] == b""
        plane.maps["mesh_revnat_new"].delete_batch(plane.maps["mesh_revnat_new"].dump()[0])
    owner(plane, "A", 40002)
    assert plane.run("mesh_task", bytes(segment(TASKS[A], 8080, CLIENT4, 40002, "A"))).retval == REDIRECT
    assert len(plane.maps["mesh_revnat"].dump()[0]) == 40
    assert plane.maps["mesh_revnat_new"].dump()[0] == b""


@pytest.mark.parametrize(("ahead", "proves"), [(1, True), (0, False), (1 << 17, True), ((1 << 17) + 1, False)])
def test_only_who_has_the_tasks_answer_can_acknowledge_it(plane: Plane, ahead: int, proves: bool) -> None:
    tcp(plane, A, A)
    owner(plane, "S", 40000)
    answer(plane, A, 40000)
    frame = segment(CLIENT4, 40000, NODE4, 80, "A")
    frame[TCP].ack = frame[TCP].seq + ahead  # both sides of these tests begin with the same number
    assert plane.run("mesh_ingress", bytes(frame)).retval == REDIRECT
    assert len(plane.maps["mesh_revnat"].dump()[0]) == 40 * proves
    assert plane.counts("mesh_be_metrics", A)[4] == proves


def test_datagrams_have_a_map_of_their_own(plane: Plane) -> None:
    udp(plane, A, A)
    for _ in range(2):
        owner(plane, "", 40000)
    assert [len(plane.maps[f"mesh_revnat{name}"].dump()[0]) for name in ("", "_udp", "_new")] == [0, 40, 0]


def test_a_port_that_is_used_again_replaces_the_note_of_the_flow_before(plane: Plane) -> None:
    tcp(plane, A, B)
    assert [owner(plane, "A"), owner(plane, "A"), owner(plane, "S")] == [B, B, A]
    assert (notes(plane, "mesh_flows"), notes(plane, "mesh_flows_new")) == ([], [(40000, A)])
    assert owner(plane, "A") == A


def test_udp_is_noted_alike(plane: Plane) -> None:
    udp(plane, A, B)
    assert owner(plane, "", 40000) == owner(plane, "", 40001) == owner(plane, "", 40001) == B
    assert notes(plane, "mesh_flows_new") == [(40000, B), (40001, B)]
    assert notes(plane, "mesh_flows") == []  # no datagram proves anything


def test_hairpin_flows_are_known_by_their_reverse_entries_too() -> None:
    """A task that calls itself is another client to itself: the entry has the hairpin's address."""
    plane = Plane.fresh()
    plane.local(NODE4)
    plane.backend(A, TASKS[A], 8080)
    tcp(plane, A, PASS)
    calls = [segment(TASKS[A], 40000, NODE4, 80, flags) for flags in ("S", "A", "A")]
    for frame in (calls[0], segment(TASKS[A], 8080, HAIRPIN, 40000, "SA"), *calls[1:]):
        assert plane.run("mesh_task", bytes(frame)).retval == REDIRECT
    forget(plane)
    assert plane.run("mesh_task", bytes(calls[1])).retval == REDIRECT
    assert plane.verdicts() == {"STARTED": 1, "NOTED": 3, "REPLY": 1}


def test_a_flow_whose_note_is_lost_goes_to_the_previous_owner_if_that_keeps_flows(plane: Plane) -> None:
    """Where its own is neither the current nor the previous one, nothing knows it any more: docs/DATAPATH.md."""
    tcp(plane, A, B)
    assert [owner(plane, flags, 40000) for flags in ("S", "A")] == [A, A]
    tcp(plane, 4, B)
    forget(plane)
    assert owner(plane, "A", 40000) == B
    forget(plane)
    plane.backend(B, TASKS[B], 8080, state=FREE)
    assert (owner(plane, "A", 40000), plane.verdicts()["MOVED"]) == (4, 1)
