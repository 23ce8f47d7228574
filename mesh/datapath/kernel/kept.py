# SPDX-License-Identifier: Apache-2.0
"""Keeps what the fallback proxy has counted when the proxy forgets it.

The proxy's counters are added to the programs' own. It forgets a row a minute after an address of the node or a backend
has gone, and all of them when the process ends; the programs' counters stay. A sum that falls looks like a counter that
has begun anew, so that Prometheus would take all that is left of it for new.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import msgspec

from mesh.datapath.base import BackendKey
from mesh.datapath.counters import COLUMNS, PLAIN, CounterTable, added
from mesh.model import Frontend, Protocol

KEPT: Final = "kernel-proxied.json"  # file in the state directory
BOOT: Final = Path("/proc/sys/kernel/random/boot_id")

_OPENED, _CLOSED = PLAIN.index("opened"), PLAIN.index("closed")
_Key = TypeVar("_Key", bound=Hashable)
_Row = tuple[int, ...]


def _ended(row: _Row) -> _Row:
    """A row of a proxy that is gone, with whose process its connections have ended."""
    return *row[:_CLOSED], row[_OPENED], *row[_CLOSED + 1 :]


def _plus(row: _Row, more: _Row | None) -> _Row:
    return row if more is None else tuple(map(int.__add__, row, more))


class _Rows(Generic[_Key]):
    """Rows of a table that changes, and what those that are gone had counted when they were last read."""

    def __init__(self) -> None:
        self.past: dict[_Key, _Row] = {}
        self._order: tuple[_Key, ...] = ()
        self._rows: dict[_Key, _Row] = {}

    def hold(self, table: CounterTable[_Key], alive: Callable[[_Key], bool]) -> CounterTable[_Key]:
        """`table` with what is gone. `alive`: whether a key's counters are still shown."""
        columns = (table.column(i) for i in range(len(COLUMNS)))
        rows = {key: row for key, row in zip(table.order, zip(*columns, strict=True), strict=True) if any(row)}
        if table.order is not self._order:
            for key, was in self._rows.items():
                now = rows.get(key)
                if now is None or now[_OPENED] < was[_OPENED]:
                    self.past[key] = _plus(was, self.past.get(key))
        self._order, self._rows = table.order, rows
        self.past = {key: row for key, row in self.past.items() if alive(key)}
        if not self.past:
            return table
        past = CounterTable(tuple(self.past), list(zip(*self.past.values(), strict=True)))
        return added(table, past, lambda key: key)

    def sums(self) -> dict[_Key, _Row]:
        """By key, what has been counted so far."""
        return {**self.past, **{key: _plus(row, self.past.get(key)) for key, row in self._rows.items()}}


def _frontend_out(frontend: Frontend) -> tuple[str, int, int]:
    return str(frontend.address), frontend.port, int(frontend.protocol)


def _frontend_in(row: list[Any]) -> Frontend:
    address, port, protocol = row
    return Frontend(ipaddress.ip_address(address), port, Protocol(protocol))


class Kept:
    """What earlier frontends, backends and processes of the fallback proxy have counted.

    It is in a file before it is shown, so that what follows a process never shows less. Where the file cannot be
    written, counters fall with the next start.

    Args:
        state_dir: where the file is.
        maps: names the programs' counters, to which the proxy's are added: with others the file means nothing.
    """

    def __init__(self, state_dir: Path, maps: int) -> None:
        self._path = state_dir / KEPT
        self._maps = f"{BOOT.read_text().strip()} {maps}"
        self._lock = threading.Lock()
        self._read = False
        self._frontends: _Rows[Frontend] = _Rows()
        self._backends: _Rows[tuple[Frontend, BackendKey]] = _Rows()
        self._written = b""

    def hold(
        self,
        frontends: Mapping[Frontend, Any],
        backends: Mapping[tuple[Frontend, BackendKey], Any],
        alive: Callable[[Frontend], bool],
    ) -> tuple[CounterTable[Frontend], CounterTable[tuple[Frontend, BackendKey]]]:
        """The fallback proxy's counters with what is kept.

        Args:
            alive: whether the programs' counters of what the user knows as this frontend are there.
        """
        with self._lock:
            if not self._read:  # not sooner: until now the process before this one has counted
                self._read = True
                self._load()
            found = self._frontends.hold(CounterTable.of(frontends), alive)
            pairs = self._backends.hold(CounterTable.of(backends), lambda pair: alive(pair[0]))
            self._save()
            return found, pairs

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            row = msgspec.json.decode(self._path.read_bytes())
            if row["maps"] != self._maps:
                return
            frontends = {_frontend_in(place): _ended(tuple(counts)) for place, counts in row["frontends"]}
            backends = {(_frontend_in(f), BackendKey(*b)): _ended(tuple(counts)) for f, b, counts in row["backends"]}
            if all(len(counts) == len(COLUMNS) for counts in (*frontends.values(), *backends.values())):
                self._frontends.past, self._backends.past = frontends, backends

    def _save(self) -> None:
        text = msgspec.json.encode(
            {
                "maps": self._maps,
                "frontends": [(_frontend_out(f), counts) for f, counts in self._frontends.sums().items()],
                "backends": [(_frontend_out(f), b, counts) for (f, b), counts in self._backends.sums().items()],
            }
        )
        if text == self._written:
            return
        self._written = text
        with contextlib.suppress(OSError):
            partial = self._path.with_suffix(".partial")
            partial.write_bytes(text)
            partial.replace(self._path)

    @staticmethod
    def remove(state_dir: Path) -> None:
        """Remove the file, with the programs' counters."""
        (state_dir / KEPT).unlink(missing_ok=True)
