# SPDX-License-Identifier: Apache-2.0
"""Probes the backends on this node: schedules the probes, limits their rate, and publishes the results."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh.datapath.base import Signal
from mesh.datapath.counters import Failure
from mesh.health.damping import Damping
from mesh.health.probe import PROXY_LOCAL, ProbeError, probe
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
    ProxyProtocol,
    Service,
    port_key,
)
from mesh.supervisor import recorded

AT_ONCE: Final = 256  # maximum number of concurrent probes
RATE: Final = 1000.0  # maximum number of probes per second; with more backends, intervals stretch
JITTER: Final = 0.2  # share of an interval by which each probe is moved at random
STARTING: Final = 0.1  # seconds between probes of a backend that is not listening yet, doubled up to its interval
RETRY: Final = 1.0  # seconds until verdicts that could not be told are told again
AGAIN: Final = 0.1  # minimum seconds between probes triggered by failed connections
GATHER: Final = 0.003  # seconds for which changed verdicts are batched into one view
PENDING: Final = 1.0  # seconds at most for which a port of a new backend is kept from flows until its first probe ends
SUSPECT: Final = frozenset({Failure.REFUSED, Failure.TIMEOUT, Failure.UNREACHABLE})


Key = tuple[str, int]  # a backend's id and a port of it


@dataclass(slots=True)
class _Watched:
    """A port of a backend under watch."""

    address: Address
    check: HealthCheck
    preface: bytes = b""
    damping: Damping = field(default_factory=Damping)
    due: float = 0.0
    last: float = float("-inf")  # when a probe last ended
    busy: bool = False
    early: int = 0  # probes made while starting
    new_until: float = float("-inf")  # until then it is pending, unless a probe has ended

    @property
    def place(self) -> tuple[Address, HealthCheck, bytes]:
        return self.address, self.check, self.preface

    def verdict(self, now: float) -> Health:
        pending = self.damping.verdict is Health.UNKNOWN and self.last == float("-inf") and now < self.new_until
        return Health.PENDING if pending else self.damping.verdict


class Monitor:
    """Probes local backends and tells their health.

    A backend is probed while it is local, wanted, ready, has an address and a TCP port, and its service does not
    say `mesh.health=off`. Each of its published TCP ports is probed by itself, since one may open later than another,
    or die alone. A backend is UP while one port is; ports that stand otherwise get verdicts of their own. UDP ports
    follow the backend. The first probe is due at once; until it ends, a port of a backend that is new is PENDING.

    Args:
        on_change: called on the event loop with the whole view, whenever a verdict or its reason has changed.
    """

    def __init__(self, on_change: Callable[[HealthView], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_change = on_change
        self._clock = clock
        self._watched: dict[Key, _Watched] = {}
        self._ports: dict[str, tuple[int, ...]] = {}  # by backend
        self._began = False  # the first inventory was seen: what comes later is new
        self._queue: list[tuple[float, Key]] = []
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
        kept: dict[Key, _Watched] = {}
        ports: dict[str, tuple[int, ...]] = {}
        for backend in inventory.backends:
            known = self._ports.get(backend.id, ())
            if not known and not backend.local:
                continue
            service = services.get(backend.service)
            found = _wanted(backend, service)
            if not found and (backend.intent is Intent.DRAINING or not backend.ready):
                found = known  # paused where it is not wanted; its verdicts stand
            if found:
                ports[backend.id] = found
            for port in found:
                self._take(kept, backend, service, port)
        late = self._began and self._watched.keys() != kept.keys()
        self._watched, self._ports = kept, ports
        self._began = self._began or bool(inventory.services or inventory.backends)
        self._publish()
        if late and any(watched.new_until > self._clock() for watched in kept.values()):
            asyncio.get_running_loop().call_later(PENDING, self._publish)

    def _take(self, kept: dict[Key, _Watched], backend: Backend, service: Service | None, port: int) -> None:
        """Watch one port of a backend, as it was watched before if it is the same."""
        key, now = (backend.id, port), self._clock()
        known = self._watched.get(key)
        wanted = service is not None and bool(_wanted(backend, service))
        if not wanted or service is None or backend.address is None:
            if known is not None:
                known.due = float("inf")
                kept[key] = known
            return
        announced = service.options.proxy_protocol is ProxyProtocol.V2
        made = _Watched(backend.address, service.options.health, PROXY_LOCAL if announced else b"")
        if known is None or known.place != made.place:
            if known is not None:
                made.damping, made.last = known.damping, known.last
            elif self._began and backend.id not in self._ports:
                made.new_until = now + PENDING
            kept[key] = made
            self._schedule(key, made, now)
            return
        kept[key] = known
        if known.due == float("inf"):
            self._schedule(key, known, now)

    def signals(self, signals: Iterable[Signal]) -> None:
        """Take signals from traffic: a failure to connect counts as a bad probe and triggers one at once."""
        for signal in signals:
            if signal.ok or signal.cause not in SUSPECT:
                continue
            known = self._ports.get(signal.backend, ())
            for port in (signal.port,) if signal.port in known else () if signal.port else known:
                self._suspect((signal.backend, port), signal.count)

    def _suspect(self, key: Key, count: int) -> None:
        watched = self._watched.get(key)
        if watched is None or watched.due == float("inf"):
            return
        watched.damping.suspected(watched.check, count)
        if not watched.busy:
            self._schedule(key, watched, min(watched.due, max(self._clock(), watched.last + AGAIN)))

    async def run(self) -> None:
        """Probe until cancelled."""
        for key, known in self._watched.items():  # a run that failed has forgotten those that were under way
            if known.due != float("inf"):
                self._schedule(key, known, self._clock())
        try:
            while True:
                await self._until_due()
                now = self._clock()
                while self._queue and self._queue[0][0] <= now:
                    due, key = heapq.heappop(self._queue)
                    watched = self._watched.get(key)
                    if watched is None or watched.busy or watched.due != due:
                        continue  # an entry that was superseded
                    watched.busy = True
                    await self._pace()
                    await self._free.acquire()
                    task = asyncio.create_task(self._probe(key, watched))
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

    def _schedule(self, key: Key, watched: _Watched, due: float) -> None:
        watched.due = due
        heapq.heappush(self._queue, (due, key))
        self._wake.set()

    async def _probe(self, key: Key, watched: _Watched) -> None:
        before = (watched.verdict(self._clock()), watched.damping.reason)
        try:
            with recorded("health probes"):
                await self._attempt(key[1], watched)
        finally:
            self._free.release()
            watched.busy = False
        if self._watched.get(key) is not watched:
            return
        if watched.due != float("inf"):
            self._schedule(key, watched, self._clock() + self._pause(watched))
        if (watched.damping.verdict, watched.damping.reason) != before and self._publishing is None:
            self._publishing = asyncio.get_running_loop().call_later(GATHER, self._publish)

    async def _attempt(self, port: int, watched: _Watched) -> None:
        try:
            await probe(watched.address, port, watched.check, watched.preface)
        except ProbeError as failure:
            watched.damping.failed(watched.check, str(failure), refused=failure.refused)
            self.counts["failed"] += 1
        else:
            watched.damping.succeeded(watched.check)
            self.counts["ok"] += 1
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
        verdicts: dict[str, Health] = {}
        reasons: dict[str, str] = {}
        now = self._clock()
        for backend, ports in self._ports.items():
            watched = {port: self._watched[backend, port] for port in ports if (backend, port) in self._watched}
            _tell(backend, watched, now, verdicts, reasons)
        view = HealthView(verdicts, reasons)
        if view != self.view:
            before, self.view = self.view, view
            try:
                self._on_change(view)
            except Exception:  # the loop takes it down
                self.view = before
                self._publishing = asyncio.get_running_loop().call_later(RETRY, self._publish)
                raise


def _tell(
    backend: str, ports: Mapping[int, _Watched], now: float, verdicts: dict[str, Health], reasons: dict[str, str]
) -> None:
    """Add the verdict over a backend, and over those of its ports that stand otherwise."""
    found = {port: watched.verdict(now) for port, watched in ports.items()}
    over = {Health.UP} & set(found.values()) or set(found.values())
    whole = over.pop() if len(over) == 1 else Health.UNKNOWN
    if whole not in (Health.UNKNOWN, Health.PENDING):  # who is new waits at the readiness gate
        verdicts[backend] = whole
    told = "; ".join(watched.damping.reason for watched in ports.values() if watched.damping.reason)
    if whole is not Health.UP and told:
        reasons[backend] = told
    for port, verdict in found.items():
        if verdict not in (whole, Health.UNKNOWN) and len(ports) > 1:
            verdicts[port_key(backend, port)] = verdict
            if reason := ports[port].damping.reason:
                reasons[port_key(backend, port)] = reason


def _wanted(backend: Backend, service: Service | None) -> tuple[int, ...]:
    """The ports of a backend that are to be probed."""
    if service is None or backend.address is None or not backend.local:
        return ()
    if backend.intent is not Intent.ACTIVE or not backend.ready or service.options.health.kind is ProbeKind.OFF:
        return ()
    tcp = (port for port in sorted(service.ports) if port.protocol is Protocol.TCP)
    return tuple(dict.fromkeys(backend.port or port.target for port in tcp))
