# SPDX-License-Identifier: Apache-2.0
"""One inventory on all nodes: a manager's agent reads the swarm and tells the others, a worker's agent is told.

Which of the two a node is, is looked up all the time: promotion and demotion need no restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import structlog

from mesh import __version__
from mesh.cluster import wire
from mesh.cluster.agreement import Row, differences
from mesh.cluster.credentials import CredentialsWatch, Files
from mesh.cluster.liveness import FailureDetector
from mesh.cluster.readiness import ReadinessGate
from mesh.cluster.relay_client import RelayProvider, view_of
from mesh.cluster.relay_server import RelayServer
from mesh.cluster.reports import Deaths, Reports, Soon
from mesh.config.keys import Config
from mesh.errors import MeshError
from mesh.model import Address, Health, HealthView, Inventory, Node
from mesh.providers.base import Provider, ProviderStatus, Publish
from mesh.providers.swarm import LocalNode, SwarmProvider
from mesh.supervisor import end, supervise

BLIND: Final = 3.0  # seconds after which a manager whose Engine does not answer is told by another
GATHERING: Final = 5.0  # seconds at most for which a manager that can read again waits until all nodes' agents call it
REPORT_EVERY: Final = 1.0  # seconds between reports although nothing has changed: a manager may have missed one

Tables = Callable[[], Awaitable[tuple[int, dict[str, str]]]]

log = structlog.get_logger("mesh.cluster")


async def _no_tables() -> tuple[int, dict[str, str]]:
    return 0, {}


class ClusterProvider:
    """A provider for every node of a swarm; see mesh.providers.base.Provider.

    Before `run`, set `engine` to how this node forwards, `tables` to what tells the generation that is applied and
    the digests of its tables by frontend, and `on_health` to what takes all nodes' verdicts, this node's among them,
    whenever they change.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._fixed = config.managers
        self._credentials = CredentialsWatch(Files.of(config))
        self._local = LocalNode(config, self._on_look)
        self._swarm = SwarmProvider(config)
        self._server: RelayServer | None = None
        self._listener: RelayServer | None = None  # the same, on a worker what answers `mesh check --cluster`
        self._relay = RelayProvider(
            self._credentials, self._managers, on_verdicts=self._on_verdicts, on_link=self._on_link
        )
        self._publish: Publish = lambda inventory: None
        self._source: Provider = self._swarm
        self._reads = False  # this node reads the swarm and tells it; else it is told
        self._since = 0.0  # when that began, monotonic
        self._can_read: float | None = None  # since when it could read again, while it is told
        self._read: Inventory | None = None  # as it was read last
        self._inventory: Inventory | None = None  # as it was read or told
        self._published: Inventory | None = None
        self._reports = Reports(self._merge_health)
        self._pass_on_soon = Soon(self._pass_on)
        self._told = HealthView()  # by managers, to a worker
        self._own = HealthView()
        self._health = HealthView()
        self._shown: dict[str, tuple[Node, Node]] = {}  # a node as it was told, and with what agents say
        self._readiness = ReadinessGate(lambda node: self._server is not None and node in self._server.nodes)
        self._let_in: asyncio.TimerHandle | None = None  # when the next newcomer has been waited for long enough
        self._liveness = FailureDetector(config.cluster_port, self._address_of, self._pass_on_soon.ask)
        self._changed = asyncio.Event()  # something to report
        self._role = asyncio.Event()  # the role has changed
        self._report = wire.Report({})  # this node's last
        self._deaths = Deaths()
        self.engine = ""
        self.tables: Tables = _no_tables
        self.on_health: Callable[[HealthView], None] = lambda view: None

    # ---- what others ask ----

    async def run(self, publish: Publish) -> None:
        """Follow until cancelled."""
        self._publish, self._relay.engine = publish, self.engine
        async with asyncio.TaskGroup() as group:
            group.create_task(self._local.run())
            group.create_task(self._play())

    def reload(self) -> None:
        """Read again now."""
        self._source.reload()

    def status(self) -> ProviderStatus:
        """How the source of the inventory is doing."""
        node = self._local.look.node or self._swarm.status().node_id
        return replace(self._source.status(), node_id=node, problems=tuple(self._problems()))

    def _problems(self) -> Iterator[str]:
        if (listener := self._listener) and listener.problem:
            lost = "other nodes cannot check this one" if self._server is None else "workers are told nothing from here"
            yield f"cluster_port {listener.port}: {lost}: {listener.problem}"
        if (said := self._credentials.problem()) and (listener is None or said != listener.problem):
            yield said

    def own_health(self, view: HealthView) -> None:
        """Take what this node's probes say."""
        self._own = view
        self._changed.set()
        self._merge_health()

    def cluster(self) -> dict[str, Any]:
        """All nodes side by side, and where they differ.

        Raises:
            MeshError: this node is a worker, which is told services, but not of other agents.
        """
        if self._server is None or self._published is None:
            managers = ", ".join(sorted(self._local.look.managers.values()))
            raise MeshError("only a manager's agent knows all nodes", remedy=f"ask on a manager: {managers or '?'}")
        versions = {**self._server.nodes, self._local.look.node: __version__}
        rows = []
        for node in self._published.nodes:
            own = node.id == self._local.look.node
            report = self._report if own else self._reports.of(node.id)
            rows.append(
                Row(
                    node.id,
                    node.name,
                    str(node.address or ""),
                    node.up,
                    report.engine or node.engine,
                    versions.get(node.id, ""),
                    report.generation,
                    0.0 if own else self._reports.age(node.id),
                    report.digests,
                )
            )
        return {"nodes": [asdict(row) for row in rows], "differences": differences(rows)}

    # ---- roles ----

    def _on_look(self) -> None:
        self._role.set()
        self._relay.look_again()
        self._changed.set()
        self._pass_on()

    def _may_read(self) -> bool:
        """Whether this node should read the swarm itself: a manager does, unless its Engine is away while the agents
        of other managers read theirs. It begins again once it can and the nodes' agents report to it."""
        if self._local.look.worker:
            return False
        status, now = self._swarm.status(), time.monotonic()
        if not self._reads:
            if not status.connected or self._read is None:
                self._can_read = None
                return False
            self._can_read = now if self._can_read is None else self._can_read
            return now - self._can_read >= GATHERING or self._is_called_by_all()
        if status.connected or now - self._since < BLIND or (status.age_seconds or BLIND) < BLIND:
            return True
        ages = {node: self._reports.age(node) for node in self._local.look.managers if self._reports.of(node).reads}
        return not any(age is not None and age < BLIND for age in ages.values())

    def _is_called_by_all(self) -> bool:
        """Whether the agents of all nodes that have one, and do not count as down, are connected to this one."""
        calling = {*(self._server.nodes if self._server else ()), self._local.look.node}
        return all(n.id in calling for n in (self._inventory or Inventory()).nodes if n.up and n.engine)

    async def _play(self) -> None:
        """Be a manager or a worker, until that changes."""
        await self._local.looked.wait()
        self._reads, self._since = not self._local.look.worker, time.monotonic()
        self._source = self._swarm if self._reads else self._relay
        self._relay.listen(not self._reads)
        common = [
            supervise("relay", lambda: self._relay.run(self._on_told)),
            supervise("report", self._report_forever),
        ]
        try:
            while True:
                worker = self._local.look.worker
                tasks = self._as_worker() if worker else self._as_manager()
                log.info("this node is a worker" if worker else "this node is a manager")
                try:
                    while self._local.look.worker is worker:
                        self._role.clear()
                        self._turn(self._may_read())
                        await self._role.wait()
                finally:
                    await end(tasks)
                    self._server = self._listener = self._read = None
                    self._liveness.forget()
        finally:
            await end(common)

    def _as_manager(self) -> list[asyncio.Task[None]]:
        server = self._server = self._listener = RelayServer(
            self._credentials,
            self._config.cluster_port,
            engine=self.engine,
            on_report=self._reports.take,
            on_node=self._liveness.on_node,
        )
        server.tell(self._reads)
        return [supervise("swarm", lambda: self._swarm.run(self._on_read)), supervise("relay server", server.run)]

    def _as_worker(self) -> list[asyncio.Task[None]]:
        self._turn(False)
        self._reports.clear()
        port = self._config.cluster_port
        self._listener = RelayServer(self._credentials, port, engine=self.engine, manager=False)
        return [supervise("node server", self._listener.run)]

    def _turn(self, reads: bool) -> None:
        """Read from now on, or be told. What was known is known until the new source has said something."""
        if reads is self._reads:
            return
        log.info("this node reads the swarm itself" if reads else "this node is told of the swarm by a manager")
        self._told = view_of(self._verdicts()) if self._reads else self._told
        self._reads, self._since, self._can_read = reads, time.monotonic(), None
        self._source = self._swarm if reads else self._relay
        self._relay.listen(not reads)
        if reads and self._read is not None:
            self._take(self._read)
        if self._server is not None:
            self._server.tell(reads)

    def _on_read(self, inventory: Inventory) -> None:
        self._read = inventory
        if self._reads:
            self._take(inventory)
        else:
            self._role.set()

    def _on_told(self, inventory: Inventory) -> None:
        if not self._reads:
            self._take(inventory)

    async def _managers(self) -> Sequence[tuple[str, int]]:
        managers = self._local.look.managers
        own = managers.get(self._local.look.node)
        found = self._fixed or sorted((host, self._config.cluster_port) for host in managers.values())
        return [place for place in found if place[0] != own]

    # ---- inventory ----

    def _take(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._readiness.take(inventory, hold=self._server is not None)
        if self._server is not None:
            self._server.know(inventory)
        self._changed.set()
        self._merge_health()
        if not self._reads:
            self._pass_on()

    def _pass_on(self, verdicts: dict[str, wire.HealthReport] | None = None) -> None:
        """Publish what is known now, and to other nodes where this one is a manager: with these verdicts, or those that
        are known now."""
        if self._inventory is None:
            return
        inventory = self._inventory
        if not self._reads:
            inventory = self._local.local_inventory(inventory)
        inventory = replace(inventory, nodes=self._nodes(inventory))
        if self._reads and self._server is not None:
            self._server.publish(inventory, self._verdicts() if verdicts is None else verdicts)
        if inventory != self._published:
            self._published = inventory
            self._publish(inventory)

    def _nodes(self, inventory: Inventory) -> tuple[Node, ...]:
        """Nodes with what their agents say of themselves; those that do not answer are down."""
        engines = {**(self._server.engines if self._server else {}), self._local.look.node: self.engine}
        before, self._shown = self._shown, {}
        for node in inventory.nodes:
            up, engine = node.up and node.id not in self._liveness.lost, engines.get(node.id, node.engine)
            known = before.get(node.id)
            if known is None or known[0] is not node or (known[1].up, known[1].engine) != (up, engine):
                if known is not None and up and not known[1].up:
                    self._relay.hurry()
                known = node, replace(node, up=up, engine=engine)
            self._shown[node.id] = known
        nodes = tuple(shown for _, shown in self._shown.values())
        return self._published.nodes if self._published is not None and self._published.nodes == nodes else nodes

    def _address_of(self, node: str) -> Address | None:
        return next((n.address for n in (self._inventory or Inventory()).nodes if n.id == node), None)

    def _on_link(self, host: str, here: bool) -> None:
        """To a worker: a manager went silent or is back. The last one's silence is told by nobody else."""
        if self._server is not None:
            return
        for node in (self._inventory or Inventory()).nodes:
            if host == str(node.address) or host == self._local.look.managers.get(node.id):
                self._liveness.on_node(node.id, here)

    # ---- health ----

    def _on_verdicts(self, view: HealthView) -> None:
        if not self._reads:
            self._told = view
            self._merge_health()

    def _verdicts(self) -> dict[str, wire.HealthReport]:
        """All that is known of all backends: what each node says of its own, and who is new."""
        found = self._reports.verdicts
        known = {b.id for b in self._inventory.backends} if self._inventory else set()
        said = {key: verdict for key, verdict in {**found, **self._own_verdicts()}.items() if key in known}
        return self._readiness.apply(said)

    def _own_verdicts(self) -> dict[str, wire.HealthReport]:
        """This node's word for its own backends; one that the others cannot see to have ended, or to be unready, is
        down to them."""
        found = {
            key: wire.health_report(health, self._own.reasons.get(key, ""))
            for key, health in self._own.verdicts.items()
            if health is not Health.UNKNOWN
        }
        if self._reads:
            return found | {t: wire.health_report(Health.DOWN, why) for t, why in self._swarm.unseen.items()}
        if self._inventory is None:
            return found
        node = self._local.look.node
        mine = {b.id: b for b in self._local.local_inventory(self._inventory).backends if b.node == node}
        for backend in self._inventory.backends:
            if backend.node == node and backend.ready:
                here = mine.get(backend.id)
                if here is None or not here.ready:
                    found[backend.id] = wire.health_report(Health.DOWN, "not ready" if here else "no container runs")
        return found

    def _merge_health(self) -> None:
        verdicts = self._verdicts() if self._reads else None
        others = self._told if verdicts is None else view_of(verdicts)
        told = others.of
        own = {k: v for k, v in self._own.verdicts.items() if v is Health.UP or told(k) is not Health.PENDING}
        view = HealthView(
            {**others.verdicts, **own},
            {**{k: r for k, r in others.reasons.items() if k not in own}, **self._own.reasons},
        )
        if view != self._health:
            self._health = view
            self.on_health(view)
        if verdicts is not None:
            self._pass_on(verdicts)
        self._let_in_later()

    def _let_in_later(self) -> None:
        if self._let_in is not None:
            self._let_in.cancel()
        due = self._readiness.due if self._reads else None
        self._let_in = None if due is None else asyncio.get_running_loop().call_later(due, self._merge_health)

    async def _report_forever(self) -> None:
        asked = -REPORT_EVERY
        generation, digests = 0, dict[str, str]()
        while True:
            self._changed.clear()
            if time.monotonic() - asked >= REPORT_EVERY:  # others wait for verdicts, nobody for digests
                generation, digests = await self.tables()
                asked = time.monotonic()
            reads = self._reads and self._swarm.status().connected
            verdicts = self._deaths.keep(self._own_verdicts(), self._inventory)
            self._report = wire.Report(verdicts, digests, generation, self.engine, reads=reads)
            self._role.set()  # have it looked at
            await self._relay.report(self._report)
            await asyncio.sleep(0.02)  # a burst is two reports: the first of it is waited for
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY):
                    await self._changed.wait()
