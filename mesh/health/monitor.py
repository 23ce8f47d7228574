# SPDX-License-Identifier: Apache-2.0
"""Probes the backends on this node: schedules the probes, limits their rate, and publishes the results."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from mesh.datapath.base import Signal
from mesh.datapath.counters import Failure
from mesh.health.damping import Damping
from mesh.health.probe import ProbeError, probe
from mesh.model import (
    Address,
    Backend,
    Health,
    HealthCheck,
    HealthView,
    Intent,
    Inventory,
    ProbeKind,
    Protocol,
    Service,
)
from mesh.supervisor import recorded

AT_ONCE: Final = 256  # maximum number of concurrent probes
RATE: Final = 1000.0  # maximum number of probes per second; with more backends, intervals stretch
JITTER: Final = 0.2  # share of an interval by which each probe is moved at random
STARTING: Final = 0.1  # seconds between probes of a backend that is not listening yet, doubled up to its interval
RETRY: Final = 1.0  # seconds until verdicts that could not be told are told again
AGAIN: Final = 0.1  # minimum seconds between probes triggered by failed connections
GATHER: Final = 0.003  # seconds for which changed verdicts are batched into one view
SUSPECT: Final = frozenset({Failure.REFUSED, Failure.TIMEOUT, Failure.UNREACHABLE})


@dataclass(slots=True)
class _Watched:
    """A backend under watch."""

    address: Address
    ports: tuple[int, ...]
    check: HealthCheck
    damping: Damping = field(default_factory=Damping)
    due: float = 0.0
    last: float = float("-inf")
    busy: bool = False
    early: int = 0  # probes made while starting

    @property
    def place(self) -> tuple[Address, tuple[int, ...], HealthCheck]:
        return self.address, self.ports, self.check


class Monitor:
    """Probes local backends and tells their health.

    A backend is probed while it is local, wanted, ready, has an address and a TCP port, and its service does not
    say `mesh.health=off`. It is good if one of its published TCP ports is: which of them a service needs is not known,
    and taking a backend out for a port that it never listens on would be worse. The first probe is due at once.

    Args:
        on_change: called on the event loop with the whole view, whenever a verdict or its reason has changed.
    """

    def __init__(self, on_change: Callable[[HealthView], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_change = on_change
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._queue: list[tuple[float, str]] = []
        self._wake = asyncio.Event()
        self._free = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing: asyncio.TimerHandle | None = None
        self._next = 0.0  # when the rate allows the next probe
        self.view = HealthView()
        self.counts = {"ok": 0, "failed": 0}

    def watch(self, inventory: Inventory) -> None:
        """Take a new inventory: start watching new backends, forget removed ones, keep the state of all others."""
        services = {service.id: service for service in inventory.services}
        kept: dict[str, _Watched] = {}
        for backend in inventory.backends:
            known = self._watched.get(backend.id)
            if known is None and not backend.local:
                continue
            wanted = _wanted(backend, services.get(backend.service))
            if wanted is not None and (known is None or known.place != wanted.place):
                wanted.damping = known.damping if known is not None else wanted.damping
                kept[backend.id] = wanted
                self._schedule(backend.id, wanted, self._clock())
            elif known is not None and (wanted is not None or backend.intent is Intent.DRAINING or not backend.ready):
                kept[backend.id] = known  # paused where it is not wanted; its verdict stands
                if wanted is not None and known.due == float("inf"):
                    self._schedule(backend.id, known, self._clock())
                elif wanted is None:
                    known.due = float("inf")
        self._watched = kept
        self._publish()

    def signals(self, signals: Iterable[Signal]) -> None:
        """Take signals from traffic: a failure to connect counts as a bad probe and triggers one at once."""
        for signal in signals:
            watched = self._watched.get(signal.backend)
            if watched is None or signal.ok or signal.cause not in SUSPECT or watched.due == float("inf"):
                continue
            watched.damping.suspected(watched.check, signal.count)
            if not watched.busy:
                self._schedule(signal.backend, watched, min(watched.due, max(self._clock(), watched.last + AGAIN)))

    async def run(self) -> None:
        """Probe until cancelled."""
        for backend, known in self._watched.items():  # a run that failed has forgotten those that were under way
            if known.due != float("inf"):
                self._schedule(backend, known, self._clock())
        try:
            while True:
                await self._until_due()
                now = self._clock()
                while self._queue and self._queue[0][0] <= now:
                    due, backend = heapq.heappop(self._queue)
                    watched = self._watched.get(backend)
                    if watched is None or watched.busy or watched.due != due:
                        continue  # an entry that was superseded
                    watched.busy = True
                    await self._pace()
                    await self._free.acquire()
                    task = asyncio.create_task(self._probe(backend, watched))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._publishing is not None:
                self._publishing.cancel()
                self._publishing = None

    async def _until_due(self) -> None:
        self._wake.clear()
        pause = self._queue[0][0] - self._clock() if self._queue else None
        if pause is None or pause > 0:
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _pace(self) -> None:
        now = self._clock()
        self._next = max(self._next, now - 0.05) + 1 / RATE
        if self._next > now:
            await asyncio.sleep(self._next - now)

    def _schedule(self, backend: str, watched: _Watched, due: float) -> None:
        watched.due = due
        heapq.heappush(self._queue, (due, backend))
        self._wake.set()

    async def _probe(self, backend: str, watched: _Watched) -> None:
        before = (watched.damping.verdict, watched.damping.reason)
        try:
            with recorded("health probes"):
                await self._attempt(watched)
        finally:
            self._free.release()
            watched.busy = False
        if self._watched.get(backend) is not watched:
            return
        if watched.due != float("inf"):
            self._schedule(backend, watched, self._clock() + self._pause(watched))
        if (watched.damping.verdict, watched.damping.reason) != before and self._publishing is None:
            self._publishing = asyncio.get_running_loop().call_later(GATHER, self._publish)

    async def _attempt(self, watched: _Watched) -> None:
        """Probe the ports in turn until one succeeds."""
        refused, reasons = True, []
        for port in watched.ports:
            try:
                await probe(watched.address, port, watched.check)
            except ProbeError as failure:
                refused = refused and failure.refused
                reasons.append(str(failure))
            else:
                watched.damping.succeeded(watched.check)
                self.counts["ok"] += 1
                break
        else:
            watched.damping.failed(watched.check, "; ".join(reasons), refused=refused)
            self.counts["failed"] += 1
        watched.last = self._clock()

    def _pause(self, watched: _Watched) -> float:
        interval = watched.check.interval
        if watched.damping.starting:
            watched.early += 1
            interval = min(interval, STARTING * 2 ** min(watched.early // 4, 8))
        return interval * (1 + random.uniform(-JITTER, JITTER))  # noqa: S311 -- spreads load, guards nothing

    def _publish(self) -> None:
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        verdicts = {b: w.damping.verdict for b, w in self._watched.items() if w.damping.verdict is not Health.UNKNOWN}
        reasons = {b: w.damping.reason for b, w in self._watched.items() if w.damping.reason}
        view = HealthView(verdicts, reasons)
        if view != self.view:
            before, self.view = self.view, view
            try:
                self._on_change(view)
            except Exception:  # the loop takes it down
                self.view = before
                self._publishing = asyncio.get_running_loop().call_later(RETRY, self._publish)
                raise


def _wanted(backend: Backend, service: Service | None) -> _Watched | None:
    """How a backend is to be probed; None: not at all."""
    if service is None or backend.address is None or not backend.local:
        return None
    if backend.intent is not Intent.ACTIVE or not backend.ready or service.options.health.kind is ProbeKind.OFF:
        return None
    tcp = (port for port in sorted(service.ports) if port.protocol is Protocol.TCP)
    ports = tuple(dict.fromkeys(backend.port or port.target for port in tcp))
    return _Watched(backend.address, ports, service.options.health) if ports else None
