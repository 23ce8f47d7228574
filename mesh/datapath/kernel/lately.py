# SPDX-License-Identifier: Apache-2.0
"""What the programs' counters say of the last minute: for problems that are named while they last. Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

LATELY: Final = 60.0  # seconds since a counter has grown for which that is named

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Growth:
    """A counter that is looked at now and then.

    Attributes:
        count: in all.
        before: when it began to grow, this time.
        since: when it was last seen to grow, monotonic.
    """

    count: int
    before: int
    since: float = -math.inf

    def grown(self, count: int, now: float) -> _Growth:
        if count == self.count:
            return self
        return _Growth(count, self.before if now - self.since < LATELY else self.count, now)


class Lately(Generic[_Key]):
    """Counters that grow lately. Not thread-safe.

    Args:
        few: counts that are not named.
        known: what they were before this process, which is not of now.
    """

    def __init__(self, few: int, known: Mapping[_Key, int] | None = None) -> None:
        self._few = few
        self._seen = {key: _Growth(count, count) for key, count in (known or {}).items()}

    def look(self, counts: Mapping[_Key, int], now: float) -> Iterator[tuple[_Key, int, int]]:
        """Those that have grown by more than a few: key, count in all, and since they have begun to grow.

        Args:
            counts: all of them; one that is not among them is forgotten, and begins at 0 when it comes back.
        """
        self._seen = {key: self._seen.get(key, _Growth(0, 0)).grown(count, now) for key, count in counts.items()}
        for key, seen in self._seen.items():
            if seen.count - seen.before >= self._few and now - seen.since < LATELY:
                yield key, seen.count, seen.count - seen.before
