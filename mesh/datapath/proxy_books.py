# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's books: what is kept of each frontend and backend, and what it says in stats and signals."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mesh._fastpath import Engine, Front, Pair
from mesh.datapath.base import BackendKey, Counters, Failure, FrontendEntry, Signal
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol

if TYPE_CHECKING:
    from mesh._fastpath import Counts

CAUSES: Final = tuple(Failure)  # the engine's order
KEEP_COUNTERS: Final = 60.0  # seconds for which the counters of what is gone can still be read
SUSPECT: Final = (Failure.REFUSED, Failure.TIMEOUT, Failure.UNREACHABLE)  # failures that speak against a backend
ZERO: Final[Counts] = (0, 0, 0, 0, 0, (0,) * len(CAUSES), 0, 0, 0, 0, (0,) * 15, 0)


def sixteen(address: Address) -> bytes:
    """An address as the engine has it: 16 bytes, IPv4 as IPv4-mapped IPv6."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


@dataclass(slots=True)
class PairRecord:
    """What is kept of a frontend's backend. `told` is what `signals` has reported: good ones, bad ones by cause."""

    pair: Pair
    told: tuple[int, ...] = (0, 0, 0, 0)
    idle_since: float | None = None


@dataclass(slots=True)
class FrontRecord:
    """What is kept of a frontend; `entry` is None once it was dropped, until its connections have ended."""

    front: Front
    entry: FrontendEntry | None = None
    pairs: dict[BackendKey, PairRecord] = field(default_factory=dict)
    retired: Counts = ZERO  # counters of backends that are gone
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


def counters(counts: Counts, failed: tuple[int, ...]) -> Counters:
    _, _, opened, closed, retried, _, into, out, packets_in, packets_out, connect, spent = counts
    return Counters(
        opened=opened,
        closed=closed,
        active=opened - closed,
        retried=retried,
        failed={cause: n for cause, n in zip(CAUSES, failed, strict=True) if n},
        bytes_in=into,
        bytes_out=out,
        packets_in=packets_in,
        packets_out=packets_out,
        connect_seconds=connect,
        connect_seconds_sum=spent / 1e9,
    )


class Books:
    """Records of all frontends. Changed from one thread, read from any; `lock` is never held while waiting."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.records: dict[Frontend, FrontRecord] = {}

    def record(self, frontend: Frontend, engine: Engine) -> FrontRecord:
        """The record of a frontend, made where it is new."""
        if frontend not in self.records:
            made = FrontRecord(engine.front(sixteen(frontend.address), frontend.port, frontend.address == ANY_ADDRESS))
            with self.lock:
                self.records[frontend] = made
        return self.records[frontend]

    def pair(self, record: FrontRecord, key: BackendKey, engine: Engine) -> Pair:
        """The counters of a backend of a frontend, made where they are new."""
        if key not in record.pairs:
            made = PairRecord(engine.pair(record.front))
            with self.lock:
                record.pairs[key] = made
        return record.pairs[key].pair

    def counters(self) -> tuple[dict[Frontend, Counters], dict[tuple[Frontend, BackendKey], Counters]]:
        """All counters, by frontend and by backend of a frontend.

        A frontend's `failed` counts what its clients saw, a backend's every attempt.
        """
        with self.lock:
            records = [(f, r.front, list(r.pairs.items()), r.retired) for f, r in self.records.items()]
        frontends: dict[Frontend, Counters] = {}
        backends: dict[tuple[Frontend, BackendKey], Counters] = {}
        for frontend, front, pairs, retired in records:
            total = retired
            for key, pair in pairs:
                counts = pair.pair.read()
                total = add(total, counts)
                backends[frontend, key] = counters(counts, counts[5])
            frontends[frontend] = counters(total, front.read()[5])
        return frontends, backends

    def signals(self) -> Sequence[Signal]:
        """What traffic told since the last call."""
        with self.lock:
            pairs = [(f, k, p) for f, r in self.records.items() for k, p in r.pairs.items()]
        good: dict[str, int] = {}
        bad: dict[tuple[str, Failure], int] = {}
        for frontend, key, record in pairs:
            counts = record.pair.read()
            # A UDP session says nothing by itself; an answer does.
            seen = (
                counts[2] if frontend.protocol is Protocol.TCP else counts[9],
                *(counts[5][CAUSES.index(cause)] for cause in SUSPECT),
            )
            if seen == record.told:
                continue
            fresh = [now - before for now, before in zip(seen, record.told, strict=True)]
            record.told = seen
            if fresh[0]:
                good[key.backend] = good.get(key.backend, 0) + fresh[0]
            for cause, n in zip(SUSPECT, fresh[1:], strict=True):
                if n:
                    bad[key.backend, cause] = bad.get((key.backend, cause), 0) + n
        return (
            *(Signal(backend, True, None, n) for backend, n in good.items()),
            *(Signal(backend, False, cause, n) for (backend, cause), n in bad.items()),
        )

    def reap(self, engine: Engine, live: Iterable[BackendKey], now: float) -> None:
        """Let go of counters that nothing changes any more and that could be read for a while."""
        known = set(live)
        for frontend, record in list(self.records.items()):
            for key, pair in list(record.pairs.items()):
                if record.entry is not None and key in known:
                    pair.idle_since = None
                    continue
                begun, ended, *_ = pair.pair.read()
                if begun != ended or pair.idle_since is None:
                    pair.idle_since = now if begun == ended else None
                elif now - pair.idle_since >= KEEP_COUNTERS and engine.release(pair.pair):
                    with self.lock:
                        del record.pairs[key]
                        record.retired = add(record.retired, pair.pair.read())
            if record.entry is None and not record.pairs and engine.release(record.front):
                with self.lock:
                    del self.records[frontend]
