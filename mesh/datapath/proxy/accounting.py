# SPDX-License-Identifier: Apache-2.0
"""Accounting of the proxy engine: records of each frontend and backend, and the stats and signals made of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mesh import netaddr
from mesh._fastpath import Engine, Front, Pair, read_columns
from mesh.datapath.base import BackendKey, FrontendEntry, Signal
from mesh.datapath.counters import COLUMNS, PLAIN, CounterTable, Failure
from mesh.datapath.proxy.rules import Prefix, prefixes
from mesh.model import ANY_ADDRESS, Frontend, Network, Protocol, ServiceOptions

if TYPE_CHECKING:
    from mesh._fastpath import Counts

CAUSES: Final = tuple(Failure)  # the engine's order
KEEP_COUNTERS: Final = 60.0  # seconds for which counters can still be read after their backend is gone
SUSPECT: Final = (Failure.REFUSED, Failure.TIMEOUT, Failure.UNREACHABLE)  # failures that count against a backend
SUSPECT_COLUMNS: Final = tuple(COLUMNS.index(cause) for cause in SUSPECT)
ZERO: Final[Counts] = (0, 0, 0, 0, 0, (0,) * len(CAUSES), 0, 0, 0, 0, (0,) * 15, 0)


@dataclass(slots=True)
class PairRecord:
    """A backend of a frontend. `told`: what `signals` has reported, successes and failures by cause."""

    pair: Pair
    told: tuple[int, ...] = (0, 0, 0, 0)
    idle_since: float | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """A frontend's mesh.allow and mesh.deny, and the prefixes that say the same: packed addresses and lengths."""

    allow: Sequence[Network]
    deny: Sequence[Network]
    admitted: list[Prefix]
    denied: list[Prefix]

    @classmethod
    def of(cls, options: ServiceOptions, known: Rules | None) -> Rules:
        """Args: known: those of before, which are returned if the lists are the same."""
        if known is not None and known.allow == options.allow and known.deny == options.deny:
            return known
        return cls(options.allow, options.deny, *prefixes(options.allow, options.deny))


@dataclass(slots=True, eq=False)
class FrontRecord:
    """A frontend. `entry` is None from the moment it is dropped until its connections have ended."""

    front: Front
    entry: FrontendEntry | None = None
    pairs: dict[BackendKey, PairRecord] = field(default_factory=dict)
    retired: Counts = ZERO  # counters of backends that are gone
    rules: Rules | None = None
    descriptors: tuple[int, ...] = ()  # listening sockets, while it listens


def add(a: Counts, b: Counts) -> Counts:
    """Element-wise sum."""
    return (
        *(x + y for x, y in zip(a[:5], b[:5], strict=True)),
        tuple(x + y for x, y in zip(a[5], b[5], strict=True)),
        *(x + y for x, y in zip(a[6:10], b[6:10], strict=True)),
        tuple(x + y for x, y in zip(a[10], b[10], strict=True)),
        a[11] + b[11],
    )  # type: ignore[return-value]


def _columns(raw: bytearray, rows: int) -> list[memoryview]:
    """The result of read_columns, column by column."""
    data = memoryview(raw).cast("Q")
    return [data[i * rows : (i + 1) * rows] for i in range(len(COLUMNS))]


def _row(counts: Counts) -> tuple[int, ...]:
    """Counters in the order of COLUMNS, without failures, which the frontend itself counts."""
    _, _, opened, closed, retried, _, into, out, packets_in, packets_out, connect, spent = counts
    return (opened, closed, retried, into, out, packets_in, packets_out, spent, *(0,) * len(CAUSES), *connect)


@dataclass(frozen=True, slots=True)
class _Order:
    """The rows to read; the same object until a record is added or removed."""

    frontends: tuple[Frontend, ...]
    fronts: tuple[Front, ...]
    keys: tuple[tuple[Frontend, BackendKey], ...]
    pairs: tuple[Pair, ...]
    records: tuple[PairRecord, ...]
    sizes: tuple[int, ...]  # pairs of each frontend
    retired: tuple[tuple[int, tuple[int, ...]], ...]  # by row of the frontend

    @classmethod
    def of(cls, records: Mapping[Frontend, FrontRecord]) -> _Order:
        return cls(
            tuple(records),
            tuple(record.front for record in records.values()),
            tuple((frontend, key) for frontend, record in records.items() for key in record.pairs),
            tuple(pair.pair for record in records.values() for pair in record.pairs.values()),
            tuple(pair for record in records.values() for pair in record.pairs.values()),
            tuple(len(record.pairs) for record in records.values()),
            tuple((i, _row(r.retired)) for i, r in enumerate(records.values()) if r.retired is not ZERO),
        )


class Accounting:
    """Records of all frontends. One thread changes them, any may read; nobody waits while holding `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.records: dict[Frontend, FrontRecord] = {}
        self._users: dict[BackendKey, list[FrontRecord]] = {}  # records that have a backend
        self._leaving: dict[int, tuple[FrontRecord, BackendKey]] = {}  # pairs out of use, by identity
        self._closing: dict[Frontend, FrontRecord] = {}  # dropped frontends that still have counters
        self._order: _Order | None = None  # None: records were added or removed
        self._told: tuple[_Order | None, bytearray] = (None, bytearray())  # what `signals` has seen

    def record(self, frontend: Frontend, engine: Engine) -> FrontRecord:
        """The record of a frontend, created if it is new."""
        if frontend not in self.records:
            made = FrontRecord(
                engine.front(netaddr.pack(frontend.address), frontend.port, frontend.address == ANY_ADDRESS)
            )
            with self.lock:
                self.records[frontend] = made
                self._order = None
        return self.records[frontend]

    def pair(self, record: FrontRecord, key: BackendKey, engine: Engine) -> Pair:
        """The counters of a backend of a frontend, created if they are new."""
        known = record.pairs.get(key)
        if known is None:
            known = PairRecord(engine.pair(record.front))
            self._users.setdefault(key, []).append(record)
            with self.lock:
                record.pairs[key] = known
                self._order = None
        elif self._leaving.pop(id(known), None) is not None:
            known.idle_since = None
        return known.pair

    def leave(self, key: BackendKey) -> None:
        """A backend is gone: release its counters once they no longer change."""
        for record in self._users.get(key, ()):
            self._leaving[id(record.pairs[key])] = record, key

    def close(self, frontend: Frontend, record: FrontRecord) -> None:
        """A frontend is gone: likewise its own counters and those of all its backends."""
        self._closing[frontend] = record
        for key, pair in record.pairs.items():
            self._leaving[id(pair)] = record, key

    def counters(self) -> tuple[CounterTable[Frontend], CounterTable[tuple[Frontend, BackendKey]]]:
        """All counters, by frontend and by backend of a frontend.

        `failed` of a frontend counts what its clients saw, that of a backend every attempt.
        """
        with self.lock:
            order = self._order = self._order or _Order.of(self.records)
        backends = _columns(read_columns(order.pairs), len(order.pairs))
        frontends = _columns(read_columns(order.pairs, order.sizes), len(order.fronts))
        seen = _columns(read_columns(order.fronts), len(order.fronts))
        failed = slice(len(PLAIN), len(PLAIN) + len(CAUSES))
        frontends[failed] = seen[failed]
        for row, retired in order.retired:
            for column, number in zip(frontends, retired, strict=True):
                column[row] += number
        return CounterTable(order.frontends, frontends), CounterTable(order.keys, backends)

    def signals(self) -> Sequence[Signal]:
        """What traffic showed since the last call."""
        with self.lock:
            order = self._order = self._order or _Order.of(self.records)
        raw = read_columns(order.pairs)
        if order is self._told[0] and raw == self._told[1]:
            return ()
        self._told = order, raw
        columns = _columns(raw, len(order.pairs))
        seen = zip(columns[0], columns[PLAIN.index("packets_out")], *(columns[i] for i in SUSPECT_COLUMNS), strict=True)
        good: dict[tuple[str, int], int] = {}  # by backend and port
        bad: dict[tuple[str, int, Failure], int] = {}
        for (frontend, key), record, (opened, answers, *failed) in zip(order.keys, order.records, seen, strict=True):
            # A UDP session alone proves nothing; an answer does.
            now = (opened if frontend.protocol is Protocol.TCP else answers, *failed)
            if now == record.told:
                continue
            fresh = [n - before for n, before in zip(now, record.told, strict=True)]
            record.told = now
            place = key.backend, key.port
            if fresh[0]:
                good[place] = good.get(place, 0) + fresh[0]
            for cause, n in zip(SUSPECT, fresh[1:], strict=True):
                if n:
                    bad[*place, cause] = bad.get((*place, cause), 0) + n
        return (
            *(Signal(backend, True, None, n, port) for (backend, port), n in good.items()),
            *(Signal(backend, False, cause, n, port) for (backend, port, cause), n in bad.items()),
        )

    def reap(self, engine: Engine, now: float) -> None:
        """Release counters that no longer change and that could be read long enough."""
        for number, (record, key) in list(self._leaving.items()):
            pair = record.pairs[key]
            begun, ended, *_ = pair.pair.read()
            if begun != ended or pair.idle_since is None:
                pair.idle_since = now if begun == ended else None
            elif now - pair.idle_since >= KEEP_COUNTERS and engine.release(pair.pair):
                del self._leaving[number]
                self._unlist(record, key)
                with self.lock:
                    del record.pairs[key]
                    record.retired = add(record.retired, pair.pair.read())
                    self._order = None
        for frontend, record in list(self._closing.items()):
            if record.entry is not None:
                del self._closing[frontend]
            elif not record.pairs and engine.release(record.front):
                del self._closing[frontend]
                with self.lock:
                    del self.records[frontend]
                    self._order = None

    def _unlist(self, record: FrontRecord, key: BackendKey) -> None:
        users = self._users[key]
        users.remove(record)
        if not users:
            del self._users[key]
