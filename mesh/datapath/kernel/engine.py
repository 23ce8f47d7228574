# SPDX-License-Identifier: Apache-2.0
"""The kernel engine: eBPF programs forward, this process only writes their maps. docs/ARCHITECTURE.md has the picture.

Programs and maps are pinned under <bpf_fs>/mesh/<instance>/<contract>/: traffic goes on when the agent is gone, and the
next agent adopts what it finds. Another contract is built beside, switched to, and the old one is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from mesh import _bpf
from mesh._maglev import ABI_VERSION, SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import (
    Applied,
    BackendEntry,
    Choice,
    Explanation,
    FrontendEntry,
    Plan,
    Signal,
    Stats,
)
from mesh.datapath.kernel import codec, loader, restore, xdp
from mesh.datapath.kernel import stats as kernel_stats
from mesh.datapath.kernel.acl import compile_rules
from mesh.datapath.kernel.attach import Attachments, cgroup_root
from mesh.datapath.kernel.cleanup import hand_back
from mesh.datapath.kernel.codec import BackendSlot
from mesh.datapath.kernel.fallback import Fallback, Listeners
from mesh.datapath.kernel.gc import Collector
from mesh.datapath.kernel.journal import Journal
from mesh.datapath.kernel.locator import Location, Locator, is_held, keepers, misplaced, wanted
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.pins import CONTRACT, NAMES, OWNER, ensure_bpf_fs, netns_cookie, pin_home, remove_pins
from mesh.datapath.kernel.preflight import preflight
from mesh.datapath.kernel.route_monitor import RouteWatch
from mesh.datapath.kernel.tunnel import Ids, Nodes, node_config, seed_of
from mesh.datapath.netlink import Monitor, Netlink
from mesh.model import Affinity, Flow, Frontend, ServiceOptions

AWAY_VERSION: Final = 4  # tasks of other nodes are reached there by docker_gwbridge, whose addresses are IPv4
HOLD: Final = 5.0  # seconds in which UDP flows that were there before a take-over must speak to stay where they are
QUIET: Final = 0.05  # seconds between two looks at the network, however fast it changes
LOOK: Final = 5.0  # seconds after which to look although nothing was announced

log = structlog.get_logger(__name__)


class KernelDatapath:
    """mesh.datapath.base.Datapath over eBPF."""

    name = "kernel"

    def __init__(self, config: Config, *, inherited: Listeners | None = None, docker_host: bool = False) -> None:
        self._config = config
        self._fallback = Fallback(config, inherited, docker_host=docker_host)
        self._patterns = [p.strip() for p in config.interfaces.split(",") if p.strip()]
        self._lock = threading.RLock()
        self._names = Journal(Path(config.state_dir) / NAMES)
        self._owner = Path(config.state_dir) / OWNER
        self._token = f"{os.getpid()} {time.monotonic_ns()}"
        self._applied = Applied()
        self._tables: dict[Frontend, SlotTable] = {}
        self._locator: dict[int, Location] = {}
        self._placed: dict[int, Location] = {}  # as the maps have them
        self._problems: list[str] = []
        self._holding: dict[Frontend, float] = {}  # until when, monotonic
        self._others: list[Path] = []  # pins of builds with another contract
        self._attached = False
        self._moved = True  # the network, since the last whole look at backends
        self._taking_over = False
        self._stopping = threading.Event()
        self._follower: threading.Thread | None = None

    # ---- start ----

    def open(self) -> Applied:
        """Load, adopt, attach what was attached. See Datapath.open."""
        ensure_bpf_fs(Path(self._config.bpf_fs))
        Path(self._config.state_dir).mkdir(parents=True, exist_ok=True)
        home = pin_home(self._config)
        directory = self._directory = home / CONTRACT
        self._others = [p for p in home.glob("*") if p.name != directory.name]
        sizes = {"mesh_flows": self._config.flow_cache, "mesh_revnat": self._config.max_replies}
        self._programs, maps = loader.load(directory, sizes, xdp.objects(self._config))
        self._maps = KernelMaps(maps, directory)
        restore.check_hash(self._programs["mesh_explain"])
        self._order: kernel_stats.Order | None = None  # of what stats() last read
        self._statistics = _bpf.Statistics() if self._config.bpf_stats else None
        self._monitor, self._routes = Monitor(), RouteWatch(maps["mesh_fib_gen"])
        self._netlink = Netlink()
        self._finder = Locator(self._netlink, self._config.floating)
        self._attach = Attachments(self._programs, directory / "links")
        self._xdp = xdp.XdpStage(self._programs.get(xdp.PROGRAM), directory / "links")
        self._nodes, self._ids = Nodes(maps, self._netlink), Ids(maps)
        self._maps.configure(node_config(self._config, netns_cookie()))
        names = self._names.read()
        self._applied = restore.adopted(self._maps, names, self._nodes.all)
        self._tables = {frontend: entry.table for frontend, entry in self._applied.frontends.items()}
        if self._others and not self._maps.served:
            self._rebuild(restore.rebuilt(names))
        self._nodes.learn(self._applied.backends.values())
        self._ids.keep(e.id for e in self._applied.backends.values() if e.target.via is None)
        self._taking_over = not self._maps.served
        self._look()
        self._place_all()
        if self._maps.served:
            self._switch()
            self._fallback.apply(self._applied, self._finder.topology.addresses)  # no plan may come
        try:
            self._owner.write_text(self._token)
        except OSError:  # no room: the lock of the state directory has to do
            self._owner.unlink(missing_ok=True)
        self._follower = threading.Thread(target=self._follow, name="mesh-kernel-follow", daemon=True)
        self._follower.start()
        self._collector = Collector(self._maps.reverse, self._is_owner)
        return self._applied

    def _rebuild(self, applied: Applied) -> None:
        """Another contract served until now: publish the same tables, and take its flows over where they mean the
        same."""
        self._maps.put_backends({entry.id: self._slot(entry) for entry in applied.backends.values()})
        self._ids.put(applied.backends.values())
        for entry in applied.frontends.values():
            self._put_frontend(entry)
        self._applied = applied
        for other in self._others:
            if other.name.partition("-")[0] == str(ABI_VERSION):
                self._maps.carry_over(other)
                self._nodes.adopt()
        self._nodes.put(applied.nodes or ())

    # ---- plans ----

    def apply(self, plan: Plan) -> Applied:
        """See Datapath.apply. Steps are those of bpf/lib/maps.h."""
        with self._lock:
            self._names.put(plan, self._applied)
            if plan.put_nodes is not None:
                self._nodes.put(plan.put_nodes)
            self._nodes.learn(plan.put_backends)
            self._refresh()
            self._locator |= self._find(plan.put_backends)
            if not self._others:
                self._sync()
            self._maps.put_backends({e.id: self._slot(e) for e in plan.put_backends})
            self._ids.put(plan.put_backends)
            self._maps.arenas.reserve(e.table.size for e in plan.put_frontends if not self._has_table(e))
            for entry in plan.put_frontends:
                self._put_frontend(entry)
            for frontend in plan.drop_frontends:
                self._maps.drop_frontend(frontend)
                self._tables.pop(frontend, None)
                self._holding.pop(frontend, None)
            self._ids.drop(e.id for e in plan.drop_backends)
            self._maps.free_backends(e.id for e in plan.drop_backends)
            self._applied = plan.result
            self._taking_over = False
            self._names.drop(plan)
            for gone in plan.drop_backends:
                self._locator.pop(gone.id, None)
            self._placed = dict(self._locator)
            self._switch()
            self._fallback.apply(self._applied, self._finder.topology.addresses)
            self._fallback.drop_inherited()
            self._monitor.wake()
            return self._applied

    def _slot(self, entry: BackendEntry) -> BackendSlot:
        target, place = entry.target, self._locator.get(entry.id, Location())
        slot = BackendSlot(
            address=target.via or target.address,
            port=entry.key.port,
            protocol=entry.key.protocol,
            state=codec.BACKEND_ACTIVE if target.weight else codec.BACKEND_DRAINING,
            epoch=0,
        )
        if target.via is not None:
            return dataclasses.replace(slot, seed=seed_of(entry.key), version=AWAY_VERSION)
        bridge = codec.LOOPBACK if place.own else place.via
        return dataclasses.replace(slot, ifindex=place.veth, bridge=bridge, mac=place.mac)

    def _put_frontend(self, entry: FrontendEntry) -> None:
        frontend, options = entry.state.frontend, entry.state.options
        held = self._applied.frontends.get(frontend)
        new = frontend not in self._maps.served
        if new and self._taking_over and is_held(frontend):
            self._holding[frontend] = time.monotonic() + HOLD
        same_rules = (
            not new
            and held is not None
            and (held.state.options.allow, held.state.options.deny) == (options.allow, options.deny)
        )
        self._maps.put_frontend(
            frontend,
            slots=None if self._has_table(entry) else entry.table.to_bytes(),
            flags=self._flags(frontend, options),
            rules=None if same_rules else compile_rules(options.allow, options.deny),
        )
        self._tables[frontend] = entry.table

    def _has_table(self, entry: FrontendEntry) -> bool:
        return self._tables.get(entry.state.frontend) is entry.table

    def _flags(self, frontend: Frontend, options: ServiceOptions) -> int:
        flags = codec.FRONTEND_CLIENT if options.affinity is Affinity.CLIENT_IP else 0
        flags |= codec.FRONTEND_DENY if options.allow else 0
        flags |= codec.FRONTEND_PASS_IF_NONE if self._config.no_backend == "pass" else 0
        return flags | (codec.FRONTEND_HOLD if frontend in self._holding else 0)

    # ---- what happens around us ----

    def _refresh(self) -> None:
        """See the network as it is now."""
        self._moved = self._finder.refresh() or self._moved
        self._maps.set_addresses(self._finder.topology.addresses, self._finder.floating)
        self._nodes.refresh(self._finder.topology)
        self._maps.listen(self._config.tunnel_port if self._nodes.held else 0)

    def _find(self, backends: Iterable[BackendEntry]) -> dict[int, Location]:
        return {e.id: self._finder.find(e.target.address) for e in backends if e.target.via is None}

    def _look(self) -> bool:
        """See where the backends are now. Returns whether any may be somewhere else."""
        self._refresh()
        backends = self._applied.backends.values()
        if self._moved:
            self._locator = self._find(backends)
            self._moved = False
            return True
        again = self._finder.open()
        found = self._find(e for e in backends if e.target.address in again) if again else {}
        self._locator |= found
        return bool(found)

    def _place_all(self) -> None:
        """Write where backends are, of those that are somewhere else than in the maps."""
        moved = [e for e in self._applied.backends.values() if self._placed.get(e.id) != self._locator.get(e.id)]
        self._maps.put_backends({e.id: self._slot(e) for e in moved})
        self._placed = dict(self._locator)

    def _sync(self) -> None:
        """Have the programs where they belong."""
        topology = self._finder.topology
        if not self._attached:
            self._attach.adopt(topology.interfaces)
            self._xdp.adopt()
            self._attached = True
        programs = wanted(topology, self._locator.values(), self._patterns, self._nodes.interfaces)
        problems = self._attach.sync(programs) + self._xdp.sync(topology.interfaces, programs)
        group = Path(self._config.cgroup) if self._config.cgroup else cgroup_root()
        self._problems = problems + self._attach.sync_sockets(group) + keepers(topology.interfaces, programs)

    def _switch(self) -> None:
        """Tables are published: attach; take over from builds with another contract, and remove their pins."""
        for other in self._others:
            self._attach.move_from(other / "links")
        self._sync()
        for other in self._others:
            remove_pins(other)
        self._others = []

    def _follow(self) -> None:
        """Thread: containers, interfaces and addresses come and go."""
        started = time.monotonic()
        while not self._stopping.is_set():
            try:
                event = self._monitor.wait(self._wait_for())
                started = time.monotonic()
                if self._stopping.is_set() or not self._is_owner():
                    return
                with self._lock:
                    self._release_holds()
                    if self._look() or not event:  # without an event: what failed before is tried again
                        self._place_all()
                        if self._attached:
                            self._sync()
                            self._fallback.apply(self._applied, self._finder.topology.addresses)
            except Exception as error:  # the next look tries again
                if not self._stopping.is_set():
                    log.warning("network change not followed", error=str(error))
            self._stopping.wait(max(QUIET, 4 * (time.monotonic() - started)))

    def _is_owner(self) -> bool:
        """Whether no other process has taken the maps over since: they have one writer."""
        try:
            return self._owner.read_text() == self._token
        except FileNotFoundError:
            return True

    def _wait_for(self) -> float:
        return max(0.0, min([LOOK, *(until - time.monotonic() for until in self._holding.values())]))

    def _release_holds(self) -> None:
        now = time.monotonic()
        for frontend in [f for f, until in self._holding.items() if until <= now]:
            del self._holding[frontend]
            entry = self._applied.frontends.get(frontend)
            if entry is not None and frontend in self._maps.served:
                self._maps.put_frontend(frontend, None, self._flags(frontend, entry.state.options), None)

    # ---- reads ----

    def problems(self) -> Sequence[str]:
        """See Datapath.problems."""
        found = misplaced(list(self._applied.backends.values()), self._locator)
        nodes = self._nodes.problems(self._applied.frontends, self._config.tunnel_port)
        names = [self._names.problem] if self._names.problem else []
        return [*self._problems, *self._fallback.problems(), *nodes, *names, *found]

    def stats(self) -> Stats:
        """See Datapath.stats."""
        with self._lock:
            applied, served = self._applied, dict(self._maps.served)
        order = self._order = kernel_stats.Order.of(applied, served, self._order)
        stats = kernel_stats.read(self._maps, order)
        if self._statistics is not None:
            stats = dataclasses.replace(stats, totals=kernel_stats.run_time(self._programs))
        return self._fallback.merge(stats, applied)

    def signals(self) -> Sequence[Signal]:
        """Of the proxy beside only: in the kernel a task's refusal goes to the client, and probes tell health."""
        return self._fallback.signals()

    def lookup(self, flow: Flow) -> Choice | None:
        """See Datapath.lookup."""
        return kernel_stats.lookup(self._applied, self._finder.topology.addresses, flow)

    def explain(self, flow: Flow) -> Explanation:
        """See Datapath.explain: a test run of mesh_explain."""
        return kernel_stats.explain(self._programs["mesh_explain"], flow)

    def live_slots(self, seconds: float) -> Mapping[Frontend, frozenset[int]]:
        """See Datapath.live_slots."""
        return kernel_stats.live_slots(self._maps, self._applied, seconds)

    # ---- stop ----

    def listeners(self) -> Listeners:
        """See Datapath.listeners: those of the fallback proxy."""
        return self._fallback.listeners()

    def stop_accepting(self) -> None:
        """See Datapath.stop_accepting."""
        self._fallback.stop_accepting()

    def drain(self, seconds: float) -> int:
        """Flows in the kernel go on without this process; those of the proxy beside are waited for."""
        return self._fallback.drain(seconds)

    def close(self, *, release: bool) -> None:
        """Stop. The data plane lives on; with `release` flows that start are left to who served the ports before, and
        all is taken off once the flows under way have ended. Where some last longer than `drain_timeout`, the programs
        stay for them, and go with the next `mesh stop --release` or reboot."""
        if release:
            with self._lock:
                hand_back(self._maps)
        self._stopping.set()
        with contextlib.suppress(AttributeError):
            self._routes.close()
            self._monitor.wake()
        if self._follower is not None:
            self._follower.join()
            self._collector.close()
            self._fallback.close()
            self._monitor.close()
            self._netlink.close()
            if release and kernel_stats.wait_for_flows(self._maps, self._config.drain_timeout) == 0:
                self._xdp.detach()
                self._attach.detach()
                remove_pins(self._directory)
                with contextlib.suppress(OSError):
                    self._directory.parent.rmdir()
                self._names.remove()
                self._owner.unlink(missing_ok=True)
            if self._statistics is not None:
                self._statistics.close()
            self._maps.close()


__all__ = ["KernelDatapath", "preflight"]
