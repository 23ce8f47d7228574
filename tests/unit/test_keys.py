# SPDX-License-Identifier: Apache-2.0
"""The swarm's keys: what nodes agree on, in whatever order they hear; their file."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mesh.cluster.keys import RENEWED, VALID, Keys, current, merged, ring_of
from mesh.cluster.wire import Key

NAMES = [f"{n:08x}" for n in range(6)]


def key(name: str, active: bool) -> Key:
    return Key(1000 + int(name, 16), bytes([int(name, 16)]) * 16, active)


KEYS = st.dictionaries(st.sampled_from(NAMES), st.booleans(), max_size=5).map(
    lambda found: {name: key(name, active) for name, active in found.items()}
)


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(KEYS, min_size=1, max_size=3))
def test_whoever_hears_of_keys_in_whatever_order_comes_to_the_same(told: list[dict[str, Key]]) -> None:
    results = []
    for order in itertools.permutations(told):
        held: dict[str, Key] = {}
        for _ in range(2):  # what one forgot because of another it hears again
            for keys in order:
                held = merged(held, keys)
        results.append(held)
    assert all(list(result.items()) == list(results[0].items()) for result in results)


@given(KEYS)
def test_two_keys_are_valid_and_one_may_wait(keys: dict[str, Key]) -> None:
    held = current(keys)
    active = [each for each in held.values() if each.active]
    assert len(active) == min(VALID, sum(each.active for each in keys.values()))
    assert len(held) - len(active) <= 1
    made = [each.made for each in held.values()]
    assert made == sorted(made, reverse=True)
    assert current(held) == held


def test_a_key_is_held_before_it_is_used(tmp_path: Path) -> None:
    clock = Clock()
    keys = Keys(tmp_path / "keys.json", clock=clock)
    assert (keys.age(), keys.ring(), keys.waiting()) == (float("inf"), (), "")
    keys.make()
    first = keys.waiting()
    assert [number for number, _ in keys.ring()] == [int(first, 16)]
    keys.activate(first)
    assert keys.waiting() == ""
    clock.now += 100
    assert keys.age() == 100
    keys.make()
    second = keys.waiting()
    assert [number for number, _ in keys.ring()] == [int(first, 16), int(second, 16)]
    keys.activate(second)
    assert [number for number, _ in keys.ring()] == [int(second, 16), int(first, 16)]
    keys.make()
    keys.activate(keys.waiting())
    assert first not in keys.entries and second in keys.entries


def test_the_file_is_roots_alone_and_survives(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = Keys(file)
    keys.make()
    keys.remember(proving=frozenset({"n2", "n1"}), tunnel=frozenset({"n3"}))
    keys.remember(tunnel=frozenset({"n2"}))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Keys(file)
    assert (again.entries, again.proving, again.tunnel) == (keys.entries, {"n1", "n2"}, {"n2"})
    file.write_text("garbage")
    assert Keys(file).entries == {}


def test_what_is_no_key_is_not_taken() -> None:
    good = {"0000000a": Key(1, bytes(16))}
    assert merged(good, {"0000000b": Key(2, bytes(15)), "b": Key(2, bytes(16))}) == good
    changed = {"0000000a": Key(9, b"x" * 16, active=True)}
    assert merged(good, changed) == {"0000000a": Key(1, bytes(16), active=True)}


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "missing" / "keys.json")
    keys.make()
    assert keys.waiting()


def test_what_a_removed_node_knows_ends(tmp_path: Path) -> None:
    """By a new key at once, and by another one once that has been in use for a while."""
    clock = Clock()
    keys = Keys(tmp_path / "keys.json", clock=clock)
    assert keys.next_in(1000) <= 0  # the first
    for _ in range(2):
        keys.make()
        keys.activate(keys.waiting())
    known = set(keys.entries)
    clock.now += 10
    assert round(keys.next_in(1000)) == 990
    keys.node_removed()
    keys = Keys(tmp_path / "keys.json", clock=clock)  # also for the next process
    assert keys.next_in(1000) <= 0
    clock.now += 1
    keys.make()
    keys.activate(keys.waiting())
    assert (set(keys.entries) & known, keys.next_in(1000)) == (set(list(keys.entries)[1:]), RENEWED)
    clock.now += RENEWED
    assert keys.next_in(1000) <= 0
    keys.make()
    keys.activate(keys.waiting())
    assert not set(keys.entries) & known
    assert keys.next_in(1000) == 1000


def test_the_file_tells_other_processes_the_keys(tmp_path: Path) -> None:
    assert ring_of(tmp_path) == ()
    keys = Keys(tmp_path / "keys.json")
    for _ in range(2):
        keys.make()
        keys.activate(keys.waiting())
    assert ring_of(tmp_path) == keys.ring()
