# SPDX-License-Identifier: Apache-2.0
"""Drains that all nodes share: the later word holds, whoever was away, whatever the clocks say."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.cluster.drains import KEEP, Drains, digest
from mesh.cluster.wire import Drain
from mesh.errors import MeshError

NODE, BACKEND = "node:n1", "backend:t1"


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_an_undrain_is_not_resurrected_by_an_agent_that_was_away(tmp_path: Path) -> None:
    clock = Clock()
    one, away = Drains(tmp_path / "one", clock=clock), Drains(tmp_path / "away", clock=clock)
    one.set(NODE, True)
    assert away.merge(one.entries) and away.keys == {NODE}
    clock.now += 10
    one.set(NODE, False)
    assert not one.merge(away.entries) and one.keys == frozenset()
    assert away.merge(one.entries) and away.keys == frozenset()
    assert not away.merge(one.entries)


def test_the_later_word_holds_although_the_clock_of_who_said_it_is_slow(tmp_path: Path) -> None:
    fast, slow = Drains(tmp_path / "fast", clock=Clock(2e6)), Drains(tmp_path / "slow", clock=Clock(1e6))
    fast.set(NODE, True)
    slow.merge(fast.entries)
    slow.set(NODE, False)
    assert fast.merge(slow.entries) and fast.keys == frozenset()


def test_it_survives_a_restart(tmp_path: Path) -> None:
    drains = Drains(tmp_path / "file")
    drains.set(NODE, True)
    drains.merge({BACKEND: Drain(5, True)})
    again = Drains(tmp_path / "file")
    assert (again.keys, again.entries) == ({NODE, BACKEND}, drains.entries)
    (tmp_path / "file").write_text("[]")
    assert Drains(tmp_path / "file").keys == frozenset()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    drains = Drains(tmp_path / "none" / "file")
    with pytest.raises(MeshError, match="cannot be written"):
        drains.set(NODE, True)
    assert not drains.keys
    assert drains.merge({NODE: Drain(5, True)}) and drains.keys == {NODE}  # others' word holds until a restart


def test_what_was_undrained_is_forgotten_some_day_and_stays_so(tmp_path: Path) -> None:
    clock = Clock(1e9)
    one, other = Drains(tmp_path / "one", clock=clock), Drains(tmp_path / "other", clock=clock)
    one.set(NODE, True)
    one.set(NODE, False)
    other.merge(one.entries)
    clock.now += KEEP + 1
    one.set(BACKEND, True)
    assert set(one.entries) == {BACKEND}
    assert not one.merge(other.entries) and set(one.entries) == {BACKEND}


@pytest.mark.parametrize(
    "entries",
    [{"service:s": Drain(5, True)}, {"node:": Drain(5, True)}, {"node:" + "x" * 300: Drain(5, True)},
     {NODE: Drain(1 << 62, True)}, {NODE: Drain(-1, True)}],
)  # fmt: skip
def test_what_makes_no_sense_is_not_taken(tmp_path: Path, entries: dict[str, Drain]) -> None:
    assert not Drains(tmp_path / "file").merge(entries)


words = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([NODE, BACKEND]), st.booleans()), max_size=8)


@given(words, st.permutations(list(itertools.permutations(range(3), 2))))
def test_all_come_to_the_same_in_whatever_order_they_hear(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[int, str, bool]], order: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("drains")
    agents = [Drains(directory / str(i), clock=Clock(1e6 + i)) for i in range(3)]
    for who, key, drained in said:
        agents[who].set(key, drained)
    for _ in range(2):
        for hears, tells in order:
            agents[hears].merge(agents[tells].entries)
    assert len({digest(agent.keys) for agent in agents}) == 1
    assert agents[0].entries == agents[1].entries == agents[2].entries


def test_a_digest_is_of_the_set() -> None:
    assert digest([NODE, BACKEND]) == digest([BACKEND, NODE]) != digest([NODE]) != digest([])
