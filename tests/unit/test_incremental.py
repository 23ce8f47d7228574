# SPDX-License-Identifier: Apache-2.0
"""A cache gives what would be derived anew, and the very same object while an input stays."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.incremental import KeyedCache, Latest, same_objects

rounds = st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3), max_size=4), min_size=1, max_size=5)


def doubled(number: int, before: tuple[int, list[int]] | None) -> list[int]:
    return [2 * number]


@given(rounds)
def test_a_round_gives_what_would_be_made_anew(inputs: list[dict[str, int]]) -> None:
    cache: KeyedCache[str, int, list[int]] = KeyedCache()
    was: dict[str, int] = {}
    before: dict[str, list[int]] = {}
    for now in inputs:
        found = cache.update(now.items(), doubled)
        assert found == {key: [2 * number] for key, number in now.items()} and list(found) == list(now)
        assert len(cache) == len(now)
        for key, number in now.items():
            assert (found[key] is before.get(key)) == (was.get(key) == number)
        assert (cache.update(now.items(), doubled) is found) and (found is before) <= (list(was) == list(now))
        was, before = now, found


@given(rounds)
def test_amending_leads_where_a_whole_round_does(inputs: list[dict[str, int]]) -> None:
    """Told of the differences only, the same objects stay."""
    cache: KeyedCache[str, int, list[int]] = KeyedCache()
    was: dict[str, int] = {}
    before = cache.update((), doubled)
    for now in inputs:
        changed = {key: number for key, number in now.items() if was.get(key) != number}
        found = cache.amend(changed.items(), was.keys() - now.keys(), doubled)
        assert found == {key: [2 * number] for key, number in now.items()}
        assert all(found[key] is before[key] for key in now if key not in changed)
        assert (found is before) == (was == now)
        assert cache.update([(key, now[key]) for key in found], doubled) is found
        was, before = now, found


def test_the_last_input_and_value_are_there_to_build_on() -> None:
    seen: list[tuple[int, str] | None] = []

    def make(number: int, before: tuple[int, str] | None) -> str:
        seen.append(before)
        return str(number)

    cache: KeyedCache[str, int, str] = KeyedCache()
    cache.update([("a", 1)], make)
    cache.update([("a", 2), ("b", 3)], make)
    cache.update([("b", 3)], make)
    cache.update([("a", 2), ("b", 3)], make)
    cache.amend([("b", 5), ("a", 2)], ["a"], make)
    assert seen == [None, (1, "1"), None, None, (3, "3"), None]


@pytest.mark.parametrize("call", [KeyedCache.update, lambda cache, inputs, make: cache.amend(inputs, ["b"], make)])
def test_an_input_that_cannot_be_used_leaves_everything_as_it_was(call: Callable[..., object]) -> None:
    cache: KeyedCache[str, int, list[int]] = KeyedCache()
    before = cache.update([("a", 1), ("b", 2)], doubled)

    def fails(number: int, known: object) -> list[int]:
        if number == 7:
            raise ValueError(number)
        return [0]

    with pytest.raises(ValueError, match="7"):
        call(cache, [("a", 5), ("c", 7)], fails)
    assert cache.update([("a", 1), ("b", 2)], fails) is before == {"a": [2], "b": [4]}


def test_identity_or_equality() -> None:
    one, other = (1, 2), tuple(range(1, 3))
    assert one is not other
    for same, kept in ((operator.eq, True), (operator.is_, False)):
        cache: KeyedCache[str, tuple[int, ...], list[int]] = KeyedCache(same)
        first = cache.update([("a", one)], lambda given, _: list(given))
        assert (cache.update([("a", other)], lambda given, _: list(given))["a"] is first["a"]) is kept
        latest: Latest[tuple[int, ...], list[int]] = Latest(same)
        made = latest.of(one, list)
        assert (latest.of(other, list) is made) is kept
        assert latest.of((3,), list) == [3]


def test_a_failed_derivation_leaves_the_latest_value() -> None:
    latest: Latest[str, int] = Latest()
    assert latest.of("7", int) == 7
    with pytest.raises(ValueError, match="x"):
        latest.of("x", int)
    assert latest.of("7", lambda text: pytest.fail("made anew")) == 7


def test_same_objects() -> None:
    thing, equal = [1], [1]
    assert same_objects((thing, 1), (thing, 1)) and same_objects((), ())
    assert not same_objects((thing,), (equal,)) and not same_objects((thing,), (thing, thing))
