# SPDX-License-Identifier: Apache-2.0
"""What operators drained on all nodes: a map that every agent holds, keeps across restarts, and merges with others'.

An agent tells managers in its reports, and managers tell all agents with the inventory. Of two words about one thing
the later holds, by a stamp that is later than that of the word before whatever the clocks say. What was undrained stays
in the map for a while: an agent that was away cannot bring the drain back.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from mesh.cluster.wire import Drain
from mesh.errors import MeshError

FILE: Final = "cluster-drained.json"
KEEP: Final = 30 * 86400.0  # seconds for which it is known that something was undrained
MOST: Final = 10_000  # things in the map; others are not taken
STAMP_MOST: Final = 1 << 62
KINDS: Final = ("backend", "node")

log = structlog.get_logger("mesh.cluster")


def digest(keys: Iterable[str]) -> str:
    """A short name of a set of drained things, equal where the sets are."""
    return hashlib.blake2b("\n".join(sorted(keys)).encode(), digest_size=8).hexdigest()


class Drains:
    """The map, and its file.

    Args:
        file: where it is kept.
        clock: seconds since the epoch.

    Attributes:
        entries: by "backend:ID" or "node:ID"; replaced whole.
        keys: those that are drained.
    """

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._error = ""
        self.entries: dict[str, Drain] = self._read()
        self.keys = _drained(self.entries)

    def set(self, key: str, drained: bool) -> None:
        """An operator's word.

        Raises:
            MeshError: the file cannot be written; nothing is changed.
        """
        known = self.entries.get(key)
        stamp = max(int(self._clock() * 1000), known.stamp + 1 if known else 0)
        entries = self._current({**self.entries, key: Drain(stamp, drained)})
        try:
            self._write(entries)
        except OSError as error:
            raise MeshError(f"cannot be written: {error.strerror}", where=str(self._file)) from error
        self._take(entries)

    def merge(self, others: Mapping[str, Drain]) -> bool:
        """Take what another agent knows; whether anything was new."""
        later = {key: said for key, said in others.items() if self._is_later(key, said)}
        if not later:
            return False
        entries = self._current({**self.entries, **later})
        if entries == self.entries:
            return False
        self._take(entries)
        try:
            self._write(entries)
            self._error = ""
        except OSError as error:
            if str(error) != self._error:
                self._error = str(error)
                log.error("what is drained cannot be written; a restart forgets it", error=str(error))
        return True

    def _is_later(self, key: str, said: Drain) -> bool:
        known = self.entries.get(key)
        if known is not None:
            return (said.stamp, said.drained) > (known.stamp, known.drained) and said.stamp < STAMP_MOST
        kind, _, identity = key.partition(":")
        fits = kind in KINDS and identity and len(key) < 200 and 0 <= said.stamp < STAMP_MOST
        return bool(fits) and len(self.entries) < MOST

    def _current(self, entries: dict[str, Drain]) -> dict[str, Drain]:
        """Without what was undrained long ago."""
        oldest = (self._clock() - KEEP) * 1000
        return {key: said for key, said in entries.items() if said.drained or said.stamp > oldest}

    def _take(self, entries: dict[str, Drain]) -> None:
        self.entries, self.keys = entries, _drained(entries)

    def _read(self) -> dict[str, Drain]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, Drain])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.error("what was drained cannot be read; managers tell it", file=str(self._file), error=str(error))
            return {}

    def _write(self, entries: dict[str, Drain]) -> None:
        new = self._file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(entries))
        new.replace(self._file)


def _drained(entries: Mapping[str, Drain]) -> frozenset[str]:
    return frozenset(key for key, said in entries.items() if said.drained)
