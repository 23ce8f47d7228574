# SPDX-License-Identifier: Apache-2.0
"""What the Engine of any node knows of itself: its role, the managers, and the containers of its own tasks.

A worker is told by a manager which tasks it has; where they are reached, and that they have died, it sees here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from mesh.config.keys import Config
from mesh.errors import ProviderError
from mesh.model import Backend, Inventory
from mesh.netaddr import split_host_port
from mesh.providers.swarm import schema
from mesh.providers.swarm.decode import TASK_LABEL, Answers, Local, Read, local_of
from mesh.providers.swarm.engine import Engine
from mesh.providers.swarm.events import Overlay
from mesh.providers.swarm.schema import parse
from mesh.supervisor import recorded

_INTERVAL: Final = 2.0  # seconds between looks where nothing was announced
_QUIET: Final = 0.05  # seconds between two looks
_RETRY: Final = 0.5
_NETWORKS: Final = 60.0  # seconds between looks at the ingress network, which hardly ever changes

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LocalView:
    """One look at the local Engine. `managers` by node id, as host.

    `settled`: the Engine plays its part in a swarm; while it starts or ends, or has an error, it knows neither its role
    nor the managers. One that ends calls itself inactive, as one does that has left its swarm.
    """

    node: str = ""
    settled: bool = True
    worker: bool = False
    managers: Mapping[str, str] = field(default_factory=dict)
    local: Local = field(default_factory=Local)
    containers: Mapping[str, str] = field(default_factory=dict)  # by task


def decode_local(answers: Answers) -> LocalView:
    """What the Engine answered.

    Raises:
        ProviderError: a body cannot be used.
    """
    swarm = parse(answers.info, schema.Info, "GET /info").swarm
    containers = parse(answers.containers, list[schema.Container], "GET /containers/json")
    return LocalView(
        node=swarm.node_id,
        settled=swarm.local_node_state == "active",
        worker=swarm.local_node_state == "active" and not swarm.control_available,
        managers={m.node_id: split_host_port(m.addr, default=0)[0] for m in swarm.remote_managers or () if m.addr},
        local=local_of(swarm.node_id, answers),
        containers={task: c.id for c in containers if (task := (c.labels or {}).get(TASK_LABEL))},
    )


def keep_role(look: LocalView, before: LocalView) -> LocalView:
    """A look with the role of the one before where it has none of its own yet."""
    if look.settled:
        return look
    return replace(look, node=look.node or before.node, worker=before.worker, managers=before.managers)


def merge(inventory: Inventory, look: LocalView) -> Inventory:
    """A manager's inventory with what this node knows of its own tasks; one without a running container is gone."""

    def own(backend: Backend) -> Backend | None:
        container = look.containers.get(backend.id, "")
        if container not in look.local.running:
            return None
        address = (look.local.addresses or {}).get(container)
        ready = backend.ready and container not in look.local.unready
        why = look.local.unreached.get(container, "")
        return replace(backend, address=address, local=True, container=container, ready=ready, unreached=why)

    backends = (own(b) if b.node == look.node else b for b in inventory.backends)
    return replace(inventory, backends=tuple(b for b in backends if b is not None))


class LocalNode:
    """Follows the local Engine."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._on_change: Callable[[], None] = lambda: None
        self._overlay = Overlay()
        self._begun = 0
        self._ring = asyncio.Event()
        self.look = LocalView()
        self.encrypted = ""  # the ingress network's name, if it is encrypted
        self.error = ""
        self.looked = asyncio.Event()  # once, with whatever result

    async def run(self, on_change: Callable[[], None]) -> None:
        """Follow until cancelled.

        Args:
            on_change: called on the event loop whenever `look` or `local_inventory` would answer otherwise.
        """
        self._on_change = on_change
        engine = Engine(self._config.docker_host)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_forever(engine))
                group.create_task(self._hear_forever(engine))
                group.create_task(self._watch_ingress())
        finally:
            await engine.close()

    def local_inventory(self, inventory: Inventory) -> Inventory:
        """`inventory` with this node's own knowledge."""
        return self._overlay.apply(Read(merge(inventory, self.look), self.look.local))

    async def _read_forever(self, engine: Engine) -> None:
        while True:
            self._ring.clear()
            self._begun += 1
            pause = _INTERVAL
            try:
                begun = self._begun
                look = keep_role(await asyncio.to_thread(decode_local, await engine.read_here()), self.look)
                self._overlay.settle(begun, look.local.running)
                self.error = ""
                if look != self.look:
                    before, self.look = self.look, look
                    try:
                        self._on_change()
                    except BaseException:  # the next look tries again
                        self.look = before
                        raise
            except Exception as error:  # whatever it is: the last look stands
                if str(error) != self.error:
                    log.warning("local docker cannot be read", error=str(error))
                self.error, pause = str(error), _RETRY
            self.looked.set()
            await asyncio.sleep(_QUIET)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ring.wait()

    async def _watch_ingress(self) -> None:
        """Keep `encrypted`, by a connection of its own: the answer may be slow."""
        engine = Engine(self._config.docker_host)
        try:
            while True:
                with contextlib.suppress(ProviderError):
                    self.encrypted = await engine.encrypted_ingress()
                await asyncio.sleep(_NETWORKS)
        finally:
            await engine.close()

    async def _hear_forever(self, engine: Engine) -> None:
        while True:
            started = time.monotonic()
            with contextlib.suppress(ProviderError), recorded("local events"):
                async with contextlib.aclosing(engine.events()) as events:
                    async for event in events:
                        changed, ring = (False, True) if event is None else self._overlay.hear(event, self._begun)
                        if changed:
                            self._on_change()
                        if ring and (self.look.worker or event is None):  # a manager reads more than this itself
                            self._ring.set()
            if time.monotonic() - started < _RETRY:
                await asyncio.sleep(_RETRY * random.uniform(0.8, 1.2))  # noqa: S311 -- jitter
