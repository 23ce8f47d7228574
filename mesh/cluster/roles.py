# SPDX-License-Identifier: Apache-2.0
"""Who reads and who is told: a manager's agent reads the swarm and tells the others, a worker's agent is told.

Which of the two a node is, is looked up all the time: promotion and demotion need no restart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from mesh.cluster.liveness import FailureDetector
from mesh.cluster.relay_client import RelayProvider
from mesh.cluster.relay_server import RelayServer
from mesh.cluster.verdicts import Verdicts
from mesh.model import Inventory
from mesh.providers.base import Provider
from mesh.providers.swarm import LocalNode, SwarmProvider
from mesh.supervisor import end, supervise

BLIND: Final = 3.0  # seconds after which a manager whose Engine does not answer is told by another
GATHERING: Final = 5.0  # seconds at most for which a manager that can read again waits until all nodes' agents call it

log = structlog.get_logger("mesh.cluster")


class Roles:
    """Plays a node's part: manager or worker by its Engine's word, and reading or told.

    Args:
        local: this node's Engine; followed by the caller.
        swarm: the source of a node that reads.
        relay: the source of a node that is told; run by the caller.
        make_server: makes the relay's server, for a manager (True) or a worker.
        inventory: as this node knows it now; None before the first.
        take: takes an inventory of the source that counts; called on the event loop.

    Attributes:
        reads: this node reads the swarm and tells it to others; else it is told.
        server: a manager's server, None on a worker.
        listener: `server`, or what answers `mesh check --cluster` on a worker; None before the role is known.
    """

    def __init__(
        self,
        local: LocalNode,
        swarm: SwarmProvider,
        relay: RelayProvider,
        verdicts: Verdicts,
        liveness: FailureDetector,
        *,
        make_server: Callable[[bool], RelayServer],
        inventory: Callable[[], Inventory | None],
        take: Callable[[Inventory], None],
    ) -> None:
        self._local = local
        self._swarm = swarm
        self._relay = relay
        self._verdicts = verdicts
        self._liveness = liveness
        self._make_server = make_server
        self._inventory = inventory
        self._take = take
        self._changed = asyncio.Event()  # something by which the role is decided
        self._since = 0.0  # when `reads` became what it is, monotonic
        self._can_read: float | None = None  # since when it could read again, while it is told
        self._read: Inventory | None = None  # as it was read last
        self.reads = False
        self.server: RelayServer | None = None
        self.listener: RelayServer | None = None

    @property
    def source(self) -> Provider:
        """Where the inventory comes from now."""
        return self._swarm if self.reads else self._relay

    def look_again(self) -> None:
        """Decide anew: something has changed, or time has passed."""
        self._changed.set()

    def begin(self) -> None:
        """Take the first role, once the local Engine was looked at."""
        self.reads, self._since = not self._local.look.worker, time.monotonic()
        self._relay.listen(not self.reads)

    async def run(self) -> None:
        """Be a manager or a worker, until that changes; until cancelled."""
        while True:
            worker = self._local.look.worker
            tasks = self._as_worker() if worker else self._as_manager()
            log.info("this node is a worker" if worker else "this node is a manager")
            try:
                while self._local.look.worker is worker:
                    self._changed.clear()
                    self.turn(self.may_read())
                    await self._changed.wait()
            finally:
                await end(tasks)
                self.server = self.listener = self._read = None
                self._liveness.forget()

    def _as_manager(self) -> list[asyncio.Task[None]]:
        server = self.server = self.listener = self._make_server(True)
        server.tell(self.reads)
        return [supervise("swarm", lambda: self._swarm.run(self.on_read)), supervise("relay server", server.run)]

    def _as_worker(self) -> list[asyncio.Task[None]]:
        self.turn(False)
        self._verdicts.reports.clear()
        self.listener = self._make_server(False)
        return [supervise("node server", self.listener.run)]

    def may_read(self) -> bool:
        """Whether this node should read the swarm itself: a manager does, unless its Engine is away while the agents
        of other managers read theirs. It begins again once it can and the nodes' agents report to it."""
        if self._local.look.worker:
            return False
        status, now, reports = self._swarm.status(), time.monotonic(), self._verdicts.reports
        if not self.reads:
            if not status.connected or self._read is None:
                self._can_read = None
                return False
            self._can_read = now if self._can_read is None else self._can_read
            return now - self._can_read >= GATHERING or self._is_called_by_all()
        if status.connected or now - self._since < BLIND or (status.age_seconds or BLIND) < BLIND:
            return True
        ages = {node: reports.age(node) for node in self._local.look.managers if reports.of(node).reads}
        return not any(age is not None and age < BLIND for age in ages.values())

    def _is_called_by_all(self) -> bool:
        """Whether the agents of all nodes that have one, and do not count as down, are connected to this one."""
        calling = {*(self.server.nodes if self.server else ()), self._local.look.node}
        return all(n.id in calling for n in (self._inventory() or Inventory()).nodes if n.up and n.engine)

    def turn(self, reads: bool) -> None:
        """Read from now on, or be told. What was known is known until the new source has said something."""
        if reads is self.reads:
            return
        log.info("this node reads the swarm itself" if reads else "this node is told of the swarm by a manager")
        if not reads:
            self._verdicts.keep_as_told()
        self.reads, self._since, self._can_read = reads, time.monotonic(), None
        self._relay.listen(not reads)
        if reads and self._read is not None:
            self._take(self._read)
        if self.server is not None:
            self.server.tell(reads)

    def on_read(self, inventory: Inventory) -> None:
        """Take what was read of the swarm; while this node is told, it only says that it could read."""
        self._read = inventory
        if self.reads:
            self._take(inventory)
        else:
            self._changed.set()

    def on_told(self, inventory: Inventory) -> None:
        """Take what a manager tells."""
        if not self.reads:
            self._take(inventory)
