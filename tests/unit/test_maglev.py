# SPDX-License-Identifier: Apache-2.0
"""Maglev tables: golden vectors, equality with the oracle, order independence, balance, disruption, weights."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh._abi import OWNER_FIRST, OWNER_NONE, OWNER_PASS, TABLE_SIZES
from mesh._maglev import SlotTable, backend_seed
from tests.oracle import selection

GOLDEN = json.loads((Path(__file__).parent / "golden_hash.json").read_text())

weights = st.lists(st.one_of(st.just(1), st.integers(0, 9), st.sampled_from([100, 65535])), max_size=12)


def backends(amounts, first=OWNER_FIRST, name="backend-"):
    return [(backend_seed(f"{name}{i}"), first + i, weight) for i, weight in enumerate(amounts)]


def owners_of(table):
    return [table.slot(i)[0] for i in range(table.size)]


@pytest.mark.parametrize("vector", GOLDEN["tables"], ids=lambda v: f"{v['size']}-{len(v['weights'])}")
def test_golden_table(vector):
    table = SlotTable.build(vector["size"], backends(vector["weights"]))
    names = {OWNER_FIRST + i: f"backend-{i}" for i in range(len(vector["weights"]))}
    assert [table.slot(i)[0] for i in range(32)] == vector["head"]
    assert table.digest(names) == vector["digest"]
    assert [table.choices(flow["hash"]) for flow in GOLDEN["flows"]] == vector["choices"]


@settings(deadline=None, max_examples=40)
@given(weights, st.sampled_from([1021, 1021, 4093]))
def test_table_equals_the_oracle(amounts, size):
    table = SlotTable.build(size, backends(amounts))
    assert owners_of(table) == selection.maglev(size, backends(amounts))
    assert not table.tracked
    assert all(table.slot(i) == (owner, owner, False) for i, owner in enumerate(owners_of(table)))


@settings(deadline=None, max_examples=40)
@given(weights, st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_choices_equal_the_oracle(amounts, value, limit):
    table = SlotTable.build(1021, backends(amounts))
    assert table.choices(value, limit) == selection.choices(owners_of(table), value, limit)


@settings(deadline=None, max_examples=40)
@given(weights.filter(any), st.integers(0, 2**32 - 1))
def test_choices_leave_out_nobody_who_has_a_slot(amounts, value):
    """However few its slots are, an owner is met: it may be the only one that answers."""
    table = SlotTable.build(1021, backends(amounts))
    assert sorted(table.choices(value, len(amounts))) == sorted(table.shares())


def test_choices_after_the_draws_are_spread():
    """Three owners of a slot each, and one of all others: each of the three is the second choice of many flows."""
    table = SlotTable.build(1021, backends([1, 1, 1, 1017]))
    seconds = Counter(table.choices(value << 16, 2)[1] for value in range(1 << 16))
    heavy = seconds.pop(OWNER_FIRST + 3, 0)
    assert heavy < (1 << 16) / 100
    assert len(seconds) == 3
    assert min(seconds.values()) > (1 << 16) / 5


@settings(deadline=None, max_examples=50)
@given(weights, st.randoms(use_true_random=False))
def test_order_in_which_backends_were_learned_does_not_matter(amounts, rng):
    entries = backends(amounts)
    shuffled = rng.sample(entries, len(entries))
    assert SlotTable.build(1021, iter(shuffled)) == SlotTable.build(1021, entries)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(8)))
def test_numbers_of_this_node_do_not_matter(numbers):
    """Two nodes number the same backends differently: every slot still belongs to the same identity."""
    mine = SlotTable.build(1021, [(backend_seed(f"b{i}"), 2 + i, 1 + i % 3) for i in range(8)])
    theirs = SlotTable.build(1021, [(backend_seed(f"b{i}"), 50 + numbers[i], 1 + i % 3) for i in range(8)])
    ours, others = {2 + i: f"b{i}" for i in range(8)}, {50 + numbers[i]: f"b{i}" for i in range(8)}
    assert [ours[o] for o in owners_of(mine)] == [others[o] for o in owners_of(theirs)]
    assert mine.digest(ours) == theirs.digest(others)
    assert mine.digest(ours) != mine.digest({**ours, 2: "another"})


def test_balance():
    shares = SlotTable.build(65537, backends([1] * 100)).shares()
    assert len(shares) == 100
    assert max(shares.values()) / (65537 / 100) <= 1.01


@pytest.mark.parametrize("victim", [0, 37, 99])
def test_disruption(victim):
    entries = backends([1] * 100)
    before = SlotTable.build(65537, entries)
    after = SlotTable.build(65537, [entry for entry in entries if entry[1] != OWNER_FIRST + victim])
    lost = {i for i, owner in enumerate(owners_of(before)) if owner == OWNER_FIRST + victim}
    moved = sum(
        a != b for i, (a, b) in enumerate(zip(owners_of(before), owners_of(after), strict=True)) if i not in lost
    )
    assert moved <= 0.007 * (65537 - len(lost))
    assert OWNER_FIRST + victim not in after.shares()


@pytest.mark.parametrize("amounts", [(1, 2, 3, 4), (10, 10, 1), (65535, 65535, 32768), (7,)])
def test_weights_are_shares(amounts):
    shares = SlotTable.build(65537, backends(amounts)).shares()
    for i, weight in enumerate(amounts):
        assert shares[OWNER_FIRST + i] == pytest.approx(65537 * weight / sum(amounts), rel=0.01)


@settings(deadline=None, max_examples=50)
@given(weights)
def test_weight_zero_never_gets_a_slot(amounts):
    shares = SlotTable.build(1021, backends(amounts)).shares()
    active = {OWNER_FIRST + i for i, weight in enumerate(amounts) if weight}
    assert set(shares) <= (active or {OWNER_NONE})
    assert sum(shares.values()) == 1021


def test_weight_zero_changes_nothing_for_the_others():
    entries = backends([1, 1, 0, 1])
    assert SlotTable.build(1021, entries) == SlotTable.build(1021, [e for e in entries if e[2]])


def test_no_backend():
    for table in (SlotTable.build(1021, []), SlotTable.build(1021, backends([0, 0]))):
        assert table.shares() == {OWNER_NONE: 1021}
        assert table.choices(5) == [OWNER_NONE]
        assert table.owners() == set()


@pytest.mark.parametrize("size", TABLE_SIZES)
def test_every_size_fills(size):
    shares = SlotTable.build(size, backends([1, 1, 2])).shares()
    assert sum(shares.values()) == size
    assert set(shares) == {2, 3, 4}


def test_as_many_backends_as_slots():
    assert set(SlotTable.build(1021, backends([1] * 1021)).shares().values()) == {1}
    with pytest.raises(ValueError, match=r"larger mesh\.table-size"):
        SlotTable.build(1021, backends([1] * 1022))


def test_a_few_heavy_backends_among_many_light_ones_do_not_take_long():
    """A weight of 65535 beside thousands of 1: rounds in which nobody's turn is due are not walked one by one."""
    amounts = [65535, *[1] * 4000]
    table = SlotTable.build(65537, backends(amounts))
    assert table.shares()[OWNER_FIRST] > 60000


@pytest.mark.parametrize(
    "entries",
    [
        [(b"short", 2, 1)],
        [(backend_seed("a"), 2, 1), (backend_seed("a"), 3, 1)],
        [(backend_seed("a"), OWNER_NONE, 1)],
        [(backend_seed("a"), OWNER_PASS, 1)],
        [(backend_seed("a"), 1 << 31, 1)],
        [(backend_seed("a"), 2, 65536)],
        [(backend_seed("a"), 2, -1)],
    ],
)
def test_bad_backends_are_refused(entries):
    with pytest.raises(ValueError, match=r"seed|owner"):
        SlotTable.build(1021, entries)


@pytest.mark.parametrize("size", [0, 1, 1020, 16382, 2**32 - 1])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="a table has one of"):
        SlotTable(size)


def test_slots_round_trip():
    table = SlotTable.build(1021, backends([1, 2, 3]))
    assert SlotTable.from_slots(table.to_bytes()) == table
    assert not SlotTable.from_slots(table.to_bytes()).tracked
    with pytest.raises(ValueError, match="slots"):
        SlotTable.from_slots(table.to_bytes()[:-8])
    with pytest.raises(ValueError, match="slots"):
        SlotTable.from_slots(table.to_bytes() + b"\0\0\0")


def test_slot_index_is_checked():
    with pytest.raises(IndexError):
        SlotTable.uniform(1021, OWNER_PASS).slot(1021)


def test_build_is_deterministic_over_many_random_sets():
    rng = random.Random(7)
    for _ in range(20):
        entries = backends([rng.choice([0, 1, 1, 1, 5]) for _ in range(rng.randrange(1, 60))], name=str(rng.random()))
        assert SlotTable.build(4093, entries) == SlotTable.build(4093, sorted(entries, key=lambda e: rng.random()))


@pytest.mark.parametrize("owners", [(1024, 2048, 3072, 4096), (2, 1026, 2**31 - 1), tuple(range(2, 3000, 7))])
def test_a_pass_over_a_table_keeps_apart_owners_of_any_number(owners):
    table = SlotTable.build(4093, [(backend_seed(f"b{owner}"), owner, 1) for owner in owners])
    current = [table.slot(i)[0] for i in range(table.size)]
    assert table.shares() == Counter(current)
    assert table.owners() == set(owners)
    names = {owner: f"b{owner}" for owner in owners[1:]}
    assert table.digest(names) == selection.digest(current, names)
