# SPDX-License-Identifier: Apache-2.0
"""The composition root: how the daemon starts, what happens while it runs, and how it ends.

What it is made of is built in mesh.agent.wiring.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop

from mesh import __version__
from mesh.agent import changelog, logging
from mesh.agent.lock import Lock
from mesh.agent.reload import Reloader
from mesh.agent.systemd import Notifier
from mesh.agent.takeover import SERVING_TIMEOUT, HandOver, Successor, TakeoverError, close_all
from mesh.agent.wiring import (
    Engine,
    Hooks,
    Listeners,
    MakeSource,
    Opened,
    Parts,
    assemble,
    choose_engine,
    choose_provider,
    make_cleanup,
    open_engine,
)
from mesh.config.keys import Config
from mesh.model import EngineKind, Frontend, Inventory, Protocol
from mesh.reconcile.loop import Picture
from mesh.supervisor import FAULTS, end, supervise, watch_loop

SIGNALS_EVERY: Final = 0.2  # seconds between looks at the signals of traffic about backends
READY_WITHIN: Final = 10.0  # seconds after which systemd is told READY although nothing is known yet
FIRST_TRIALS: Final = 2.0  # seconds at most for which the first state waits for the paths to be tried
STUCK_MOST: Final = 300.0  # seconds after which a step that does not end is the watchdog's
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
    return uvloop.run(_run(config, reload, take_over))


async def _run(asked: Config, read: Callable[[], Config], take_over: bool) -> int:
    config, make_source = await choose_provider(asked)
    chosen = await choose_engine(config)
    return await Agent(asked, config, read, make_source, chosen).run(take_over=take_over)


class Agent:
    """The daemon. Implements mesh.agent.takeover.Host.

    Args:
        asked: the configuration as it was read.
        config: the same, with the provider that `auto` came to.
        read: reads it again; may raise ConfigError.
    """

    def __init__(
        self, asked: Config, config: Config, read: Callable[[], Config], make_source: MakeSource, chosen: Engine
    ) -> None:
        self._reloader = Reloader(asked, config, read, self._take_config)
        self._make_source = make_source
        self._chosen = chosen
        self._state_dir = Path(config.state_dir)
        self._cleanup = make_cleanup(config)
        self._notifier = Notifier()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._ended = asyncio.Event()
        self._release = False
        self._handed_to = EngineKind.UNKNOWN  # the successor's engine
        self._connected: bool | None = None  # the provider, as it was told last
        self._stuck = False  # a step of the loop has not ended for long, as it was told last
        self._parts: Parts  # from `_start` on

    @property
    def engine(self) -> EngineKind:
        """How this daemon forwards."""
        return self._parts.engine.name

    # ---- start ----

    async def run(self, *, take_over: bool) -> int:
        """Start, serve, stop."""
        successor = None
        if take_over:
            successor = await asyncio.to_thread(Successor.connect, self._state_dir, self._chosen.name)
            if successor is None:
                log.info("no daemon runs here, so there is nothing to take over", state_dir=str(self._state_dir))
        lock = successor.lock if successor else Lock.acquire(self._state_dir)
        self._handle_signals()
        watch_loop()
        try:
            await self._start(successor)
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

    async def _start(self, successor: Successor | None) -> None:
        config = self._reloader.config
        opened = await open_engine(self._chosen, config, self._inherited(successor), self._changed)
        hooks = Hooks(self.stop, self._stopping.is_set, self._problems)
        try:
            parts = self._parts = assemble(config, opened, self._make_source, hooks)
            self._log_start(opened)
            try:
                await self._serve(parts, successor)
            except BaseException:
                await self._cancel()
                await parts.servers.stop()
                raise
        except BaseException:
            await opened.reconciler.close(release=False)
            raise

    def _inherited(self, successor: Successor | None) -> Listeners | None:
        """Sockets of the process before; where it has another engine, both have the peer port and no other."""
        if successor is None:
            return None
        inherited, peer_port = successor.listeners, self._reloader.config.peer_port
        if not inherited or self._chosen.name == successor.engine:
            return inherited
        close_all([each for f, them in inherited.items() if f.port != peer_port for each in them])
        return {f: them for f, them in inherited.items() if f.port == peer_port}

    def _log_start(self, opened: Opened) -> None:
        log.info(
            "mesh starts",
            version=__version__,
            engine=opened.engine.name,
            reason=opened.engine.reason,
            provider=self._reloader.config.provider,
            restored=len(opened.applied.frontends),
            state_dir=str(self._state_dir),
        )

    async def _serve(self, parts: Parts, successor: Successor | None) -> None:
        if successor is None:
            await parts.servers.start()
        self._spawn("reconcile", self._reconcile)
        self._spawn("health", parts.monitor.run)
        self._spawn("provider", lambda: parts.provider.run(self._publish))
        self._spawn("paths", parts.paths.run)
        if self._cleanup is not None:
            self._spawn("foreign instances", self._cleanup.watch_foreign_instances)
        self._clear_stale_state()
        self._spawn("signals", self._listen_to_traffic)
        self._spawn("tick", self._tick)
        if successor:
            await self._replace(successor)
        self._started.set()

    async def _replace(self, successor: Successor) -> None:
        """Serve next to the old process, then tell it to exit."""
        reconciler = self._parts.reconciler
        try:
            async with asyncio.timeout(SERVING_TIMEOUT - 10):
                while not reconciler.in_step:  # noqa: ASYNC110 -- any cause, polled for moments
                    await asyncio.sleep(0.02)
        except TimeoutError:
            error = self._parts.provider.status().error or "no state to serve was found in time"
            raise TakeoverError(f"pid {successor.pid} keeps its place: {error}") from None
        if reconciler.counts.last_error:
            raise TakeoverError(f"pid {successor.pid} keeps its place: {reconciler.counts.last_error}")
        await asyncio.to_thread(successor.serving)
        log.info("taken over", pid=successor.pid)
        await self._parts.servers.start()

    def _spawn(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks[name] = supervise(name, work)

    async def _cancel(self, *names: str) -> None:
        """Cancel these tasks, or all, and wait until they have ended."""
        await end([self._tasks.pop(name) for name in names or list(self._tasks) if name in self._tasks])

    # ---- what happens while it runs ----

    def _publish(self, inventory: Inventory) -> None:
        self._parts.reconciler.publish(inventory)
        self._parts.held.publish(inventory)
        self._parts.paths.look_again()

    async def _reconcile(self) -> None:
        """Serve once the paths to other nodes have been tried, so that nothing is masked that works."""
        reconciler, paths = self._parts.reconciler, self._parts.paths
        while not reconciler.known:  # noqa: ASYNC110 -- any cause, polled for moments
            await asyncio.sleep(0.05)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TRIALS):
                await paths.proven()
        await reconciler.run()

    def _changed(self, before: Picture, after: Picture) -> None:
        changelog.tell(before, after)
        self._parts.held.changed(before, after)

    def _problems(self) -> list[str]:
        """What is wrong with the daemon itself."""
        return [*FAULTS.problems, *self._reloader.problems, *(self._cleanup.problems if self._cleanup else ())]

    def _clear_stale_state(self) -> None:
        cleanup, reconciler = self._cleanup, self._parts.reconciler
        if self.engine == EngineKind.PROXY and cleanup is not None:
            self._spawn("cleanup", lambda: cleanup.clear_stale_state(lambda: reconciler.in_step))

    async def _listen_to_traffic(self) -> None:
        while True:
            await asyncio.sleep(SIGNALS_EVERY)
            self._parts.monitor.signals(await asyncio.to_thread(self._parts.datapath.signals))

    async def _announce(self) -> None:
        """Tell systemd once the first state is applied."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_WITHIN):
                while not self._parts.reconciler.in_step:  # noqa: ASYNC110 -- any cause, polled for moments
                    await asyncio.sleep(0.02)
        gc.freeze()  # else every full collection stops the loop to look at all of the inventory again
        self._notifier.ready(self._status())
        ready, reasons = self._parts.view.ready()
        log.info("ready" if ready else "started, but not ready", **({} if ready else {"reasons": list(reasons)}))

    def _status(self) -> str:
        applied, status = self._parts.reconciler.applied, self._parts.provider.status()
        away = "" if status.connected else f"; {status.kind} disconnected: {status.error or 'nothing read yet'}"
        return f"{self.engine} engine, {len(applied.frontends)} ports, {len(applied.backends)} backends{away}"

    async def _tick(self) -> None:
        """Watch the provider, and tell systemd that the loop turns."""
        told = ""
        while True:
            if not self._is_stuck():
                self._notifier.alive()
            if not self._parts.datapath.heartbeat():
                await self._rejoin()
            self._follow_provider()
            if (status := self._status()) != told:
                self._notifier.status(status)
                told = status
            await asyncio.sleep(min(1.0, self._notifier.watchdog / 3 or 1.0))

    def _is_stuck(self) -> bool:
        """Whether the engine forwards or applies no more, although this loop turns: systemd then hears nothing."""
        hung = self._parts.datapath.hung()
        for sentence in hung:
            FAULTS.failed("engine", sentence)
        if (stuck := self._parts.reconciler.stuck()) and not self._stuck:
            log.error("applying does not end", seconds=round(stuck))
        self._stuck = bool(stuck)
        return bool(hung) or stuck > STUCK_MOST

    async def _rejoin(self) -> None:
        """This process stood still for orphan_timeout, and the programs have handed the ports back meanwhile."""
        if self._stopping.is_set():
            return
        log.warning("no heartbeat for orphan_timeout: the ports were handed back, and are taken over again")
        await self.pause()
        try:
            await self._parts.reconciler.rejoin()
        finally:
            await self.resume()

    def _follow_provider(self) -> None:
        status = self._parts.provider.status()
        if status.connected == self._connected or (self._connected is None and not status.error):
            return
        age = None if status.age_seconds is None else round(status.age_seconds, 1)
        if not status.connected:
            stays = "keeping the last known state" if age is not None else "nothing is served yet"
            log.warning(f"provider disconnected; {stays}", kind=status.kind, age=age, error=status.error)
        elif self._connected is not None:
            log.info("provider connected again", kind=status.kind)
        self._connected = status.connected

    # ---- signals ----

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn("reload", self._reload))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number.name)

    async def _reload(self) -> None:
        await self._started.wait()
        self._notifier.reloading()
        await self._reloader.reload()
        self._parts.provider.reload()
        self._notifier.ready(self._status())

    def _take_config(self, config: Config) -> None:
        logging.configure(config)
        self._parts.reconciler.set_config(config)

    def _on_stop_signal(self, name: str) -> None:
        if self._stopping.is_set():
            self._at_once.set()
        else:
            log.info("stopping", signal=name, drain_timeout=self._reloader.config.drain_timeout)
            self._stopping.set()

    async def stop(self, release: bool) -> None:
        """Stop as SIGTERM does, and wait for the end; `release` hands the ports back."""
        if not self._stopping.is_set():
            log.info("stopping", release=release, drain_timeout=self._reloader.config.drain_timeout)
            self._release = release
            self._stopping.set()
        await self._ended.wait()

    # ---- end ----

    async def _end(self) -> None:
        """Let connections end, within the bound, then close everything."""
        reconciler, datapath = self._parts.reconciler, self._parts.datapath
        self._notifier.stopping("waiting for connections to end")
        if not self._handed_to:
            await self._leave()
        await self._cancel(*(name for name in self._tasks if name not in ("handover", "tick")))
        deadline = time.monotonic() + self._reloader.config.drain_timeout
        left = 0
        while not self._at_once.is_set():
            seconds = min(DRAIN_SLICE, max(deadline - time.monotonic(), 0.0))
            left = await reconciler.on_worker(datapath.drain, seconds)
            if not left or time.monotonic() >= deadline:
                break
        to_another = self._handed_to not in (EngineKind.UNKNOWN, self.engine)
        release = self._release or (to_another and self.engine == EngineKind.KERNEL)
        await reconciler.close(release=release)
        await self._cancel()
        log.info("stopped", connections_cut=left, handed_to=self._handed_to or None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._parts.servers.stop(keep_socket=bool(self._handed_to))

    async def _leave(self) -> None:
        """Other nodes send flows elsewhere before this one stops taking them."""
        reconciler = self._parts.reconciler
        frontends = reconciler.applied.frontends
        tunnel = self._release and self.engine == EngineKind.KERNEL
        datagrams = tunnel or any(frontend.protocol is Protocol.UDP for frontend in frontends)
        seconds = self._parts.paths.notice(datagrams=datagrams) if frontends else 0.0
        if seconds:
            leave = functools.partial(self._parts.datapath.leave, release=self._release)
            await reconciler.on_worker(leave)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._at_once.wait()

    # ---- a hand-over: mesh.agent.takeover.Host ----

    async def pause(self) -> None:
        """See Host.pause."""
        await self._cancel("reconcile", "cleanup")

    async def resume(self) -> None:
        """See Host.resume."""
        self._spawn("reconcile", self._parts.reconciler.run)
        self._clear_stale_state()

    async def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """See Host.listeners."""
        return await self._parts.reconciler.on_worker(self._parts.datapath.listeners)

    async def let_go(self, successor: EngineKind) -> None:
        """See Host.let_go."""
        self._handed_to = successor
        if successor == self.engine:
            await self._parts.reconciler.on_worker(self._parts.datapath.stop_accepting)
        await self._parts.servers.stop(keep_socket=True)

    async def _handed_over(self) -> None:
        self._stopping.set()
