# SPDX-License-Identifier: Apache-2.0
"""The proxy engine: `Datapath` over `mesh._fastpath`. It maps the contract's words to the engine's numbers and back."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mesh._fastpath import RETRIES_MOST, Engine, Front, Pair
from mesh._maglev import SlotTable, hash_client, hash_flow, slot_of
from mesh.config import Config
from mesh.datapath.base import (
    OWNER_NONE,
    Applied,
    BackendEntry,
    BackendKey,
    Choice,
    Counters,
    Failure,
    FrontendEntry,
    Plan,
    Signal,
    Stats,
)
from mesh.datapath.intercept import Interceptor, table_name
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Affinity, Flow, Frontend, Network, Protocol, ProxyProtocol

if TYPE_CHECKING:
    from mesh._fastpath import Counts

CAUSES: Final = tuple(Failure)  # the engine's order
RESERVED_DESCRIPTORS: Final = 256  # for everything but forwarding
KEEP_COUNTERS: Final = 60.0  # seconds for which the counters of what is gone can still be read
SUSPECT: Final = (Failure.REFUSED, Failure.TIMEOUT, Failure.UNREACHABLE)  # failures that speak against a backend
ZERO: Final[Counts] = (0, 0, 0, 0, 0, (0,) * len(CAUSES), 0, 0, 0, 0, (0,) * 15, 0)


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


def sixteen(address: Address) -> bytes:
    """An address as the engine has it: 16 bytes, IPv4 as IPv4-mapped IPv6."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def prefixes(networks: Sequence[Network]) -> list[tuple[bytes, int]]:
    return [(sixteen(n.network_address), n.prefixlen + (96 if n.version == 4 else 0)) for n in networks]


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


class ProxyDatapath:
    """Forwarding in user space.

    Take-over of the ports by a new process, without a refused connection: the old process sends the descriptors of
    `listeners()` over a Unix socket (SCM_RIGHTS); the new one is made with `inherited=` those, opens, applies its
    first plan (from then on both accept), and says so; the old one calls `stop_accepting()`, then `drain()`, then
    `close(release=False)`. UDP sessions begin anew in the new process, on the same backends.

    Args:
        config: threads, intercept, connect_timeout, retries, idle_timeout, udp_idle_timeout, udp_max_sessions,
            max_connections and state_dir are used.
        inherited: listening sockets of an earlier process by frontend, TCP and UDP; they become this engine's.
        docker_host: dockerd runs on this host (matters for `intercept = "auto"`).
    """

    name = "proxy"

    def __init__(
        self,
        config: Config,
        *,
        inherited: Mapping[Frontend, Sequence[int]] | None = None,
        docker_host: bool = False,
    ) -> None:
        self._config = config
        self._inherited = inherited
        self._docker_host = docker_host
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self._lock = threading.Lock()  # the records; never held while waiting
        self._records: dict[Frontend, FrontRecord] = {}
        self._backends: dict[int, BackendEntry] = {}
        self._applied = Applied()
        self._problems: dict[Frontend, str] = {}
        self._general: tuple[str, ...] = ()
        self._engine: Engine | None = None
        self._intercept: Interceptor | None = None
        self._first = True

    def open(self) -> Applied:
        """Start the threads. Nothing survives a proxy but its sockets, so what is held is always nothing."""
        descriptors = self._descriptor_limit() - RESERVED_DESCRIPTORS
        if descriptors < 64:
            raise DatapathError(
                f"only {descriptors + RESERVED_DESCRIPTORS} file descriptors are allowed",
                remedy="raise the limit (LimitNOFILE= in the unit, or ulimit -Hn) to 1024 at least",
            )
        pipes = min(512, descriptors // 32)
        possible = (descriptors - 2 * pipes) // 2
        wanted = self._config.max_connections or possible
        if wanted > possible:
            self._general = (
                f"max_connections: {wanted} connections need {2 * wanted + RESERVED_DESCRIPTORS} file descriptors; the "
                f"limit allows {possible} connections (raise LimitNOFILE=)",
            )
        self._limits = {"connections_limit": min(wanted, possible), "descriptors_limit": descriptors}
        self._intercept = Interceptor(
            self._config.intercept,
            docker_host=self._docker_host,
            threads=self._threads,
            table=table_name(self._config.state_dir),
            inherited=self._inherited,
        )
        try:
            self._engine = Engine(
                threads=self._threads,
                retries=min(self._config.retries, RETRIES_MOST),
                connect_timeout=self._config.connect_timeout,
                idle_timeout=self._config.idle_timeout,
                udp_idle_timeout=self._config.udp_idle_timeout,
                udp_sessions=min(self._config.udp_max_sessions, descriptors // 2),
                connections=min(wanted, possible),
                pipes=pipes,
            )
        except OSError as error:
            raise DatapathError(f"the forwarding threads cannot start: {error}") from None
        return self._applied

    @staticmethod
    def _descriptor_limit() -> int:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard if hard != resource.RLIM_INFINITY else 1 << 20

    def apply(self, plan: Plan) -> Applied:
        """See `Datapath.apply`. New sockets first, then redirection, then what goes."""
        engine, intercept = self._opened()
        try:
            for backend in plan.put_backends:
                engine.put_backend(backend.id, sixteen(backend.target.address), backend.target.port)
        except ValueError as error:
            raise DatapathError(f"the plan cannot be carried out: {error}") from None
        with self._lock:
            self._backends.update({b.id: b for b in (*plan.result.backends.values(), *plan.put_backends)})
        for entry in plan.put_frontends:
            try:
                self._put(entry)
                self._problems.pop(entry.state.frontend, None)
            except DatapathError as error:
                self._problems[entry.state.frontend] = str(error)
        for frontend in plan.drop_frontends:
            intercept.forget(frontend)
            self._problems.pop(frontend, None)
        intercept.commit()
        for frontend in plan.drop_frontends:
            self._drop(frontend)
        for backend in plan.drop_backends:
            if backend.id not in {b.id for b in plan.result.backends.values()}:
                engine.drop_backend(backend.id)
                with self._lock:
                    self._backends.pop(backend.id, None)
        engine.collect()
        if self._first and plan.result.frontends:
            self._first = False
            intercept.drop_inherited()
        self._applied = Applied(
            generation=plan.result.generation,
            frontends={f: e for f, e in plan.result.frontends.items() if f not in self._problems},
            backends=plan.result.backends,
        )
        self._reap(time.monotonic())
        return self._applied

    def _opened(self) -> tuple[Engine, Interceptor]:
        if self._engine is None or self._intercept is None:
            raise DatapathError("the proxy engine is not open")
        return self._engine, self._intercept

    def _put(self, entry: FrontendEntry) -> None:
        engine, intercept = self._opened()
        state = entry.state
        frontend = state.frontend
        record = self._records.get(frontend)
        if record is None:
            any_address = frontend.address == ANY_ADDRESS
            record = FrontRecord(engine.front(sixteen(frontend.address), frontend.port, any_address))
            with self._lock:
                self._records[frontend] = record
        owners: dict[int, Pair] = {}
        for owner in entry.backends:
            backend = self._backends.get(owner)
            if backend is None:
                continue
            if backend.key not in record.pairs:
                with self._lock:
                    record.pairs[backend.key] = PairRecord(engine.pair(record.front))
            record.pairs[backend.key].idle_since = None
            owners[owner] = record.pairs[backend.key].pair
        engine.put_route(
            record.front,
            entry.table,
            owners,
            by_client=state.options.affinity is Affinity.CLIENT_IP,
            announce=state.options.proxy_protocol is ProxyProtocol.V2 and frontend.protocol is Protocol.TCP,
            allow=prefixes(state.options.allow),
            deny=prefixes(state.options.deny),
        )
        record.entry = entry
        if not record.descriptors:
            opened = intercept.listen(frontend)
            six = opened.sockets[0].family == socket.AF_INET6
            record.descriptors = tuple(sock.detach() for sock in opened.sockets)
            for thread, fd in enumerate(record.descriptors):
                engine.listen(
                    record.front,
                    fd,
                    stream=frontend.protocol is Protocol.TCP,
                    six=six,
                    thread=thread,
                )

    def _drop(self, frontend: Frontend) -> None:
        engine, _ = self._opened()
        record = self._records.get(frontend)
        if record is None or record.entry is None:
            return
        engine.unlisten(record.front)
        record.descriptors = ()
        self._refuse(record)
        record.entry = None

    def _refuse(self, record: FrontRecord) -> None:
        """A route to nobody: what still tries to connect finds no further choice."""
        engine, _ = self._opened()
        table = SlotTable.uniform(1021, OWNER_NONE)
        engine.put_route(record.front, table, {}, by_client=False, announce=False, allow=[], deny=[])

    def _reap(self, now: float) -> None:
        """Let go of counters that nothing changes any more and that could be read for a while."""
        engine, _ = self._opened()
        live = set(self._applied.backends)
        for frontend, record in list(self._records.items()):
            for key, pair in list(record.pairs.items()):
                if record.entry is not None and key in live:
                    pair.idle_since = None
                    continue
                begun, ended, *_ = pair.pair.read()
                if begun != ended or pair.idle_since is None:
                    pair.idle_since = now if begun == ended else None
                elif now - pair.idle_since >= KEEP_COUNTERS and engine.release(pair.pair):
                    with self._lock:
                        del record.pairs[key]
                        record.retired = add(record.retired, pair.pair.read())
            if record.entry is None and not record.pairs and engine.release(record.front):
                with self._lock:
                    del self._records[frontend]

    def problems(self) -> Sequence[str]:
        notes = self._intercept.notes if self._intercept else {}
        return (*self._general, *self._problems.values(), *notes.values())

    def stats(self) -> Stats:
        """See `Datapath.stats`. A frontend's `failed` counts what its clients saw, a backend's every attempt."""
        if self._engine is None:
            return Stats()
        with self._lock:
            records = [(f, r, list(r.pairs.items()), r.retired) for f, r in self._records.items()]
        frontends: dict[Frontend, Counters] = {}
        backends: dict[tuple[Frontend, BackendKey], Counters] = {}
        for frontend, record, pairs, retired in records:
            total = retired
            for key, pair in pairs:
                counts = pair.pair.read()
                total = add(total, counts)
                backends[frontend, key] = counters(counts, counts[5])
            frontends[frontend] = counters(total, record.front.read()[5])
        totals = self._engine.totals()
        return Stats(
            frontends=frontends,
            backends=backends,
            gauges={
                "proxy_threads": self._threads,
                "proxy_connections": totals["connections"],
                "proxy_connecting": totals["connecting"],
                "proxy_connections_limit": self._limits["connections_limit"],
                "proxy_descriptors": 2 * (totals["connections"] + totals["pipes_open"])
                + totals["sessions"]
                + totals["listeners"],
                "proxy_descriptors_limit": self._limits["descriptors_limit"],
                "proxy_pipes": totals["pipes_open"],
                "proxy_pipes_used": totals["pipes_used"],
                "proxy_buffers_used": totals["buffers_used"],
                "proxy_accept_paused": totals["paused"],
                "udp_sessions": totals["sessions"],
            },
            totals={
                "proxy_accept_pauses": totals["accept_pauses"],
                "proxy_accept_errors": totals["accept_errors"],
                "proxy_pipe_failures": totals["pipe_failures"],
                "udp_evictions": totals["udp_evictions"],
                "udp_dropped": totals["udp_dropped"],
            },
        )

    def signals(self) -> Sequence[Signal]:
        with self._lock:
            pairs = [(f, k, p) for f, r in self._records.items() for k, p in r.pairs.items()]
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

    def lookup(self, flow: Flow) -> Choice | None:
        applied = self._applied
        called = Frontend(flow.destination, flow.destination_port, flow.protocol)
        entry = applied.frontends.get(called) or applied.frontends.get(
            Frontend(ANY_ADDRESS, flow.destination_port, flow.protocol)
        )
        if entry is None:
            return None
        source = sixteen(flow.source)
        if entry.state.options.affinity is Affinity.CLIENT_IP:
            value = hash_client(source)
        else:
            value = hash_flow(
                source, flow.source_port, sixteen(flow.destination), flow.destination_port, int(flow.protocol)
            )
        by_id = {b.id: b for b in applied.backends.values()}
        slot = slot_of(value, entry.table.size)
        owner, previous, _ = entry.table.slot(slot)
        further = entry.table.choices(value, min(self._config.retries, RETRIES_MOST) + 1)[1:]
        return Choice(
            frontend=entry.state.frontend,
            hash=value,
            slot=slot,
            owner=owner,
            previous=previous,
            backend=by_id.get(owner),
            next=tuple(by_id[o] for o in further if o in by_id),
        )

    def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """Descriptors of all listening sockets, to be sent to a process that takes over; they stay this engine's."""
        with self._lock:
            return {f: r.descriptors for f, r in self._records.items() if r.descriptors}

    def stop_accepting(self) -> None:
        """Another process has the sockets of `listeners()` now: close ours without touching what waits in them."""
        engine, intercept = self._opened()
        intercept.yield_table()
        engine.yield_sockets()
        with self._lock:
            for record in self._records.values():
                record.descriptors = ()

    def drain(self, seconds: float) -> int:
        """Take no new connections and wait for those there are. UDP is served on until `close`: it has no ends."""
        engine, intercept = self._opened()
        intercept.hand_back()
        for frontend, record in list(self._records.items()):
            if frontend.protocol is Protocol.TCP and record.descriptors:
                engine.unlisten(record.front)
                record.descriptors = ()
        deadline = time.monotonic() + seconds
        while (still := engine.totals()["connections"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return still

    def close(self, *, release: bool) -> None:
        """Reset what is still open and stop. A process that took over keeps the ports; otherwise they are free."""
        if self._intercept is not None:
            self._intercept.close()
        if self._engine is not None:
            self._engine.close()
