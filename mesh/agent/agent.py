# SPDX-License-Identifier: Apache-2.0
"""The composition root: what the daemon is made of, how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop

from mesh import __version__
from mesh.agent import changelog, logging, remains
from mesh.agent.handover import HandOver
from mesh.agent.lock import Lock
from mesh.agent.systemd import Notifier
from mesh.agent.takeover import SERVING_TIMEOUT, Successor, TakeoverError, close_all
from mesh.agent.wiring import Engine, choose_engine, choose_provider, make_engine
from mesh.api.server import Servers
from mesh.api.state import Facts, View
from mesh.cluster.provider import ClusterProvider
from mesh.config.keys import Config
from mesh.datapath.base import Applied, Datapath
from mesh.datapath.paths.monitor import PathMonitor
from mesh.errors import ConfigError, DatapathError
from mesh.health.monitor import Monitor
from mesh.model import Backend, Frontend, HealthView, Inventory, Node
from mesh.providers.base import Provider
from mesh.reconcile.loop import Picture, Reconciler
from mesh.supervisor import end, supervise

LIVE_KEYS: Final = frozenset(
    {
        "drain_timeout",
        "panic_threshold",
        "guard_max_removal",
        "guard_hold",
        "transition_calm",
        "log_level",
        "log_format",
    }
)
"""Keys that SIGHUP changes in a running daemon; the others take effect when it starts."""
SIGNALS_EVERY: Final = 0.2  # seconds between looks at what traffic tells of backends
READY_WITHIN: Final = 10.0  # seconds after which systemd is told READY although nothing is known yet
DRAIN_SLICE: Final = 0.25  # seconds after which a drain looks up whether it should end at once

log = structlog.get_logger("mesh")


def run(config: Config, *, reload: Callable[[], Config], take_over: bool = False) -> int:
    """Run the daemon until it is stopped. Returns the exit code.

    Args:
        config: what to start with.
        reload: reads the configuration again, for SIGHUP; may raise ConfigError.
        take_over: take the place of the daemon that runs in the same state directory, if there is one.

    Raises:
        MeshError: it cannot start, with what would help.
    """
    logging.configure(config)
    os.umask(0o077)
    return uvloop.run(Agent(config, reload).run(take_over=take_over))


class Agent:
    """The daemon. Implements `agent_handover.Host`."""

    engine = ""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self._asked = config
        self._config = config
        self._reload_config = reload
        self._state_dir = Path(config.state_dir)
        self._notifier = Notifier()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._ended = asyncio.Event()
        self._release = False
        self._handed_to = ""  # the successor's engine
        self._connected: bool | None = None
        self._inventory = Inventory()
        self._lost: dict[str, Backend] = {}  # gone from the inventory, but held back by the guard
        self._provider: Provider
        self._datapath: Datapath
        self._reconciler: Reconciler
        self._monitor: Monitor
        self._view: View
        self._servers: Servers

    async def run(self, *, take_over: bool) -> int:
        """Start, serve, stop."""
        self._config, self._provider = await choose_provider(self._config)
        chosen = await choose_engine(self._config)
        self.engine = chosen.name
        successor = None
        if take_over:
            successor = await asyncio.to_thread(Successor.connect, self._state_dir, chosen.name)
            if successor is None:
                log.info("no daemon runs here, so there is nothing to take over", state_dir=str(self._state_dir))
        lock = successor.lock if successor else Lock.acquire(self._state_dir)
        self._handle_signals()
        try:
            await self._start(chosen, successor)
        except BaseException:
            await self._cancel()
            if successor:
                successor.abandon()
            raise
        hand_over = HandOver(self._state_dir, lock, self, self._handed_over)
        self._spawn("handover", hand_over.run)
        self._spawn("ready", self._announce)
        await self._stopping.wait()
        await self._end()
        if not self._handed_to:
            hand_over.remove()
        lock.close()
        self._ended.set()
        return 0

    async def _start(self, chosen: Engine, successor: Successor | None) -> None:
        inherited = successor.listeners if successor else None
        if successor and inherited and chosen.name != successor.engine:  # both have the peer port, and no other
            close_all([each for f, them in inherited.items() if f.port != self._config.peer_port for each in them])
            inherited = {f: them for f, them in inherited.items() if f.port == self._config.peer_port}
        chosen, applied = await self._open(chosen, inherited)
        self._monitor = Monitor(self._on_health)
        if isinstance(self._provider, ClusterProvider):
            self._provider.engine, self._provider.on_health = chosen.name, self._reconciler.set_health
        facts = Facts(chosen.name, chosen.reason, self._state_dir, time.time())
        ways = PathMonitor(self._config, chosen.name, self._nodes)
        self._view = View(facts, self._reconciler, self._provider, self._monitor, self.stop, ways)
        if isinstance(self._provider, ClusterProvider):
            self._provider.tables = self._view.tables
        self._servers = Servers(self._view, self._config.http_listen, self._state_dir)
        self._reconciler.set_drained(self._view.drained)
        log.info(
            "mesh starts",
            version=__version__,
            engine=chosen.name,
            reason=chosen.reason,
            provider=self._config.provider,
            adopted=len(applied.frontends),
            state_dir=str(self._state_dir),
        )
        try:
            if successor is None:
                await self._servers.start()
            self._spawn("reconcile", self._reconciler.run)
            self._spawn("health", self._monitor.run)
            self._spawn("provider", lambda: self._provider.run(self._publish))
            self._spawn("ways", ways.run)
            self._spawn("foreign_instances", lambda: remains.watch(self._config, self._obstructed))
            self._clear_remains()
            self._spawn("signals", self._listen_to_traffic)
            self._spawn("tick", self._tick)
            if successor:
                await self._replace(successor)
        except BaseException:
            await self._cancel()
            await self._servers.stop()
            await self._reconciler.close(release=False)
            raise

    async def _open(self, chosen: Engine, inherited: Mapping[Frontend, Sequence[int]] | None) -> tuple[Engine, Applied]:
        """Open the engine; where the choice was ours and the kernel engine fails after all, the other one."""
        self._datapath = make_engine(chosen, self._config, inherited)
        self._reconciler = Reconciler(self._datapath, self._config, on_change=self._changed)
        try:
            return chosen, await self._reconciler.open()
        except DatapathError as error:
            if chosen.name == "proxy" or self._config.engine != "auto":
                raise
            await self._reconciler.close(release=False)
            self.engine = "proxy"
            return await self._open(Engine("proxy", f"the kernel engine cannot run here: {error}"), None)

    async def _replace(self, successor: Successor) -> None:
        """Serve beside the old process, then tell it to go."""
        try:
            async with asyncio.timeout(SERVING_TIMEOUT - 10):
                while not self._reconciler.in_step:  # noqa: ASYNC110 -- any cause, polled for moments
                    await asyncio.sleep(0.02)
        except TimeoutError:
            error = self._provider.status().error or "no state to serve was found in time"
            raise TakeoverError(f"pid {successor.pid} keeps its place: {error}") from None
        if self._reconciler.counts.last_error:
            raise TakeoverError(f"pid {successor.pid} keeps its place: {self._reconciler.counts.last_error}")
        await asyncio.to_thread(successor.serving)
        log.info("taken over", pid=successor.pid)
        await self._servers.start()

    def _on_health(self, view: HealthView) -> None:
        if isinstance(self._provider, ClusterProvider):
            self._provider.own_health(view)
        else:
            self._reconciler.set_health(view)

    def _publish(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._watch()
        self._reconciler.publish(inventory)

    def _changed(self, before: Picture, after: Picture) -> None:
        changelog.tell(before, after)
        if not self._lost and not self._reconciler.held:
            return
        known = self._lost | {backend.id: backend for backend in before.inventory.backends}
        present = {backend.id for backend in after.inventory.backends}
        lost = {b: known[b] for _, b in self._reconciler.held if b in known and b not in present}
        if lost != self._lost:
            self._lost = lost
            self._watch()

    def _clear_remains(self) -> None:
        if self.engine == "proxy":
            self._spawn("remains", lambda: remains.clear(self._config, lambda: self._reconciler.in_step))

    def _obstructed(self, by: Sequence[str]) -> None:
        self._view.obstacles = by

    def _nodes(self) -> tuple[str, Sequence[Node]]:
        return self._provider.status().node_id, self._inventory.nodes

    def _watch(self) -> None:
        """Have all backends probed, also those that the guard holds back: it lets go of one that is dead."""
        if not self._lost:
            self._monitor.watch(self._inventory)
            return
        present = {backend.id for backend in self._inventory.backends}
        lost = (backend for backend in self._lost.values() if backend.id not in present)
        self._monitor.watch(replace(self._inventory, backends=(*self._inventory.backends, *lost)))

    def _spawn(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks[name] = supervise(name, work)

    async def _cancel(self, *names: str) -> None:
        """Cancel these tasks, or all, and wait until they have ended."""
        await end([self._tasks.pop(name) for name in names or list(self._tasks) if name in self._tasks])

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn("reload", self._reload))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number.name)

    def _on_stop_signal(self, name: str) -> None:
        if self._stopping.is_set():
            self._at_once.set()
        else:
            log.info("stopping", signal=name, drain_timeout=self._config.drain_timeout)
            self._stopping.set()

    async def stop(self, release: bool) -> None:
        """Stop as SIGTERM does, and wait for the end; `release` hands the ports back."""
        if not self._stopping.is_set():
            log.info("stopping", release=release, drain_timeout=self._config.drain_timeout)
            self._release = release
            self._stopping.set()
        await self._ended.wait()

    async def _end(self) -> None:
        """Let connections end, within the bound, then close everything."""
        self._view.stopping = True
        self._notifier.stopping("waiting for connections to end")
        await self._cancel(*(name for name in self._tasks if name not in ("handover", "tick")))
        deadline = time.monotonic() + self._config.drain_timeout
        left = 0
        while not self._at_once.is_set():
            seconds = min(DRAIN_SLICE, max(deadline - time.monotonic(), 0.0))
            left = await self._reconciler.on_worker(self._datapath.drain, seconds)
            if not left or time.monotonic() >= deadline:
                break
        release = self._release or (self._handed_to not in ("", self.engine) and self.engine == "kernel")
        await self._reconciler.close(release=release)
        await self._cancel()
        log.info("stopped", connections_cut=left, handed_to=self._handed_to or None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._servers.stop(keep_socket=bool(self._handed_to))

    async def _announce(self) -> None:
        """Tell systemd once the first state is applied."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_WITHIN):
                while not self._reconciler.in_step:  # noqa: ASYNC110 -- any cause, polled for moments
                    await asyncio.sleep(0.02)
        gc.freeze()  # else every full collection stops the loop to look at all of the inventory again
        self._notifier.ready(self._status())
        ready, reasons = self._view.ready()
        log.info("ready" if ready else "started, but not ready", **({} if ready else {"reasons": list(reasons)}))

    def _status(self) -> str:
        frontends = len(self._reconciler.applied.frontends)
        status = self._provider.status()
        away = "" if status.connected else f"; {status.kind} is away: {status.error or 'nothing read yet'}"
        return f"{self.engine} engine, {frontends} ports, {len(self._reconciler.applied.backends)} backends{away}"

    async def _tick(self) -> None:
        """Watch the provider, and tell systemd that the loop turns."""
        told = ""
        while True:
            self._notifier.alive()
            self._follow_provider()
            if (status := self._status()) != told:
                self._notifier.status(status)
                told = status
            await asyncio.sleep(min(1.0, self._notifier.watchdog / 3 or 1.0))

    def _follow_provider(self) -> None:
        status = self._provider.status()
        if status.connected == self._connected or (self._connected is None and not status.error):
            return
        age = None if status.age_seconds is None else round(status.age_seconds, 1)
        if not status.connected:
            stays = "the last state serves on" if age is not None else "nothing is served yet"
            log.warning(f"provider lost; {stays}", kind=status.kind, age=age, error=status.error)
        elif self._connected is not None:
            log.info("provider regained", kind=status.kind)
        self._connected = status.connected

    async def _listen_to_traffic(self) -> None:
        while True:
            await asyncio.sleep(SIGNALS_EVERY)
            self._monitor.signals(await asyncio.to_thread(self._datapath.signals))

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            new = await asyncio.to_thread(self._reload_config)
        except ConfigError as error:
            log.error("configuration not used; the one before stays", error=str(error))
            self._view.refused = str(error)
        else:
            self._view.refused = ""
            self._take_config(new)
        self._provider.reload()
        self._notifier.ready(self._status())

    def _take_config(self, new: Config) -> None:
        changed = [f.name for f in fields(Config) if getattr(new, f.name) != getattr(self._asked, f.name)]
        live = {name: getattr(new, name) for name in changed if name in LIVE_KEYS}
        self._asked = replace(self._asked, **live)
        self._config = replace(self._config, **live)
        logging.configure(self._config)
        self._reconciler.set_config(self._config)
        log.info("configuration read again", changed=sorted(live))
        if waiting := sorted(set(changed) - LIVE_KEYS):
            log.warning("these keys take effect at the next start (mesh run --take-over)", keys=waiting)

    async def pause(self) -> None:
        await self._cancel("reconcile", "remains")

    async def resume(self) -> None:
        self._spawn("reconcile", self._reconciler.run)
        self._clear_remains()

    async def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        listeners: Callable[[], Mapping[Frontend, Sequence[int]]] = getattr(self._datapath, "listeners", dict)
        return await self._reconciler.on_worker(listeners)

    async def let_go(self, successor: str) -> None:
        self._handed_to = successor
        stop_accepting = getattr(self._datapath, "stop_accepting", None)
        if stop_accepting is not None and successor == self.engine:
            await self._reconciler.on_worker(stop_accepting)
        await self._servers.stop(keep_socket=True)

    async def _handed_over(self) -> None:
        self._stopping.set()
