# SPDX-License-Identifier: Apache-2.0
"""Allocates slot tables in arenas. Plain stores write a range; it is reused once no program reads it."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh._abi import ARENA_SLOTS, MAX_ARENAS, SLOT
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.codec import Table
from mesh.errors import BpfError, DatapathError

GRACE: Final = 1.0  # seconds; programs run for microseconds: none reads a range this long after its replacement


class Ranges:
    """Free ranges of one arena, in slots. Pure."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, length), sorted, never adjacent
        self.free = size

    def take(self, length: int) -> int | None:
        """Take a free range of `length`. Returns its start; None: there is none."""
        for i, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(start + length, room - length)] if room > length else []
                self.free -= length
                return start
        return None

    def claim(self, start: int, length: int) -> bool:
        """Take exactly this range. Returns whether it was free."""
        i = bisect.bisect_right(self._free, (start, ARENA_SLOTS)) - 1
        if i < 0:
            return False
        first, room = self._free[i]
        if start + length > first + room:
            return False
        rest = [(first, start - first), (start + length, first + room - start - length)]
        self._free[i : i + 1] = [r for r in rest if r[1]]
        self.free -= length
        return True

    def give(self, start: int, length: int) -> None:
        """Free a range."""
        self.free += length
        i = bisect.bisect_left(self._free, (start, 0))
        if i < len(self._free) and self._free[i][0] == start + length:
            length += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == start:
            start, before = self._free.pop(i - 1)
            length += before
            i -= 1
        self._free.insert(i, (start, length))


@dataclass(slots=True)
class Arena:
    """One memory-mapped array of ARENA_SLOTS slots."""

    map: _bpf.Map
    slots: _bpf.Mapping
    ranges: Ranges = field(default_factory=lambda: Ranges(ARENA_SLOTS))


class Arenas:
    """All arenas of one pin directory."""

    def __init__(self, outer: _bpf.Map, directory: Path) -> None:
        self._outer = outer
        self._directory = directory
        self._arenas: list[Arena] = []
        self._freed: list[tuple[float, Table]] = []
        while (pin := self._pin(len(self._arenas))).exists():
            found = _bpf.Map.open(str(pin))
            self._arenas.append(Arena(found, _bpf.Mapping(found)))

    def _pin(self, index: int) -> Path:
        return self._directory / f"arena_{index}"

    def pins(self) -> dict[Path, _bpf.Map]:
        """All arenas' maps by their pins."""
        return {self._pin(index): arena.map for index, arena in enumerate(self._arenas)}

    def __len__(self) -> int:
        return len(self._arenas)

    def claim(self, table: Table) -> bool:
        """Take the range of a table that the maps already use. Returns whether that range exists and was free."""
        return table.arena < len(self._arenas) and self._arenas[table.arena].ranges.claim(table.offset, table.size)

    def publish(self, slots: bytes) -> Table:
        """Write a table's slots into a free range, to which nothing refers yet."""
        size = len(slots) // SLOT.size
        self._reclaim()
        table = self._take(size) or self._take(size, first=self._grow())
        if table is None:
            raise DatapathError(f"a table of {size} slots does not fit in an arena")
        self._arenas[table.arena].slots.write(table.offset * SLOT.size, slots)
        return table

    def _take(self, size: int, first: int = 0) -> Table | None:
        for index in range(first, len(self._arenas)):
            ranges = self._arenas[index].ranges
            if ranges.free >= size and (offset := ranges.take(size)) is not None:
                return Table(index, offset, size)
        return None

    def read(self, table: Table) -> bytes:
        """The slots of a table."""
        return self._arenas[table.arena].slots.read(table.offset * SLOT.size, table.size * SLOT.size)

    def retire(self, table: Table) -> None:
        """Nothing refers to the table any more: free its range once no running program can read it."""
        self._freed.append((time.monotonic() + GRACE, table))

    def _reclaim(self) -> None:
        now = time.monotonic()
        while self._freed and self._freed[0][0] <= now:
            table = self._freed.pop(0)[1]
            self._arenas[table.arena].ranges.give(table.offset, table.size)

    def reserve(self, sizes: Iterable[int]) -> None:
        """Make room for tables of these sizes at the cost of one kernel wait for all of them."""
        self._reclaim()
        short = sum(sizes) - sum(arena.ranges.free for arena in self._arenas)
        count = min(-(-short // ARENA_SLOTS), MAX_ARENAS - len(self._arenas))
        if count > 0:
            self._grow(count)

    def _grow(self, count: int = 1) -> int:
        """Create more arenas. Returns the index of the first. The kernel waits for all CPUs once per call."""
        first = len(self._arenas)
        if first + count > MAX_ARENAS:
            raise DatapathError(
                "no room for further slot tables",
                where="kernel engine",
                remedy="choose smaller mesh.table-size labels",
            )
        indexes = range(first, first + count)
        made = [_bpf.Map.create(_bpf.ARRAY, "mesh_arena", 4, SLOT.size, ARENA_SLOTS, _bpf.MMAPABLE) for _ in indexes]
        for index in indexes:
            self._pin(index).unlink(missing_ok=True)
        keys = [codec.pack_u32(index) for index in indexes]
        values = [codec.pack_u32(arena.fileno()) for arena in made]
        try:
            self._outer.update_batch(b"".join(keys), b"".join(values))
        except BpfError:  # before Linux 5.19 there are no batches of maps
            for key, value in zip(keys, values, strict=True):
                self._outer.update(key, value)
        for index, arena in zip(indexes, made, strict=True):
            arena.pin(str(self._pin(index)))
            self._arenas.append(Arena(arena, _bpf.Mapping(arena)))
        return first
