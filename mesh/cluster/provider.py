# SPDX-License-Identifier: Apache-2.0
"""One inventory on all nodes: read of the swarm or told by a manager, with what the nodes' agents know of one another.

Who reads and who is told is decided in mesh.cluster.roles; health is merged in mesh.cluster.verdicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from mesh import __version__
from mesh.cluster import wire
from mesh.cluster.agreement import Row, differences
from mesh.cluster.ask import Answer, Asker, Query
from mesh.cluster.credentials import CredentialsWatch, Files
from mesh.cluster.drains import FILE, Drains, digest
from mesh.cluster.keys import FILE as KEYS_FILE
from mesh.cluster.keys import Keys, name_of
from mesh.cluster.liveness import FailureDetector
from mesh.cluster.proofs import Proofs
from mesh.cluster.relay_client import RelayProvider
from mesh.cluster.relay_server import Questions, RelayServer
from mesh.cluster.reports import Soon
from mesh.cluster.roles import Roles
from mesh.cluster.verdicts import OnHealth, Verdicts
from mesh.config.keys import Config
from mesh.datapath.proof import Proof
from mesh.errors import MeshError
from mesh.incremental import KeyedCache, Latest
from mesh.model import Address, EngineKind, HealthView, Inventory, Node, ProofLevel, backend_of_key
from mesh.providers.base import Follower, ProviderStatus, Publish
from mesh.providers.swarm import LocalNode, SwarmProvider
from mesh.supervisor import end, supervise

log = structlog.get_logger("mesh.cluster")

REPORT_EVERY: Final = 1.0  # seconds between reports although nothing has changed: a manager may have missed one
UNHEARD: Final = 30.0  # seconds in which the agents of all nodes report to a manager that has just started
DRAIN_SOON: Final = 0.1  # likewise while what is drained is not in force here yet
GATHER_KEYS: Final = 5.0  # seconds for which a manager waits for other managers' keys, before it makes one

_Given = tuple[Node, bool, EngineKind, Address | None, ProofLevel]
"""A node, whether it answers, how it forwards, where it is reached, and how far it proves."""
Tables = Callable[[], Awaitable[tuple[int, dict[str, str]]]]


Prove = Callable[[Proof], Awaitable[None]]


async def _holds_none() -> dict[str, int]:
    return {}


async def _proves_nothing(proof: Proof) -> None:
    pass


@dataclass(frozen=True, slots=True)
class DrainHooks:
    """The agent's side of the drains that all nodes share. Things are "backend:ID" or "node:ID".

    Attributes:
        take: takes what is drained, whenever that changes; called on the event loop.
        in_force: what of it the tables follow now.
        held: connections that this node has to each drained thing.
    """

    take: Callable[[frozenset[str]], None] = lambda keys: None
    in_force: Callable[[], frozenset[str]] = frozenset
    held: Callable[[], Awaitable[dict[str, int]]] = _holds_none


def unenforced(inventory: Inventory, without_agent: Mapping[str, float], now: float) -> Iterator[str]:
    """Nodes where nobody enforces the rules of services, one sentence each. Pure.

    Args:
        without_agent: up and without a known agent, by id, and since when.
    """
    ruled = sorted(s.name for s in inventory.services if s.options.enable and (s.options.allow or s.options.deny))
    some = ", ".join(ruled[:5]) + (f" and {len(ruled) - 5} more" if len(ruled) > 5 else "")
    for node in inventory.nodes:
        since = without_agent.get(node.id)
        if ruled and since is not None and now - since > UNHEARD:
            yield (
                f"node {node.name or node.id}: no agent runs there, so Docker's mesh admits everybody to services "
                f"whose rules are in force elsewhere: {some} (start mesh there, or close its ports)"
            )


def of_this_node(
    verdicts: Mapping[str, wire.HealthReport], nodes: Mapping[str, str], own: str
) -> dict[str, wire.HealthReport]:
    """Those that this node may report: not of tasks that it had by another id, before it joined the swarm anew. Pure.

    Args:
        nodes: where each backend runs, as far as it is known.
        own: this node's id; empty: it is not known.
    """
    return {key: told for key, told in verdicts.items() if not own or nodes.get(backend_of_key(key), own) == own}


def _nodes_of_backends(inventory: Inventory | None) -> dict[str, str]:
    return {backend.id: backend.node for backend in inventory.backends} if inventory is not None else {}


class ClusterProvider:
    """A provider for every node of a swarm: mesh.providers.base.Provider and ClusterView.

    Args:
        local: this node's Engine, not yet running.
        swarm: the source that a manager reads, not yet running.
        engine: how this node forwards.
        tables: tells the generation that is applied and the digests of its tables by frontend.
        on_health: takes all nodes' verdicts, this node's among them, whenever they change; on the event loop.
        drains: what the drains that all nodes share are given to, and what this node says of them.
        answers: what other nodes may ask this one.
        prove: has this node's engine prove by these keys, and returns when it does.
    """

    def __init__(
        self,
        config: Config,
        local: LocalNode,
        swarm: SwarmProvider,
        *,
        engine: EngineKind,
        tables: Tables,
        on_health: OnHealth,
        drains: DrainHooks | None = None,
        answers: Mapping[str, Answer] | None = None,
        prove: Prove | None = None,
    ) -> None:
        self._drain_hooks = drains or DrainHooks()
        self._prove_engine = prove or _proves_nothing
        self._keys = Keys(Path(config.state_dir) / KEYS_FILE)
        self._key_period = config.key_period
        self._proofs = Proofs(self._keys, require=config.peer_proof == "require")
        self._proving: asyncio.Task[None] | None = None  # gives the engine what it proves by
        self._manages_since = 0.0  # monotonic; 0: this node is no manager
        self._drains = Drains(Path(config.state_dir) / FILE)
        self._followers: dict[str, wire.Follower] = {}  # by node
        self._port = config.cluster_port
        self._own_address = config.own_address
        self._fixed = config.managers
        self._engine = engine
        self._tables = tables
        self._credentials = CredentialsWatch(Files.of(config))
        self._answers = answers or {}
        self._asker = Asker(self._credentials, self._port, self._managers)
        self._local = local
        self._swarm = swarm
        self._publish: Publish = lambda inventory: None
        self._inventory: Inventory | None = None  # as it was read or told
        self._published: Inventory | None = None
        self._addresses: Latest[Inventory | None, dict[str, str]] = Latest(operator.is_)  # of this node's backends
        self._out_of_reach: Latest[Inventory | None, dict[str, str]] = Latest(operator.is_)  # why, by backend
        self._nodes_of: Latest[Inventory | None, dict[str, str]] = Latest(operator.is_)  # by backend
        self._told_addresses: Latest[dict[str, wire.Follower], dict[str, str]] = Latest(operator.is_)  # of all nodes
        self._shown: KeyedCache[str, _Given, Node] = KeyedCache()  # nodes with what agents say
        self._without_agent: dict[str, float] = {}  # nodes by id, and since when (monotonic) none is known there
        self._changed = asyncio.Event()  # something to report
        self._report = wire.Report({})  # this node's last
        self._relay = RelayProvider(
            self._credentials,
            self._managers,
            engine=engine,
            on_verdicts=self._on_verdicts,
            on_link=self._on_link,
            on_content=self._on_content,
            is_manager=self._is_manager,
        )
        self._pass_on_soon = Soon(self._pass_on)
        self._liveness = FailureDetector(self._port, self._address_of, self._pass_on_soon.ask)
        self._verdicts = Verdicts(
            inventory=lambda: self._inventory,
            ended=self._ended,
            unreached=self._unreached,
            addresses=lambda: self._told_addresses.of(self._followers, _all_addresses),
            hears=lambda node: self._roles.server is not None and node in self._roles.server.nodes,
            on_health=on_health,
            on_due=self._merge,
        )
        self._roles = Roles(
            local,
            swarm,
            self._relay,
            self._verdicts,
            self._liveness,
            make_server=self._make_server,
            inventory=lambda: self._inventory,
            take=self._take,
        )

    def _make_server(self, manager: bool) -> RelayServer:
        server = RelayServer(
            self._credentials,
            self._port,
            engine=self._engine,
            manager=manager,
            on_report=self._on_report,
            on_node=self._liveness.on_node,
            questions=Questions(self._answers, self._pass_question),
        )
        if self._inventory is not None:
            server.know(self._inventory)
        if not manager:
            self._manages_since = 0.0
            return server
        self._followers = {node: said for node, said in self._followers.items() if node == self._local.look.node}
        server.share(self._drains.entries, self._followers)
        server.share_keys(self._keys.entries)
        self._manages_since = time.monotonic()
        return server

    # ---- what others ask ----

    async def run(self, publish: Publish) -> None:
        """Follow until cancelled."""
        self._publish = publish
        self._drain_hooks.take(self._drains.keys)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._local.run(self._on_look))
            group.create_task(self._follow())

    async def _follow(self) -> None:
        await self._local.looked.wait()
        self._roles.begin()
        tasks = [
            supervise("relay", lambda: self._relay.run(self._roles.on_told)),
            supervise("report", self._report_forever),
        ]
        try:
            await self._roles.run()
        finally:
            await end(tasks)

    def reload(self) -> None:
        """Read again now."""
        self._roles.source.reload()

    def status(self) -> ProviderStatus:
        """How the source of the inventory is doing."""
        node = self._local.look.node or self._swarm.status().node_id
        expires, problems = self._credentials.expires(), tuple(self._problems())
        status = self._roles.source.status()
        return replace(
            status, node_id=node, problems=problems, certificate_expires=expires, left=self._credentials.left()
        )

    def _problems(self) -> Iterator[str]:
        if (listener := self._roles.listener) and listener.problem:
            manager = self._roles.server is not None
            lost = "workers are told nothing from here" if manager else "other nodes cannot check this one"
            yield f"cluster_port {listener.port}: {lost}: {listener.problem}"
        if (said := self._credentials.problem()) and (listener is None or said != listener.problem):
            yield said
        yield from self._proofs.problems(self._published.nodes if self._published else (), self._local.look.node)
        if name := self._local.encrypted:
            yield f"network {name} is encrypted, but mesh carries published ports between nodes without encryption"
        yield from unenforced(self._published or Inventory(), self._without_agent, time.monotonic())

    def own_health(self, view: HealthView) -> None:
        """See ClusterView.own_health."""
        self._verdicts.probed(view)
        self._changed.set()
        self._merge()

    async def ask(self, node: str, question: str, query: Mapping[str, str], seconds: float) -> Mapping[str, Any]:
        """See ClusterView.ask."""
        answer: Mapping[str, Any] = await self._asker.ask(node, self._address_of(node), question, query, seconds)
        return answer

    async def _pass_question(self, node: str, question: str, query: Query) -> Mapping[str, Any]:
        """Ask on behalf of a node that cannot call another."""
        answer: Mapping[str, Any] = await self._asker.ask_directly(node, self._address_of(node), question, query)
        return answer

    def cluster(self) -> Mapping[str, Any]:
        """See ClusterView.cluster."""
        server, own = self._roles.server, self._local.look.node
        if server is None or self._published is None:
            managers = ", ".join(sorted(self._local.look.managers.values()))
            raise MeshError("only a manager's agent knows all nodes", remedy=f"ask on a manager: {managers or '?'}")
        versions = {**server.nodes, own: __version__}
        rows = [self._row(node, node.id == own, versions.get(node.id, "")) for node in self._published.nodes]
        return {"nodes": [asdict(row) for row in rows], "differences": differences(rows)}

    def _row(self, node: Node, own: bool, version: str) -> Row:
        reports = self._verdicts.reports
        report = self._report if own else reports.of(node.id)
        return Row(
            node.id,
            node.name,
            str(node.address or ""),
            node.up,
            report.engine or node.engine,
            version,
            report.generation,
            0.0 if own else reports.age(node.id),
            report.digests,
        )

    # ---- proof between nodes ----

    @property
    def proof(self) -> Proof:
        """What the engine proves by and demands, as it was given last."""
        return self._proofs.last

    def _keys_changed(self) -> None:
        if (server := self._roles.server) is not None:
            server.share_keys(self._keys.entries)
        self._prove()
        self._changed.set()

    def _prove(self) -> None:
        """Give the engine what is to be proven and demanded now, unless it has that."""
        nodes = self._published.nodes if self._published is not None else ()
        proof = self._proofs.proof(nodes, self._local.look.node)
        if proof != self._proofs.last or set(self._proofs.holds) != self._keys.entries.keys():
            self._proofs.last = proof
            if self._proving is None or self._proving.done():
                self._proving = asyncio.get_running_loop().create_task(self._give_proofs())

    async def _give_proofs(self) -> None:
        """Until the engine has the last. An engine that cannot take it now gets it with the next look."""
        given = None
        while given != self._proofs.last:
            given = self._proofs.last
            try:
                await self._prove_engine(given)
            except MeshError as error:
                log.warning("the engine cannot take the swarm's keys", error=str(error))
                return
            self._proofs.holds = tuple(name_of(number) for number, _ in given.keys)
        self._changed.set()
        self._pass_on()

    def _tend_keys(self) -> None:
        """A manager makes the first key, and another one now and then; and has it used once all agents hold it."""
        server = self._roles.server
        if server is None or not self._roles.reads:
            return
        alone = len(self._local.look.managers) < 2
        waited = alone or time.monotonic() - self._manages_since >= GATHER_KEYS
        if waited and not self._keys.waiting() and self._keys.next_in(self._key_period) <= 0 and self._may_renew():
            self._keys.make()
            self._keys_changed()
        if name := self._proofs.ready(server.nodes, self._verdicts.reports.of):
            self._keys.activate(name)
            self._keys_changed()

    def _may_renew(self) -> bool:
        """Whether two new keys in a row cut off no node that has the keys and whose agent is away. What is due by
        `key_period` is made in any case."""
        if self._keys.age() >= self._key_period:
            return True
        server, own = self._roles.server, self._local.look.node
        nodes = self._published.nodes if self._published is not None else ()
        return server is not None and all(
            n.id in server.nodes or n.id == own for n in nodes if n.up and n.proof >= ProofLevel.PROVES
        )

    def _reports(self) -> dict[str, wire.Report]:
        server, own = self._roles.server, self._local.look.node
        others = {node: self._verdicts.reports.of(node) for node in (server.nodes if server is not None else ())}
        return {**others, own: wire.Report({}, proof=int(self._proofs.own), holds=self._proofs.holds)}

    def keys(self) -> Mapping[str, Any]:
        """See ClusterView.keys."""
        return {"keys": self._proofs.rows(self._reports()), "manager": self._manages}

    @property
    def _manages(self) -> bool:
        return self._roles.server is not None and self._roles.reads

    def rotate_keys(self) -> Mapping[str, Any]:
        """See ClusterView.rotate_keys."""
        if not self._manages:
            managers = ", ".join(sorted(self._local.look.managers.values())) or "none is known"
            raise MeshError("this node is no manager: managers make the swarm's keys", remedy=f"ask one: {managers}")
        if waiting := self._keys.waiting():
            missing = next((row["missing"] for row in self.keys()["keys"] if row["id"] == waiting), ())
            of = f", of {len(missing)} nodes" if missing else ""
            raise MeshError(f"key {waiting} is not in use yet: agents have still to get it{of}", remedy="mesh keys")
        self._keys.make()
        self._keys_changed()
        return self.keys()

    # ---- what is drained on all nodes ----

    def drain(self, key: str, drained: bool) -> None:
        """See ClusterView.drain."""
        self._drains.set(key, drained)
        self._take_drains()

    def followers(self) -> Mapping[str, Follower]:
        """See ClusterView.followers."""
        wanted = digest(self._drains.keys)
        return {node: Follower(said.digest == wanted, said.held) for node, said in self._followers.items()}

    def _on_report(self, node: str, report: wire.Report) -> None:
        if report.drains is None:
            self._follow_drains({each: said for each, said in self._followers.items() if each != node})
        else:
            if self._drains.merge(report.drains):
                self._take_drains()
            self._follow_drains({**self._followers, node: report.follower})
        self._verdicts.reports.take(node, report)
        if report.keys and self._keys.merge(report.keys):
            self._keys_changed()
        if self._proofs.heard(node, report, time.time()):
            self._pass_on_soon.ask()

    def _on_content(self, content: wire.Content) -> None:
        """Take what a manager tells of drains and keys; its word of this node's own agent is older than this node's."""
        if self._keys.merge(content.keys):
            self._keys_changed()
        if not self._roles.reads:
            if self._drains.merge(content.drains):
                self._take_drains()
            own = self._local.look.node
            self._follow_drains({**content.followers, **{own: self._report.follower}})

    def _take_drains(self) -> None:
        """What is drained has changed: it comes into force here, and others are told."""
        self._drain_hooks.take(self._drains.keys)
        self._changed.set()
        if (server := self._roles.server) is not None:
            server.share(self._drains.entries, self._followers)

    def _follow_drains(self, followers: dict[str, wire.Follower]) -> None:
        if followers != self._followers:
            self._followers = followers
            if (server := self._roles.server) is not None:
                server.share(self._drains.entries, followers)
            self._merge()  # the addresses that they tell

    # ---- what the local Engine and managers say ----

    def _on_look(self) -> None:
        self._roles.look_again()
        self._relay.look_again()
        if self._roles.listener is not None:
            self._roles.listener.look_again()
        self._changed.set()
        self._pass_on()

    async def _managers(self) -> Sequence[tuple[str, int]]:
        managers = self._local.look.managers
        own = managers.get(self._local.look.node)
        found = self._fixed or sorted((host, self._port) for host in managers.values())
        return [place for place in found if place[0] != own]

    def _is_manager(self, node: str) -> bool:
        """Whether a node whose certificate says so is a manager still, by the local Engine's word, where it has one."""
        managers = self._local.look.managers
        return bool(self._fixed) or not all(managers) or node in managers

    def _on_verdicts(self, view: HealthView) -> None:
        if not self._roles.reads:
            self._verdicts.told(view)
            self._merge()

    def _on_link(self, host: str, here: bool) -> None:
        """To a worker: a manager went silent or is back. The last one's silence is told by nobody else."""
        if self._roles.server is not None:
            return
        for node in (self._inventory or Inventory()).nodes:
            if host == str(node.address) or host == self._local.look.managers.get(node.id):
                self._liveness.on_node(node.id, here)

    # ---- inventory ----

    def _take(self, inventory: Inventory) -> None:
        self._inventory = inventory
        server, listener = self._roles.server, self._roles.listener
        self._verdicts.arrive(inventory, hold=server is not None)
        if listener is not None:
            listener.know(inventory)
        self._changed.set()
        self._merge()
        if not self._roles.reads:
            self._pass_on()

    def _merge(self) -> None:
        verdicts = self._verdicts.merge(reads=self._roles.reads)
        if verdicts is not None:
            self._pass_on(verdicts)

    def _pass_on(self, verdicts: dict[str, wire.HealthReport] | None = None) -> None:
        """Publish what is known now, and to other nodes where this one is a manager: with these verdicts, or those that
        are known now."""
        if self._inventory is None:
            return
        inventory, reads, server = self._inventory, self._roles.reads, self._roles.server
        if not reads:
            inventory = self._local.local_inventory(inventory)
        inventory = replace(inventory, nodes=self._nodes(inventory))
        if reads and server is not None:
            server.publish(inventory, self._verdicts.all() if verdicts is None else verdicts)
        if inventory != self._published:
            before, self._published = self._published, inventory  # publishing may lead here again
            self._prove()
            try:
                self._publish(inventory)
            except BaseException:
                self._published = before
                raise

    def _nodes(self, inventory: Inventory) -> tuple[Node, ...]:
        """Nodes with what their agents say of themselves; those that do not answer are down."""
        server = self._roles.server
        engines = {**(server.engines if server else {}), self._local.look.node: self._engine}
        lost, address = self._liveness.lost, self._verdicts.reports.address
        own = self._local.look.node
        own_address = {own: self._own_address}
        inputs = (
            (
                node.id,
                (
                    node,
                    node.up and node.id not in lost,
                    engines.get(node.id, node.engine),
                    own_address.get(node.id) or address(node.id) or node.address,
                    self._proofs.level(node, own, reads=self._roles.reads),
                ),
            )
            for node in inventory.nodes
        )
        nodes = tuple(self._shown.update(inputs, self._show).values())
        now, known = time.monotonic(), self._without_agent
        self._without_agent = {node.id: known.get(node.id, now) for node in nodes if node.up and not node.engine}
        return self._published.nodes if self._published is not None and self._published.nodes == nodes else nodes

    def _show(self, given: _Given, before: tuple[_Given, Node] | None) -> Node:
        node, up, engine, address, proof = given
        if before is not None and up and not before[1].up:
            self._relay.hurry()
        return replace(node, up=up, engine=engine, address=address, proof=proof)

    def _address_of(self, node: str) -> Address | None:
        return next((n.address for n in (self._inventory or Inventory()).nodes if n.id == node), None)

    # ---- this node's word ----

    def _ended(self) -> Mapping[str, str]:
        """Why backends of this node do not serve although other nodes take them for ready, by backend."""
        if self._roles.reads:
            return self._swarm.unseen
        if self._inventory is None:
            return {}
        node = self._local.look.node
        mine = {b.id: b for b in self._local.local_inventory(self._inventory).backends if b.node == node}
        found = {}
        for backend in self._inventory.backends:
            if backend.node == node and backend.ready:
                here = mine.get(backend.id)
                if here is None or not here.ready:
                    found[backend.id] = "not ready" if here else "no container runs"
        return found

    def _unreached(self) -> Mapping[str, str]:
        """Why this node does not reach backends that run here, by backend."""
        known = self._inventory if self._roles.reads else self._published
        return self._out_of_reach.of(known, _why_unreached)

    async def _report_forever(self) -> None:
        asked = -REPORT_EVERY
        generation, digests, held, in_force = 0, dict[str, str](), dict[str, int](), frozenset[str]()
        while True:
            self._changed.clear()
            before, in_force = in_force, self._drain_hooks.in_force()
            if time.monotonic() - asked >= REPORT_EVERY or in_force != before:  # nobody waits for digests
                generation, digests = await self._tables()
                asked = time.monotonic()
                held = await self._drain_hooks.held()
            reads = self._roles.reads and self._swarm.status().connected
            nodes = self._nodes_of.of(self._inventory, _nodes_of_backends)
            self._report = wire.Report(
                of_this_node(self._verdicts.to_report(), nodes, self._local.look.node),
                digests,
                generation,
                self._engine,
                reads=reads,
                drains=self._drains.entries,
                follower=wire.Follower(digest(in_force), held, self._addresses.of(self._published, _own_addresses)),
                address=str(self._own_address or ""),
                proof=int(self._proofs.own),
                holds=self._proofs.holds,
                keys=self._keys.entries if self._roles.server is not None else {},
                clock=time.time(),
            )
            self._follow_drains({**self._followers, self._local.look.node: self._report.follower})
            self._roles.look_again()
            if self._roles.listener is not None:
                self._roles.listener.block(self._swarm.revoked)
            self._tend_keys()
            self._prove()
            await self._relay.report(self._report)
            await asyncio.sleep(0.02)  # a burst is two reports: the first of it is waited for
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY if in_force == self._drains.keys else DRAIN_SOON):
                    await self._changed.wait()


def _own_addresses(inventory: Inventory | None) -> dict[str, str]:
    """Where this node reaches its own backends."""
    return {b.id: str(b.address) for b in (inventory or Inventory()).backends if b.local and b.address is not None}


def _why_unreached(inventory: Inventory | None) -> dict[str, str]:
    return {b.id: b.unreached for b in (inventory or Inventory()).backends if b.unreached}


def _all_addresses(followers: Mapping[str, wire.Follower]) -> dict[str, str]:
    """The same of all nodes that tell."""
    return {backend: address for said in followers.values() for backend, address in said.addresses.items()}
