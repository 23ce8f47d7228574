# SPDX-License-Identifier: Apache-2.0
"""The proxy engine: `Datapath` over `mesh._fastpath`. It translates between the contract and the engine's numbers."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mesh import netaddr
from mesh._abi import OWNER_NONE, PASS_MARK, TABLE_SIZES
from mesh._fastpath import RETRIES_MOST, Engine
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import (
    Accepted,
    Applied,
    BackendEntry,
    Caller,
    Choice,
    FrontendEntry,
    Plan,
    Signal,
    Stats,
)
from mesh.datapath.lookup import lookup
from mesh.datapath.losses import Losses, Watch
from mesh.datapath.proof import Proof
from mesh.datapath.proxy.accounting import Accounting, FrontRecord, Rules
from mesh.datapath.proxy.listeners import Interceptor, Opened, closed
from mesh.datapath.proxy.nft import table_name
from mesh.datapath.proxy.peers import Peers, is_peers, tag_of
from mesh.datapath.proxy.rules import SourceRules, rules_of
from mesh.errors import DatapathError
from mesh.listener import MOST
from mesh.model import Affinity, EngineKind, Flow, Frontend, Protocol, ProxyProtocol

HUNG: Final = 5.0  # seconds without a turn after which a thread hangs


def reserved_descriptors(limit: int) -> int:
    """For everything but forwarding: the relay has half of them at most (mesh.listener), whoever calls it."""
    return max(256, min(limit // 4, 2 * MOST))


def local_ports() -> tuple[int, int]:
    """The range of source ports that the kernel chooses from."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return 32768, 60999
    return int(first), int(last)


class ProxyDatapath:
    """Forwarding in user space.

    A new process takes over the ports without a refused connection. The old process sends the descriptors of
    `listeners()` over a Unix socket (SCM_RIGHTS). The new one is made with `inherited=` those, opens, applies its first
    plan (from then on both accept), and reports that. The old one calls `stop_accepting()`, `drain()` and
    `close(release=False)`. UDP sessions start over in the new process, on the same backends.

    Args:
        config: threads, intercept, connect_timeout, retries, idle_timeout, udp_idle_timeout, udp_max_sessions,
            max_connections and state_dir are used.
        inherited: listening sockets of an earlier process by frontend, TCP and UDP, including those of the peer port;
            this engine then owns them.
        docker_host: dockerd runs on this host (matters for `intercept = "auto"`).
        guard: keep the containers of a Docker host from the ports by which nodes hand flows to each other; else
            something else does.
        losses: where it counts what somebody else removes of ours; None: its own.
    """

    name = EngineKind.PROXY

    def __init__(
        self,
        config: Config,
        *,
        inherited: Mapping[Frontend, Sequence[int]] | None = None,
        docker_host: bool = False,
        guard: bool = True,
        losses: Losses | None = None,
    ) -> None:
        self._config = config
        self._guards = guard and docker_host
        self._inherited = (
            {f: fds for f, fds in inherited.items() if not is_peers(f, config)} if inherited is not None else None
        )
        self._docker_host = docker_host
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self._accounting = Accounting()
        self._peers = Peers(config, self._threads, inherited)
        self._backends: dict[int, BackendEntry] = {}
        self._applied = Applied()
        self._problems: dict[Frontend, str] = {}
        self._general: tuple[str, ...] = ()
        self._engine: Engine | None = None
        self._intercept: Interceptor | None = None
        self._losses = losses or Losses()
        self._lock = threading.RLock()  # of the listening sockets
        self._watch: Watch | None = None
        self._first = True
        self._turned: list[tuple[int, float]] = []  # by thread: turns of its loop, and when they were last others
        self._stricter = False  # rules have changed that connections and sessions under way have not met yet

    def open(self) -> Applied:
        """Start the threads. Only sockets survive a proxy, so the result is always empty."""
        limit = self._descriptor_limit()
        reserved = reserved_descriptors(limit)
        descriptors = limit - reserved
        if descriptors < 64:
            raise DatapathError(
                f"only {limit} file descriptors are allowed",
                remedy="raise the limit (LimitNOFILE= in the unit, or ulimit -Hn) to 1024 at least",
            )
        pipes = min(512, descriptors // 32)
        possible = (descriptors - 2 * pipes) // 2
        wanted = self._config.max_connections or possible
        if wanted > possible:
            self._general = (
                f"max_connections: {wanted} connections need {2 * wanted + reserved} file descriptors; the "
                f"limit allows {possible} connections (raise LimitNOFILE=)",
            )
        self._limits = {"connections_limit": min(wanted, possible), "descriptors_limit": descriptors}
        self._intercept = Interceptor(
            self._config.intercept,
            docker_host=self._docker_host,
            threads=self._threads,
            table=table_name(self._config.state_dir),
            inherited=self._inherited,
            floating=self._config.floating,
            orphan_timeout=self._config.orphan_timeout,
            losses=self._losses,
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
                ports=local_ports(),
                mark=PASS_MARK,
            )
        except OSError as error:
            raise DatapathError(f"the forwarding threads cannot start: {error}") from None
        self._watch = Watch("mesh-sockets", self._look)
        return self._applied

    @staticmethod
    def _descriptor_limit() -> int:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard if hard != resource.RLIM_INFINITY else 1 << 20

    def apply(self, plan: Plan, rules: Mapping[int, SourceRules] | None = None) -> Applied:
        """See `Datapath.apply`. Order: new sockets, redirection, removals.

        Args:
            rules: source rules by owner, for flows that other nodes hand over; None: those of the plan's frontends.
        """
        with self._lock:
            return self._carry_out(plan, rules_of(plan.result.frontends.values()) if rules is None else rules)

    def _carry_out(self, plan: Plan, rules: Mapping[int, SourceRules]) -> Applied:
        engine, intercept = self._opened()
        try:
            for backend in plan.put_backends:
                self._put_backend(engine, backend)
        except ValueError as error:
            raise DatapathError(f"the plan cannot be carried out: {error}") from None
        with self._accounting.lock:
            self._backends.update({b.id: b for b in plan.put_backends})
        self._peers.apply(engine, plan.result.nodes or (), plan.put_backends, rules)
        passing = [entry.state.frontend for entry in plan.put_frontends if entry.state.passing]
        closing = [frontend for frontend in passing if not intercept.pause(frontend)]
        if passing:
            intercept.commit()  # before their routes say so
        self._put_frontends(engine, plan.put_frontends)
        wanted = plan.result.frontends
        gone = set(plan.drop_frontends)
        if self._problems:  # what could not be served was never held, so no plan drops it
            gone |= {f for f in self._problems if f not in wanted}
        for frontend in gone:
            intercept.forget(frontend)
        intercept.guard(
            plan.result.nodes or () if self._guards else (), self._config.tunnel_port, self._config.peer_port
        )
        intercept.commit()
        for frontend in closing:
            self._stop_listening(frontend)
        for frontend in gone:
            self._drop(frontend)
            self._problems.pop(frontend, None)
        for backend in plan.drop_backends:
            self._drop_backend(engine, backend)
        engine.collect()
        if self._first and wanted:
            self._first = False
            intercept.drop_inherited()
        self._applied = plan.result
        if self._problems:
            served = {f: e for f, e in wanted.items() if f not in self._problems}
            self._applied = dataclasses.replace(plan.result, frontends=served)
        self._accounting.reap(engine, time.monotonic())
        return self._applied

    def _put_frontends(self, engine: Engine, entries: Sequence[FrontendEntry]) -> None:
        for entry in entries:
            try:
                self._put(entry)
                self._problems.pop(entry.state.frontend, None)
            except DatapathError as error:
                self._problems[entry.state.frontend] = str(error)
        if self._stricter:
            engine.enforce()
            self._stricter = False

    def _drop_backend(self, engine: Engine, entry: BackendEntry) -> None:
        held = self._backends.get(entry.id)
        if held is None or held.key != entry.key:
            return  # another backend has its number by now
        engine.drop_backend(entry.id)
        self._peers.drop(entry.id)
        self._accounting.leave(entry.key)
        with self._accounting.lock:
            self._backends.pop(entry.id)

    def _put_backend(self, engine: Engine, entry: BackendEntry) -> None:
        target = entry.target
        if target.via is None:
            engine.put_backend(entry.id, netaddr.pack(target.address), target.port)
        else:
            engine.put_backend(entry.id, netaddr.pack(target.via), self._config.peer_port, tag_of(entry.key))

    def _opened(self) -> tuple[Engine, Interceptor]:
        if self._engine is None or self._intercept is None:
            raise DatapathError("the proxy engine is not open")
        return self._engine, self._intercept

    def _put(self, entry: FrontendEntry) -> None:
        engine, intercept = self._opened()
        state = entry.state
        frontend = state.frontend
        record = self._accounting.record(frontend, engine)
        known = (self._backends[owner] for owner in entry.backends if owner in self._backends)
        owners = {backend.id: self._accounting.pair(record, backend.key, engine) for backend in known}
        rules = Rules.of(state.options, record.rules)
        engine.put_route(
            record.front,
            entry.table,
            owners,
            by_client=state.options.affinity is Affinity.CLIENT_IP,
            announce=state.options.proxy_protocol is ProxyProtocol.V2 and frontend.protocol is Protocol.TCP,
            allow=rules.admitted,
            deny=rules.denied,
            passing=state.passing,
        )
        self._stricter = self._stricter or (record.rules is not None and record.rules is not rules)
        record.entry, record.rules = entry, rules
        if state.passing:
            return
        opened = intercept.listen(frontend)
        engine.put_aside(record.front, opened.redirected and frontend.protocol is Protocol.TCP)
        if not record.descriptors:
            self._listen(engine, frontend, record, opened)

    @staticmethod
    def _listen(engine: Engine, frontend: Frontend, record: FrontRecord, opened: Opened) -> None:
        six = opened.sockets[0].family == socket.AF_INET6
        record.descriptors = tuple(sock.detach() for sock in opened.sockets)
        for thread, fd in enumerate(record.descriptors):
            engine.listen(record.front, fd, stream=frontend.protocol is Protocol.TCP, six=six, thread=thread)

    def _look(self) -> None:
        """Open the listening sockets that somebody else has closed anew."""
        with self._lock:
            self._losses.check("sockets", self._lost, self._restore)

    def _lost(self) -> list[str]:
        own = [*self._closed(), *self._peers.lost()]
        return [f"listening socket of {frontend}" for frontend in own]

    def _closed(self) -> list[Frontend]:
        records = self._accounting.records
        return [f for f, record in records.items() if record.descriptors and closed(f, record.descriptors)]

    def _restore(self) -> None:
        engine, intercept = self._opened()
        for frontend in self._closed():
            record = self._accounting.records[frontend]
            opened = intercept.reopen(frontend)  # where that fails, the next look finds it closed again
            engine.unlisten(record.front)
            self._listen(engine, frontend, record, opened)
            engine.put_aside(record.front, opened.redirected and frontend.protocol is Protocol.TCP)
        intercept.commit()
        self._peers.restore(engine)

    def missing(self) -> Sequence[str]:
        """See Datapath.missing."""
        return self._losses.missing

    def _stop_listening(self, frontend: Frontend) -> None:
        """Leave connections that start to whoever else has the port; those there are go on."""
        engine, _ = self._opened()
        record = self._accounting.records.get(frontend)
        if record is not None and record.descriptors:
            engine.unlisten(record.front)
            record.descriptors = ()

    def _drop(self, frontend: Frontend) -> None:
        engine, _ = self._opened()
        record = self._accounting.records.get(frontend)
        if record is None or record.entry is None:
            return
        engine.unlisten(record.front)
        record.descriptors = ()
        self._unroute(record)
        record.entry = None
        self._accounting.close(frontend, record)

    def _unroute(self, record: FrontRecord) -> None:
        """Route to nobody: connections that are still connecting find no further backend."""
        engine, _ = self._opened()
        table = SlotTable.uniform(TABLE_SIZES[0], OWNER_NONE)
        engine.put_route(record.front, table, {}, by_client=False, announce=False, allow=[], deny=[])

    def problems(self) -> Sequence[str]:
        notes = self._intercept.notes if self._intercept else {}
        peers = (self._peers.problem,) if self._peers.problem else ()
        return (*self._general, *peers, *self._problems.values(), *notes.values())

    def stats(self) -> Stats:
        if self._engine is None:
            return Stats()
        frontends, backends = self._accounting.counters()
        totals = self._engine.totals()
        return Stats(
            frontends=frontends,
            backends=backends,
            gauges={
                "threads": self._threads,
                "connections": totals["connections"],
                "connections_connecting": totals["connecting"],
                "connections_limit": self._limits["connections_limit"],
                "descriptors": 2 * (totals["connections"] + totals["pipes_open"])
                + totals["sessions"]
                + totals["listeners"],
                "descriptors_limit": self._limits["descriptors_limit"],
                "pipes": totals["pipes_open"],
                "pipes_used": totals["pipes_used"],
                "buffers_used": totals["buffers_used"],
                "accept_paused_threads": totals["paused"],
                "udp_sessions": totals["sessions"],
            },
            totals={
                "accept_pauses": totals["accept_pauses"],
                "accept_errors": totals["accept_errors"],
                "pipe_failures": totals["pipe_failures"],
                "udp_evictions": totals["udp_evictions"],
                "udp_dropped": totals["udp_dropped"],
                "passed_connections": totals["passed_connections"],
                "peer_connections": totals["peer_connections"],
                "peer_foreign": totals["peer_foreign"],
                "peer_malformed": totals["peer_malformed"],
                "peer_unknown": totals["peer_unknown"],
                "peer_denied": totals["peer_denied"],
                "peer_unproven": totals["peer_unproven"],
                "kernel_losses": self._losses.count,
                "udp_forgotten": self._intercept.cleaner.count if self._intercept else 0,
                **self._peers.totals(),
            },
        )

    def signals(self) -> Sequence[Signal]:
        return self._accounting.signals()

    def accepted(self, callers: Sequence[Caller]) -> Sequence[Accepted | None]:
        """See Datapath.accepted."""
        engine, _ = self._opened()
        with self._lock:
            rows = engine.find([(netaddr.pack(caller.address), caller.port, caller.called) for caller in callers])
            names = {owner: entry.key.backend for owner, entry in self._backends.items()}
        return [
            Accepted((*(names.get(owner, "?") for owner in row[0]), *([""] if row[2] else [])), row[1]) if row else None
            for row in rows
        ]

    def live_slots(self, seconds: float) -> Mapping[Frontend, frozenset[int]]:
        """Empty: a connection's socket, or a session, remembers its backend."""
        return {}

    def prove(self, proof: Proof) -> None:
        """See Datapath.prove."""
        engine, _ = self._opened()
        self._peers.prove(engine, proof)
        engine.collect()

    def heartbeat(self) -> bool:
        """See Datapath.heartbeat: the nftables table redirects for as long as it is kept."""
        if self._intercept is not None:
            self._intercept.heartbeat()
        return True

    def hung(self) -> Sequence[str]:
        """See Datapath.hung."""
        if self._engine is None:
            return ()
        now, turns = time.monotonic(), self._engine.turns()
        if not self._turned:
            self._turned = [(turn, now) for turn in turns]
        self._turned = [
            (turn, now) if turn != before else (before, since)
            for turn, (before, since) in zip(turns, self._turned, strict=True)
        ]
        return [
            f"forwarding thread {number} has stood still for {now - since:.0f} s: its connections and its share of new "
            "ones are stuck"
            for number, (_, since) in enumerate(self._turned)
            if now - since > HUNG
        ]

    def rejoin(self) -> Applied:
        """See Datapath.rejoin: nothing is ever orphaned."""
        return self._applied

    def lookup(self, flow: Flow) -> Choice | None:
        """See Datapath.lookup. It names as many backends as a connection tries."""
        return lookup(self._applied, flow, choices=min(self._config.retries, RETRIES_MOST) + 1)

    def explain(self, flow: Flow) -> None:
        """None: see Datapath.explain."""

    def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """See Datapath.listeners."""
        with self._accounting.lock:
            own = {f: r.descriptors for f, r in self._accounting.records.items() if r.descriptors}
        return {**own, **self._peers.listeners()}

    def stop_accepting(self) -> None:
        """See Datapath.stop_accepting."""
        engine, intercept = self._opened()
        with self._lock:
            intercept.yield_table()
            engine.yield_sockets()
            self._peers.yielded()
            with self._accounting.lock:
                for record in self._accounting.records.values():
                    record.descriptors = ()

    def leave(self, *, release: bool) -> None:
        """See Datapath.leave."""
        engine, _ = self._opened()
        engine.leave()

    def drain(self, seconds: float) -> int:
        """Accept no new connections and wait for the others. UDP is served until `close`: its flows have no end."""
        engine, intercept = self._opened()
        with self._lock:
            intercept.hand_back()
            self._peers.stop(engine)
            for frontend, record in list(self._accounting.records.items()):
                if frontend.protocol is Protocol.TCP and record.descriptors:
                    engine.unlisten(record.front)
                    record.descriptors = ()
        deadline = time.monotonic() + seconds
        while (still := engine.totals()["connections"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return still

    def close(self, *, release: bool) -> None:
        """Reset open connections and stop. A process that took over keeps the ports; otherwise they are free."""
        if self._watch is not None:
            self._watch.close()
        self._peers.close()
        if self._intercept is not None:
            self._intercept.close()
        if self._engine is not None:
            self._engine.close()
