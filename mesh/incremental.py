# SPDX-License-Identifier: Apache-2.0
"""Derived values that are kept while their input stays the same.

The control plane works on whole inventories, and from one to the next nearly nothing changes. What is derived from
them is therefore kept, and an unchanged input gives the very same object again: later steps compare by identity first,
so that a round costs what has changed. A cache never changes what is derived. No class here is safe for two threads at
once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")

_Same = Callable[[_Given, _Given], bool]


def same_objects(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    """Whether two tuples hold the very same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


class Latest(Generic[_Given, _Made]):
    """One derived value.

    Args:
        same: whether two inputs give the same value; `operator.eq` or `operator.is_` mostly.
    """

    __slots__ = ("_entry", "_same")

    def __init__(self, same: _Same[_Given] = operator.eq) -> None:
        self._same = same
        self._entry: tuple[_Given, _Made] | None = None

    def of(self, given: _Given, make: Callable[[_Given], _Made]) -> _Made:
        """The value of an input: what the last call returned if its input was the same, else what `make` returns.

        If `make` raises, the last value stays.
        """
        entry = self._entry
        if entry is None or not self._same(entry[0], given):
            self._entry = entry = given, make(given)
        return entry[1]


class KeyedCache(Generic[_Key, _Given, _Made]):
    """Derived values by key, in rounds.

    Args:
        same: whether two inputs of one key give the same value; the same object always does.
    """

    __slots__ = ("_held", "_made", "_same")

    def __init__(self, same: _Same[_Given] = operator.eq) -> None:
        self._same = same
        self._held: dict[_Key, tuple[_Given, _Made]] = {}
        self._made: dict[_Key, _Made] = {}

    def __len__(self) -> int:
        return len(self._held)

    def update(
        self,
        inputs: Iterable[tuple[_Key, _Given]],
        make: Callable[[_Given, tuple[_Given, _Made] | None], _Made],
    ) -> dict[_Key, _Made]:
        """A whole round: keys that are not among `inputs` are dropped.

        Args:
            inputs: (key, input) of every value, keys unique.
            make: derives the value of an input. It also gets the key's last input and value, if there are any, so that
                it can keep parts of them.

        Returns:
            The values in the order of `inputs`. It is the very same dict if nothing has changed, and must not be
            changed by the caller.

        If `make` raises, the cache stays as it was.
        """
        held, same = self._held, self._same
        if not held:  # nothing to compare with, as in a daemon's first round
            self._held = {key: (given, make(given, None)) for key, given in inputs}
            if self._held:
                self._made = {key: made for key, (_, made) in self._held.items()}
            return self._made
        fresh: dict[_Key, tuple[_Given, _Made]] = {}
        changed: list[_Key] = []
        for key, given in inputs:
            known = held.get(key)
            if known is None or not (known[0] is given or same(known[0], given)):
                known = given, make(given, known)
                changed.append(key)
            fresh[key] = known
        if list(fresh) != list(held):
            self._held, self._made = fresh, {key: made for key, (_, made) in fresh.items()}
        elif changed:
            self._held, self._made = fresh, self._made | {key: fresh[key][1] for key in changed}
        return self._made

    def amend(
        self,
        inputs: Iterable[tuple[_Key, _Given]],
        gone: Iterable[_Key],
        make: Callable[[_Given, tuple[_Given, _Made] | None], _Made],
    ) -> dict[_Key, _Made]:
        """A round that tells of some keys only: those `gone` are dropped, all others stay. Else as `update`."""
        held, same = self._held, self._same
        dropped = held.keys() & set(gone)
        fresh: dict[_Key, tuple[_Given, _Made]] = {}
        for key, given in inputs:
            known = None if key in dropped else held.get(key)
            if known is None or not (known[0] is given or same(known[0], given)):
                fresh[key] = given, make(given, known)
        if dropped or fresh:
            self._made = dict(self._made)
            for key in dropped:
                del held[key], self._made[key]
            held.update(fresh)
            self._made.update((key, made) for key, (_, made) in fresh.items())
        return self._made
