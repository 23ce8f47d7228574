# SPDX-License-Identifier: Apache-2.0
"""The kernel engine: eBPF programs forward, and this process writes their maps. See docs/ARCHITECTURE.md.

Programs and maps are pinned under <bpf_fs>/mesh/<instance>/<contract>/. They keep forwarding without the agent, and the
next agent takes over what it finds. A build with another contract loads its own programs and maps next to the old ones,
switches the hooks over, and removes the old ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh._abi import ABI_VERSION
from mesh.config.keys import Config
from mesh.datapath.base import Accepted, Applied, Caller, Choice, Explanation, Plan, Signal, Stats
from mesh.datapath.counters import Failure
from mesh.datapath.kernel import loader, restore, xdp
from mesh.datapath.kernel import stats as kernel_stats
from mesh.datapath.kernel.cleanup import hand_back, take_off
from mesh.datapath.kernel.fallback import Fallback, Listeners
from mesh.datapath.kernel.gc import Collector
from mesh.datapath.kernel.heartbeat import NAME as HEARTBEAT
from mesh.datapath.kernel.heartbeat import Heartbeat
from mesh.datapath.kernel.hooks import Hooks
from mesh.datapath.kernel.journal import Journal, Names
from mesh.datapath.kernel.keeper import Keeper
from mesh.datapath.kernel.kept import Kept
from mesh.datapath.kernel.lately import Lately
from mesh.datapath.kernel.locator import Locator
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.network import Follower, Network
from mesh.datapath.kernel.path_mtu import PathMtuCheck
from mesh.datapath.kernel.pins import CONTRACT, NAMES, Owner, ensure_bpf_fs, netns_cookie, pin_home, remove_pins
from mesh.datapath.kernel.publisher import Publisher
from mesh.datapath.kernel.route_monitor import RouteMonitor
from mesh.datapath.kernel.stale_sockets import StaleSockets
from mesh.datapath.kernel.tunnel import Ids, Nodes, clock, node_config
from mesh.datapath.lookup import lookup
from mesh.datapath.losses import Losses
from mesh.datapath.netlink import Netlink, Networks
from mesh.datapath.proof import Proof
from mesh.errors import DatapathError
from mesh.model import EngineKind, Flow, Frontend, Protocol

LARGE_FEW: Final = 3  # datagrams that fit no path are not named: one teaches its sender, if it listens
UDP_SHARE: Final = 4  # mesh_revnat_udp has a fourth as many entries as mesh_revnat


@dataclass(frozen=True, slots=True)
class Parts:
    """What the engine is made of from `open` to `close`."""

    programs: Mapping[str, _bpf.Program]
    maps: KernelMaps
    nodes: Nodes
    network: Network
    publisher: Publisher
    hooks: Hooks
    keeper: Keeper
    follower: Follower
    collector: Collector
    heartbeat: Heartbeat
    stale: StaleSockets
    kept: Kept


class KernelDatapath:
    """mesh.datapath.base.Datapath over eBPF.

    Args:
        inherited: listening sockets of an earlier process' fallback proxy, by frontend; None: there was no such
            process.
        docker_host: dockerd runs on this host.
        losses: where it counts what somebody else removes of ours; None: its own.
    """

    name = EngineKind.KERNEL

    def __init__(
        self,
        config: Config,
        *,
        inherited: Listeners | None = None,
        docker_host: bool = False,
        losses: Losses | None = None,
    ) -> None:
        self._config = config
        self._state_dir = Path(config.state_dir)
        self._fallback = Fallback(config, inherited, docker_host=docker_host)
        self._journal = Journal(self._state_dir / NAMES)
        self._owner = Owner(self._state_dir)
        self._lock = threading.RLock()  # of everything that writes to the maps
        self._resources = contextlib.ExitStack()  # everything that `open` opens
        self._threads = contextlib.ExitStack()  # and what changes maps by itself, which ends first
        self._parts: Parts | None = None
        self._applied = Applied()
        self._losses = losses or Losses()
        self._proof: Proof | None = None  # None: not told yet
        self._order: kernel_stats.Order | None = None  # of what `stats` last read
        self._large: Lately[Frontend] | None = None  # datagrams that fit no path
        self._others: list[Path] = []  # pins of builds with another contract, which serve until `_switch`
        self._taking_over = False  # until the first plan: whoever served the ports before may have flows under way

    # ---- start ----

    def open(self) -> Applied:
        """Load the programs, restore what the maps hold, attach what was attached. See Datapath.open."""
        ensure_bpf_fs(Path(self._config.bpf_fs))
        self._state_dir.mkdir(parents=True, exist_ok=True)
        home = pin_home(self._config)
        self._others = [p for p in home.glob("*") if p.name != CONTRACT]
        try:
            names = self._journal.read()
            parts = self._parts = self._build(home / CONTRACT, names)
            if self._proof is not None:
                parts.nodes.prove(self._proof)
            if self._others:
                self._rebuild(parts, restore.from_journal(names))
            self._resume(parts)
        except BaseException:
            self._threads.close()
            self._resources.close()
            self._parts = None
            raise
        return self._applied

    def _build(self, directory: Path, names: Names) -> Parts:
        """Load the programs over the maps pinned in `directory`, and make the parts that work on them."""
        config, start = self._config, self._threads.enter_context
        sizes = {
            "mesh_flows": config.flow_cache,
            "mesh_revnat": config.max_replies,
            "mesh_revnat_udp": max(1024, config.max_replies // UDP_SHARE),
        }
        programs, loaded = loader.load(directory, sizes, xdp.objects(config))
        maps = KernelMaps(loaded, directory)
        self._resources.callback(maps.close)
        restore.check_hash(programs["mesh_explain"])
        if config.bpf_stats:
            self._resources.enter_context(contextlib.closing(_bpf.Statistics()))
        netlink = start(contextlib.closing(Netlink()))
        nodes = Nodes(loaded, netlink)
        networks = start(contextlib.closing(Networks()))
        network = Network(config, Locator(netlink, config.floating, networks), maps, nodes)
        maps.configure(node_config(config, netns_cookie()))
        heartbeat = Heartbeat(loaded[HEARTBEAT], config.orphan_timeout)
        self._applied = restore.from_maps(maps, names, nodes.all, pass_if_none=config.no_backend == "pass")
        if heartbeat.orphaned:
            self._applied = restore.rejoined(maps, self._applied)
        heartbeat.beat()
        publisher = Publisher(config, maps, Ids(loaded), self._applied)
        hooks = Hooks(programs, directory, config.cgroup)
        collector = start(contextlib.closing(Collector(maps.reverse, self._owner.is_ours)))
        keeper = Keeper(maps, hooks, directory, Path(config.bpf_fs), self._losses)
        follower = start(contextlib.closing(Follower(self._look, self._check, publisher.due)))
        start(contextlib.closing(RouteMonitor(loaded["mesh_fib_gen"])))
        start(contextlib.closing(PathMtuCheck(loaded["mesh_nodes"], config.peer_port, self._owner.is_ours)))
        stale = start(contextlib.closing(StaleSockets(loaded["mesh_udp_revnat"], maps.backends)))
        kept = Kept(self._state_dir, loaded["mesh_fe_metrics"].id)
        return Parts(
            programs, maps, nodes, network, publisher, hooks, keeper, follower, collector, heartbeat, stale, kept
        )

    def _rebuild(self, parts: Parts, applied: Applied) -> None:
        """Another contract serves until now: publish the same tables, and take over its flows where the structs mean
        the same. A process that was killed as it did so has left some of them, which stay."""
        applied = restore.joined(applied, self._applied)
        plan = Plan(
            applied.generation, tuple(applied.backends.values()), tuple(applied.frontends.values()), result=applied
        )
        self._applied = parts.publisher.publish(plan, self._applied, {})
        for other in self._others:
            if other.name.partition("-")[0] == str(ABI_VERSION):
                parts.maps.carry_over(other)
                parts.nodes.restore()
        parts.nodes.put(applied.nodes or ())

    def _resume(self, parts: Parts) -> None:
        """Serve what is applied, and follow the network from now on."""
        backends = self._applied.backends.values()
        parts.nodes.learn(backends)
        parts.publisher.keep(backends)
        self._taking_over = not parts.maps.served
        parts.network.follow(backends)
        parts.publisher.move(backends, parts.network.locations)
        if parts.maps.served:
            self._switch(parts)
            self._fallback.apply(self._applied, parts.network.topology.addresses)  # no plan may come
        self._owner.claim()
        parts.follower.start()

    def _opened(self) -> Parts:
        if self._parts is None:
            raise DatapathError("the kernel engine is not open")
        return self._parts

    # ---- plans ----

    def apply(self, plan: Plan) -> Applied:
        """See Datapath.apply."""
        parts = self._opened()
        with self._lock:
            self._keep(parts)  # or what is attached again below was no loss
            self._journal.put(plan, self._applied)
            if plan.put_nodes is not None:
                parts.nodes.put(plan.put_nodes)
            parts.nodes.learn(plan.put_backends)
            parts.network.prepare(plan.put_backends)
            if not self._others:
                self._attach(parts)
            self._fallback.prepare(plan, self._applied, parts.network.topology.addresses)
            left = any(
                entry.key.protocol == Protocol.UDP for entry in (*plan.drop_backends, *plan.moved(self._applied))
            )
            self._applied = parts.publisher.publish(
                plan, self._applied, parts.network.locations, taking_over=self._taking_over
            )
            self._taking_over = False
            self._journal.finish(plan, sure=not parts.publisher.failures)
            if left:
                parts.stale.end()
            parts.network.forget(plan.drop_backends)
            self._switch(parts)
            self._fallback.apply(self._applied, parts.network.topology.addresses)
            self._fallback.drop_inherited()
            parts.follower.wake()
            return self._applied

    def _attach(self, parts: Parts) -> None:
        parts.hooks.sync(parts.network.topology.interfaces, parts.network.programs())

    def _switch(self, parts: Parts) -> None:
        """The tables are published: attach, take over from builds with another contract, and remove their pins."""
        for other in self._others:
            parts.hooks.move_from(other)
        self._attach(parts)
        for other in self._others:
            remove_pins(other)
        self._others = []

    def _look(self, changed: bool) -> bool:
        """Follow the network; called by the Follower. Returns whether these maps are still this process' to write."""
        if not self._owner.is_ours():
            return False
        parts = self._opened()
        with self._lock:
            parts.publisher.release_holds(self._applied)
            backends = self._applied.backends.values()
            self._keep(parts)
            moved = parts.network.follow(backends)
            if moved or not changed:  # without a change: what failed before is tried again
                parts.publisher.move(backends, parts.network.locations)
                if parts.hooks.attached:
                    self._attach(parts)
                    self._fallback.apply(self._applied, parts.network.topology.addresses)
            if not changed:
                parts.stale.end()
        return True

    def prove(self, proof: Proof) -> None:
        """See Datapath.prove: in the tunnel by the programs, at the peer port by the fallback proxy."""
        with self._lock:
            self._proof = proof
            if self._parts is not None:
                self._parts.nodes.prove(proof)
            self._fallback.prove(proof)

    def _check(self) -> bool:
        """Look whether what is ours in the kernel is still there; as `_look`."""
        if not self._owner.is_ours():
            return False
        with self._lock:
            self._keep(self._opened())
        return True

    def _keep(self, parts: Parts) -> None:
        if not self._others:  # else another build's hooks serve until `_switch`
            parts.keeper.look(parts.network.topology.interfaces, lambda: self._attach(parts))

    # ---- heartbeat ----

    def heartbeat(self) -> bool:
        """See Datapath.heartbeat: one store."""
        parts = self._parts
        if parts is None:
            return True
        if parts.heartbeat.orphaned:
            return False
        parts.heartbeat.beat()
        parts.maps.set_clock(clock())
        self._fallback.heartbeat()
        return True

    def hung(self) -> Sequence[str]:
        """See Datapath.hung: those of the fallback proxy."""
        return self._fallback.hung()

    def rejoin(self) -> Applied:
        """See Datapath.rejoin."""
        parts = self._opened()
        with self._lock:
            if parts.heartbeat.orphaned:
                self._applied = restore.rejoined(parts.maps, self._applied)
                parts.publisher.restore({f: entry.table for f, entry in self._applied.frontends.items()})
            parts.heartbeat.beat()
        return self._applied

    # ---- reads ----

    def problems(self) -> Sequence[str]:
        """See Datapath.problems."""
        parts, applied = self._opened(), self._applied
        journal = [problem for problem in (self._journal.problem, parts.stale.problem) if problem]
        network = parts.network.problems(applied.frontends, list(applied.backends.values()))
        failures = parts.publisher.failures.values()
        large = self._too_large(parts, applied)
        return [*parts.hooks.problems, *self._fallback.problems(), *journal, *network, *failures, *large]

    def _too_large(self, parts: Parts, applied: Applied) -> Iterator[str]:
        """Ports whose datagrams are lost lately: who sends them may never be told."""
        with self._lock:
            served = dict(parts.maps.served)
        counts = kernel_stats.failures(parts.maps, served, Failure.TOO_BIG)
        if self._large is None:
            self._large = Lately(LARGE_FEW, counts)
        for frontend, _, lately in sorted(self._large.look(counts, time.monotonic()), key=lambda row: str(row[0])):
            entry = applied.frontends.get(frontend)
            name = f"service {entry.state.service_name}, {frontend}" if entry is not None else str(frontend)
            yield (
                f"{name}: datagrams that may not be cut are larger than the path to the task's node or to the client, "
                f"and are dropped, {lately} lately (send smaller ones, or raise the MTU; engine = proxy cuts them)"
            )

    def missing(self) -> Sequence[str]:
        """See Datapath.missing."""
        return [*self._losses.missing, *self._fallback.missing()]

    def stats(self) -> Stats:
        """See Datapath.stats."""
        parts = self._opened()
        with self._lock:
            applied, served = self._applied, dict(parts.maps.served)
        order = self._order = kernel_stats.Order.of(applied, served, self._order)
        stats = kernel_stats.read(parts.maps, order)
        if self._config.bpf_stats:
            stats = dataclasses.replace(stats, totals=kernel_stats.run_time(parts.programs))
        merged = self._fallback.merge(stats, applied, parts.kept)
        losses = self._losses.count + merged.totals.get("kernel_losses", 0)
        return dataclasses.replace(merged, totals={**merged.totals, "kernel_losses": losses})

    def signals(self) -> Sequence[Signal]:
        """Those of the fallback proxy: the programs forward a task's refusal to the client, and probes tell health."""
        return self._fallback.signals()

    def lookup(self, flow: Flow) -> Choice | None:
        """See Datapath.lookup."""
        applied = self._applied
        choice = lookup(applied, flow, own=self._opened().network.topology.addresses)
        if choice is not None and applied.frontends[choice.frontend].state.proxied:
            served = self._fallback.lookup(flow)
            if served is not None:
                return dataclasses.replace(choice, backend=served.backend, next=served.next)
        return choice

    def explain(self, flow: Flow) -> Explanation:
        """See Datapath.explain: a test run of mesh_explain."""
        return kernel_stats.explain(self._opened().programs["mesh_explain"], flow)

    def accepted(self, callers: Sequence[Caller]) -> Sequence[Accepted | None]:
        """See Datapath.accepted: by the fallback proxy. What the programs forward was accepted by the task itself."""
        return self._fallback.accepted(callers)

    def live_slots(self, seconds: float) -> Mapping[Frontend, frozenset[int]]:
        """See Datapath.live_slots."""
        return kernel_stats.live_slots(self._opened().maps, self._applied, seconds)

    # ---- stop ----

    def listeners(self) -> Listeners:
        """See ProxyDatapath.listeners: those of the fallback proxy."""
        return self._fallback.listeners()

    def stop_accepting(self) -> None:
        """See ProxyDatapath.stop_accepting."""
        self._fallback.stop_accepting()

    def leave(self, *, release: bool) -> None:
        """See Datapath.leave: at the peer port; in the tunnel, which outlives this process, with `release` only."""
        self._fallback.leave()
        if release:
            self._opened().maps.leave()

    def drain(self, seconds: float) -> int:
        """Wait for the fallback proxy's flows; those in the kernel go on without this process."""
        return self._fallback.drain(seconds)

    def close(self, *, release: bool) -> None:
        """Stop. The data plane lives on, unless `release` hands the ports back.

        With `release` new flows are left to whoever served the ports before, and the programs are detached when the
        flows under way have ended. Where some last longer than `drain_timeout`, the programs stay for them, and go
        with the next `mesh stop --release` or reboot.
        """
        parts = self._parts
        if parts is None:
            return
        if release:
            with self._lock:
                hand_back(parts.maps)
        self._threads.close()
        self._fallback.close()
        if release and kernel_stats.wait_for_flows(parts.maps, self._config.drain_timeout) == 0:
            take_off(pin_home(self._config), self._state_dir, [parts.hooks])
        self._resources.close()
