# SPDX-License-Identifier: Apache-2.0
"""Slot transitions: what they promise to a flow, told by random histories, and equality with the oracle."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh._abi import OWNER_NONE, OWNER_PASS, SLOT_TRACKED
from mesh._maglev import SlotTable, backend_seed
from tests.oracle import selection

SIZE = 1021
A, B, C, D, E, F = range(2, 8)
FLOWS = tuple(selection.flow_hash(bytes(15) + b"\1", port, bytes(16), 80, 6) for port in range(1024, 1064))


def built(*owners, size=SIZE):
    return SlotTable.build(size, [(backend_seed(f"b{owner}"), owner, 1) for owner in owners])


def uniform(owner):
    return SlotTable.uniform(SIZE, owner)


def slots(table):
    return [table.slot(i) for i in range(table.size)]


def current(table):
    return [slot[0] for slot in slots(table)]


def oracle_slots(table):
    return [(slot.current, slot.previous, slot.tracked) for slot in table]


def only(table):
    (slot,) = set(slots(table))
    return slot


owner_sets = st.frozensets(st.integers(A, F), max_size=5)
# A step: the backends that get slots, those that cease to exist, whether the port is passed instead; and settling.
steps = st.lists(st.tuples(owner_sets, st.frozensets(st.integers(A, F), max_size=2), st.integers(0, 9)), max_size=8)


def histories(table, history):
    """Tables of a random history with the step that led to each: (table, new owners, gone, settled?)."""
    dead = set()
    for members, gone, dice in history:
        if dice == 0:
            yield table.settled(), None, frozenset(), True
            table = table.settled()
            continue
        dead |= gone
        target = uniform(OWNER_PASS) if dice == 1 else built(*(members - dead))
        table = table.transition(target, gone)
        yield table, current(target), gone, False


@settings(deadline=None, max_examples=60)
@given(owner_sets, steps)
def test_transitions_equal_the_oracle(first, history):
    table = built(*first)
    oracle = selection.fresh(current(table))
    for after, owners, gone, settled in histories(table, history):
        oracle = selection.settled(oracle) if settled else selection.transition(oracle, owners, gone)
        assert slots(after) == oracle_slots(oracle)
        assert after.tracked == any(slot.tracked for slot in oracle)
        assert after.tracked_slots() == sum(slot.tracked for slot in oracle)


@settings(deadline=None, max_examples=60)
@given(owner_sets, steps)
def test_stateless_where_the_owners_agree_and_nothing_was_noted(first, history):
    for after, owners, gone, _ in histories(built(*first), history):
        for now, before, tracked in slots(after):
            assert tracked or now == before
            assert now == OWNER_NONE or now not in gone or now in owners
            assert before == now or before not in gone


@settings(deadline=None, max_examples=60)
@given(owner_sets, steps, st.data())
def test_an_established_flow_never_moves_while_its_backend_lives(first, history, data):
    """Flows start at random moments and stay silent for random times: each packet reaches the flow's own backend."""
    table = built(*first)
    forwarder = selection.Forwarder(selection.fresh(current(table)))
    owner_of, dead = {}, set()
    for members, gone, dice in [(first, frozenset(), 2), *history]:
        target = uniform(OWNER_PASS) if dice == 1 else built(*(members - dead - gone))
        dead |= gone
        table = table.transition(target, gone)
        # The forwarder runs on the table under test, not on the oracle's.
        forwarder.cache = {flow: owner for flow, owner in forwarder.cache.items() if owner not in gone}
        forwarder.table = [
            selection.Slot(now, before, forgotten=tracked and now == before) for now, before, tracked in slots(table)
        ]
        starting = FLOWS[:: data.draw(st.sampled_from([2, 3, 50]))]
        speaking = FLOWS[1 :: data.draw(st.sampled_from([1, 2, 50]))]
        for flow in starting + speaking:
            alive = flow in owner_of and owner_of[flow] not in dead and owner_of[flow] != OWNER_NONE
            if alive and flow not in starting:
                where = forwarder.packet(flow, start=False)
                assert where == owner_of[flow], f"flow {flow:x} moved"
            else:  # a new flow, or a client that uses its port again
                owner_of[flow] = forwarder.packet(flow, start=True)
                assert owner_of[flow] == current(table)[selection.slot_for(flow, SIZE)]


def test_first_change_keeps_most_slots_stateless():
    before, after = built(A, B, C, D), built(A, B, C)
    table = before.transition(after)
    assert current(table) == current(after)
    for old, (now, previous, tracked) in zip(current(before), slots(table), strict=True):
        assert previous == old
        assert tracked == (old != now)
    assert 0 < table.tracked_slots() < SIZE / 2
    assert table.tracked


def test_no_change_is_no_transition():
    table = built(A, B).transition(built(A, B))
    assert not table.tracked
    assert table == built(A, B)


def test_there_and_back_remembers_those_who_started_in_between():
    away = uniform(A).transition(uniform(B))
    assert only(away) == (B, A, True)
    back = away.transition(uniform(A))
    assert only(back) == (A, A, True), "un-noted flows are A's, those noted meanwhile are B's"
    assert back.tracked_slots() == SIZE
    assert back.owners() == {A, B}
    assert not back.transition(uniform(A), gone={B}).tracked
    assert not back.settled().tracked


def test_silent_across_many_changes():
    table = uniform(A)
    for owner in (B, C, D, B, C):
        table = table.transition(uniform(owner))
        assert only(table) == (owner, A, True)


def test_previous_owner_gone_frees_the_slot():
    table = uniform(A).transition(uniform(B))
    assert only(table.transition(uniform(B), gone={A})) == (B, B, False)
    assert not table.transition(uniform(B), gone={A}).tracked


def test_previous_owner_gone_but_another_was_noted():
    table = uniform(A).transition(uniform(B)).transition(uniform(C), gone={A})
    assert only(table) == (C, C, True), "un-noted flows have nobody left; those noted under B are still B's"
    assert only(table.transition(uniform(C), gone={B})) == (C, C, False)


def test_removed_at_once():
    assert only(uniform(A).transition(uniform(B), gone={A})) == (B, B, False)


def test_taking_over_and_handing_back():
    taken = uniform(OWNER_PASS).transition(built(A, B))
    assert {slot[1] for slot in slots(taken)} == {OWNER_PASS}
    assert taken.tracked_slots() == SIZE
    assert OWNER_PASS in taken.owners()
    back = taken.settled().transition(uniform(OWNER_PASS))
    assert [slot[1] for slot in slots(back)] == current(built(A, B))
    assert {slot[0] for slot in slots(back)} == {OWNER_PASS}
    handed = back.transition(uniform(OWNER_PASS), gone={A, B})
    assert only(handed) == (OWNER_PASS, OWNER_PASS, False)


def test_last_backend_drains_and_a_new_one_comes():
    drained = uniform(A).transition(uniform(OWNER_NONE))
    assert only(drained) == (OWNER_NONE, A, True)
    assert only(drained.transition(uniform(B))) == (B, A, True)
    assert only(drained.transition(uniform(OWNER_NONE), gone={A})) == (OWNER_NONE, OWNER_NONE, False)


def test_nothing_is_owed_to_nobody():
    assert only(uniform(OWNER_NONE).transition(uniform(A))) == (A, A, False)
    drained = uniform(A).transition(uniform(OWNER_NONE))
    assert drained.owners() == {A}
    assert drained.transition(uniform(B)).settled(frozenset({7})).owners() == {A, B}
    half = struct.pack("=IIII", OWNER_NONE, OWNER_NONE, A, A) * 510 + struct.pack("=II", A, A)
    assert SlotTable.from_slots(half).owners() == {A}


def test_more_owners_than_a_slot_remembers():
    """Forgetting is safe: the slot stays tracked, whoever goes, until it is settled."""
    table = uniform(A)
    for owner in range(3, 12):
        table = table.transition(uniform(owner))
    table = table.transition(uniform(A), gone=set(range(3, 12)))
    assert only(table) == (A, A, True)
    assert only(table.settled()) == (A, A, False)


def test_exactly_as_many_as_a_slot_remembers():
    table = uniform(A)
    for owner in (B, C, D, A):
        table = table.transition(uniform(owner))
    assert table.owners() == {A, B, C, D}
    assert only(table.transition(uniform(A), gone={B, C, D})) == (A, A, False)


def test_settled_keeps_the_slots_with_live_flows():
    table = built(A, B, C).transition(built(A, B))
    moving = [i for i, slot in enumerate(slots(table)) if slot[2]]
    kept = frozenset(moving[:3])
    after = table.settled(kept)
    assert [i for i, slot in enumerate(slots(after)) if slot[2]] == sorted(kept)
    assert after.tracked
    assert current(after) == current(table)
    assert after.transition(built(A, B), gone={C}).tracked_slots() == 0
    assert not table.settled(frozenset(range(SIZE)) - frozenset(moving)).tracked


def test_a_settled_table_can_change_again():
    table = uniform(A).transition(uniform(B)).settled().transition(uniform(C))
    assert only(table) == (C, B, True)


def test_tables_are_never_changed():
    old, new = built(A, B), built(B, C)
    bytes_before = old.to_bytes(), new.to_bytes()
    moved = old.transition(new)
    moved_before = moved.to_bytes()
    moved.transition(old, gone={C})
    moved.settled()
    assert (old.to_bytes(), new.to_bytes()) == bytes_before
    assert moved.to_bytes() == moved_before


def test_read_back_from_a_map():
    table = built(A, B, C).transition(built(A, B))
    again = SlotTable.from_slots(table.to_bytes())
    assert again == table
    assert again.tracked_slots() == table.tracked_slots()
    after = again.transition(built(A, B), gone={C})
    assert after.tracked_slots() == table.tracked_slots(), "who was noted is not in the map: stay careful"
    assert not again.settled().tracked
    assert again.owners() == {A, B, C}


def test_read_back_there_and_back():
    table = uniform(A).transition(uniform(B)).transition(uniform(A))
    again = SlotTable.from_slots(table.to_bytes())
    assert only(again) == (A, A, True)
    assert only(again.transition(uniform(A))) == (A, A, True)


def test_bytes_are_the_abi():
    table = uniform(A).transition(uniform(B))
    assert struct.unpack_from("=II", table.to_bytes()) == (B, A | SLOT_TRACKED)
    assert len(table.to_bytes()) == 8 * SIZE


@pytest.mark.parametrize(("small", "large"), [(1021, 4093), (4093, 16381)])
def test_another_size(small, large):
    old, new = built(A, B, C, size=small), built(A, B, C, size=large)
    for before, after in ((old, new), (new, old)):
        table = before.transition(after)
        oracle = selection.transition(selection.fresh(current(before)), current(after))
        assert slots(table) == oracle_slots(oracle)
        assert current(table) == current(after)
