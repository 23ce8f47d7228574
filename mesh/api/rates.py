# SPDX-License-Identifier: Apache-2.0
"""How much each backend has to do now, by two looks at the engine's counters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mesh.api.view import Json
from mesh.datapath.base import Stats
from mesh.datapath.counters import Counters

MOST: Final = 10.0  # seconds between two looks
LEAST: Final = 0.1


def rates(before: Stats, now: Stats, seconds: float) -> Iterator[Json]:
    """A row for each backend of a frontend: frontend, backend, open (connections and sessions), new_per_second,
    failed_per_second. Pure.

    Args:
        before: what it was so many seconds ago; what is not in it has begun since.
    """
    none = Counters()
    for (frontend, key), counters in now.backends.items():
        was = before.backends.get((frontend, key), none)
        failed = sum(counters.failed.values()) - sum(was.failed.values())
        yield {
            "frontend": str(frontend),
            "backend": key.backend,
            "open": counters.active,
            "new_per_second": max(0, counters.opened - was.opened) / seconds,
            "failed_per_second": max(0, failed) / seconds,
        }
