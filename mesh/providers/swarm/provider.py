# SPDX-License-Identifier: Apache-2.0
"""The swarm provider: re-reads the Engine when the doorbell rings, and publishes the inventory when it has changed.

Where Watch announced nothing but tasks, only those tasks are read: a full list takes an Engine long to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import structlog

from mesh.config.keys import Config
from mesh.errors import ConfigError, ProviderError
from mesh.model import Inventory, Severity
from mesh.providers.base import ProviderStatus, Publish
from mesh.providers.swarm.accepted import ACCEPTED_FILE, AcceptedFile
from mesh.providers.swarm.decode import Answers, Decoder, Read
from mesh.providers.swarm.engine import Engine, engine_url
from mesh.providers.swarm.events import Overlay
from mesh.providers.swarm.revoked import revoked
from mesh.providers.swarm.watch import watch
from mesh.supervisor import recorded

_QUIET_SECONDS: Final = 0.02  # minimum pause between the end of a read and the next
_QUIET_SHARE: Final = 1.0  # pause as a share of the time that the read took, so that a slow Engine is not overloaded
_QUIET_MOST: Final = 2.0
_RETRY_FIRST: Final = 0.2
_RETRY_MOST: Final = 3.0
_STREAM_CALM: Final = 5.0  # a stream that lived this long resets the retry delay

_EARLY: Final = ("pause", "unpause")  # the Engine's list shows them only some time after the event
_LATER: Final = 0.5  # seconds after which to read again because of these
_SOME: Final = 256  # maximum number of tasks read by id; for more, everything is read

LEVELS: Final = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.CRITICAL: logging.ERROR}

log = structlog.get_logger()


class _Bell:
    """What is to be read again: all there is, or tasks of these ids and what this node knows of itself."""

    def __init__(self) -> None:
        self.rung = asyncio.Event()
        self._tasks: set[str] | None = None

    def ring(self, tasks: Iterable[str] | None = None) -> None:
        """Have these read, or all."""
        self._tasks = None if tasks is None or self._tasks is None else self._tasks.union(tasks)
        if self._tasks is not None and len(self._tasks) > _SOME:
            self._tasks = None
        self.rung.set()

    def missed(self) -> None:
        """What was taken is still to be read, and nobody knows what else."""
        self._tasks = None

    def take(self) -> frozenset[str] | None:
        """What to read now; None: all."""
        taken = None if self._tasks is None else frozenset(self._tasks)
        self._tasks = set()
        self.rung.clear()
        return taken


class SwarmProvider:
    """Source of the inventory on a swarm manager; see mesh.providers.base.Provider for the contract.

    Raises:
        ConfigError: docker_host is no address of an Engine.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._watch_socket = Path(config.docker_exec_root) / "swarm" / "control.sock"
        self._certificates = Path(config.docker_data_root) / "swarm" / "certificates"
        self._accepted = AcceptedFile(Path(config.state_dir) / ACCEPTED_FILE)
        self._decoder = Decoder(self._accepted.read())
        self._overlay = Overlay()
        self._read: Read | None = None
        self._published: Inventory | None = None
        self._publish: Publish = _nowhere
        self._begun = 0  # reads that have begun
        self._begun_whole = 0  # of those, of everything
        self._last_good: float | None = None
        self._error = ""
        self._watching = False
        self._hearing = False
        self._bell = _Bell()
        self.revoked: frozenset[str] = frozenset()  # nodes whose certificates the swarm has revoked, as far as is known
        self._whole = 0.0  # when the last read of everything began, monotonic
        engine_url(config.docker_host)

    async def run(self, publish: Publish) -> None:
        """Read, publish and follow until cancelled."""
        self._publish, self._published = publish, None  # who asks again has forgotten
        self._bell.ring()
        engine = Engine(self._config.docker_host)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_forever(engine))
                group.create_task(self._forever("events", lambda: self._hear(engine)))
                group.create_task(self._forever("watch", self._watch))
                group.create_task(self._follow_revoked())
        finally:
            await engine.close()

    def reload(self) -> None:
        """Read again now."""
        self._bell.ring()

    def status(self) -> ProviderStatus:
        """How it is doing."""
        return ProviderStatus(
            kind="swarm",
            connected=self._last_good is not None and not self._error,
            age_seconds=None if self._last_good is None else time.monotonic() - self._last_good,
            error=self._error,
            doorbell="watch" if self._watching else "events" if self._hearing else "poll",
            node_id=self._read.local.node if self._read else "",
        )

    @property
    def unseen(self) -> Mapping[str, str]:
        """Why tasks of this node do not serve that other nodes take for ready, by task."""
        return self._overlay.unseen(self._read) if self._read else {}

    async def _read_forever(self, engine: Engine) -> None:
        retry = _RETRY_FIRST
        while True:
            self._begun += 1
            started = time.monotonic()
            try:
                self._accept(await self._read_once(engine, started), self._begun)
            except Exception as error:
                self._failed(error)
                self._bell.missed()
                await self._rest(retry * random.uniform(0.8, 1.2))  # noqa: S311 -- jitter
                retry = min(retry * 2, _RETRY_MOST)
                continue
            if self._error:
                log.info("docker is reachable again")
                self._error = ""
            retry = _RETRY_FIRST
            took = time.monotonic() - started
            await asyncio.sleep(min(max(_QUIET_SECONDS, took * _QUIET_SHARE), _QUIET_MOST))
            if not await self._rest(self._interval()):
                self._bell.ring()

    async def _read_once(self, engine: Engine, now: float) -> Read:
        """Everything, or what was announced where nothing else can have changed."""
        tasks = self._bell.take()
        if tasks is None or not self._watching or now - self._whole > self._config.docker_resync_interval:
            self._whole = now
            self._begun_whole += 1
            return await asyncio.to_thread(self._decode, await engine.read())
        return await asyncio.to_thread(self._decoder.update, await engine.read_tasks(tasks), tasks)

    def _decode(self, answers: Answers) -> Read:
        read = self._decoder.decode(answers)
        self._accepted.write(self._decoder.accepted)
        return read

    def _failed(self, error: Exception) -> None:
        """Log a failed read, whatever its cause. The last known state stays in use, and the read is retried."""
        foreseen = isinstance(error, ProviderError)
        said = str(error) if foreseen else f"{type(error).__name__}: {error}"
        if said != self._error:
            stays = "keeping the last known state" if self._last_good is not None else "nothing is served yet"
            log.warning(f"docker cannot be read; {stays}", error=said, exc_info=not foreseen)
        self._error = said

    def _interval(self) -> float:
        # Without Watch, nobody announces a change of a task's desired state.
        return self._config.docker_resync_interval if self._watching else self._config.docker_poll_interval

    async def _rest(self, seconds: float) -> bool:
        """Until the bell rings, or so long; whether it has rung."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._bell.rung.wait()
        return False

    def _accept(self, read: Read, begun: int) -> None:
        self._overlay.settle(begun, read.local.running)
        self._read = read
        self._last_good = time.monotonic()
        self._publish_now()

    def _publish_now(self) -> None:
        """Publish the last read with what events have said since, if that differs from what was published."""
        if self._read is None:
            return
        inventory = self._overlay.apply(self._read)
        if inventory == self._published:
            return
        known = set(self._published.problems) if self._published else set()
        for problem in inventory.problems:
            if problem not in known:
                log.log(LEVELS[problem.severity], "label problem", problem=str(problem))
        before, self._published = self._published, inventory
        try:
            self._publish(inventory)
        except BaseException:  # the next read tries again
            self._published = before
            raise

    async def _hear(self, engine: Engine) -> None:
        async with contextlib.aclosing(engine.events()) as events:
            async for event in events:
                if event is None:
                    self._hearing = True
                    self._bell.ring()  # what happened before the stream was open
                    continue
                changed, ring = self._overlay.hear(event, self._begun)
                if changed:
                    self._publish_now()
                if ring:
                    self._bell.ring(() if event.type in ("container", "network") else None)
                if event.action in _EARLY:
                    asyncio.get_running_loop().call_later(_LATER, self._bell.ring, ())

    async def _watch(self) -> None:
        async with contextlib.aclosing(watch(self._watch_socket, self._certificates)) as rings:
            async for tasks in rings:
                if not self._watching:
                    self._watching = True
                    log.info("following changes announced by the swarm", doorbell="watch")
                    tasks = None  # noqa: PLW2901 -- nor what happened before
                self._bell.ring(tasks)

    async def _follow_revoked(self) -> None:
        """Nodes that leave the inventory are noticed at once; this is for an inventory that is old."""
        while True:
            try:
                self.revoked = await revoked(self._watch_socket, self._certificates)
            except ProviderError as error:
                log.debug("revoked certificates cannot be read", error=str(error))
            await asyncio.sleep(self._config.docker_resync_interval)

    async def _forever(self, name: str, follow: Callable[[], Awaitable[None]]) -> None:
        """Follow a stream; when it ends, again: after a pause."""
        retry = _RETRY_FIRST
        said = ""
        while True:
            started = time.monotonic()
            try:
                with recorded(f"swarm {name}"):
                    await follow()
            except ProviderError as error:
                if str(error) != said:
                    log.info("change stream ended; retrying", doorbell=name, reason=str(error))
                said = str(error)
            finally:
                if name == "watch":
                    self._watching = False
                else:
                    self._hearing = False
            self._bell.ring()
            if time.monotonic() - started > _STREAM_CALM:
                retry = _RETRY_FIRST
                said = ""
            await asyncio.sleep(retry * random.uniform(0.8, 1.2))  # noqa: S311 -- jitter
            retry = min(retry * 2, _RETRY_MOST)


async def detect(config: Config) -> bool:
    """Whether docker_host is a node of a swarm that answers."""
    try:
        engine = Engine(config.docker_host, request_seconds=3.0)
    except ConfigError:
        return False
    try:
        return (await engine.info()).swarm.local_node_state == "active"
    except ProviderError as error:
        if _is_there(config.docker_host):
            log.warning("cannot tell whether this node is in a swarm: docker does not answer", error=str(error))
        return False
    finally:
        await engine.close()


def _is_there(docker_host: str) -> bool:
    """Whether an Engine is expected there: any address but a socket that does not exist."""
    return not docker_host.startswith("unix://") or Path(docker_host.removeprefix("unix://")).exists()


def _nowhere(inventory: Inventory) -> None:
    del inventory
