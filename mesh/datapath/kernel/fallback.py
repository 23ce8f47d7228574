# SPDX-License-Identifier: Apache-2.0
"""The fallback proxy: serves the flows that the eBPF programs punt to the stack, from the same slot tables.

The programs punt clients of an IP version that the task does not speak (verdict FAMILY), backends at addresses of
this node (HOST_BACKEND), and all flows of services that ask for the PROXY protocol. For tasks of other nodes they punt
what the tunnel does not carry (TUNNEL_NO_PATH, SOCKET_HANDED): flows for nodes with the proxy engine or without a path
for the tunnel, and calls of this node's own processes and containers. The fallback proxy hands those over at the other
node's peer port. A call of this node's own processes names the backend that was drawn (MESH_NAMED in abi.h).

It also listens on this node's peer port, where other nodes hand over such flows for the tasks of this one.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from mesh._maglev import SlotTable, backend_seed
from mesh.config.keys import Config
from mesh.datapath.base import (
    Accepted,
    Applied,
    BackendEntry,
    BackendKey,
    Caller,
    Choice,
    FrontendEntry,
    Plan,
    Signal,
    Stats,
    key_of,
)
from mesh.datapath.counters import CounterTable, added
from mesh.datapath.kernel.kept import Kept
from mesh.datapath.proof import NONE, Proof
from mesh.datapath.proxy.nft import NftTable, table_name
from mesh.datapath.proxy.rules import SourceRules, rules_of
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Flow, Frontend

if TYPE_CHECKING:
    from mesh.datapath.proxy.engine import ProxyDatapath


Listeners = Mapping[Frontend, Sequence[int]]  # descriptors by frontend
LINGER: Final = 5.0  # seconds for which it serves on what is no longer proxied


def needed(applied: Applied, addresses: Iterable[Address]) -> dict[Frontend, FrontendEntry]:
    """The frontends that the fallback proxy serves, each with its entry. Pure.

    A frontend that is proxied is served as it is; so is one with targets on other nodes, unless none of its targets is
    reached from here: on this node, or where the peer port answers. Any other is served on this node's addresses of the
    IP version that its targets do not speak, except loopback: the socket hooks connect local processes whatever the
    version.
    """
    own = frozenset(addresses)
    usable = sorted(
        (a for a in own if not (a.is_link_local or a.is_multicast or a.is_unspecified or a.is_loopback)),
        key=lambda a: (a.version, a),
    )
    found: dict[Frontend, FrontendEntry] = {}
    for frontend, entry in applied.frontends.items():
        # A port that is passed is not redirected: Docker's own mesh has to see it; its sockets stay for what was.
        away = any(target.via is not None for target in entry.state.targets)
        reached = any(t.weight and (t.via is None or t.handed) for t in entry.state.targets)
        if entry.state.proxied or (away and (entry.state.passing or reached)):
            found[frontend] = entry
            continue
        versions = {10 - target.address.version for target in entry.state.targets}  # 4 needs 6, 6 needs 4
        if any(target.address in own or target.address.is_loopback for target in entry.state.targets):
            versions = {4, 6}
        chosen = usable if frontend.address == ANY_ADDRESS else [frontend.address]
        for address in chosen:
            if address.version in versions:
                found[dataclasses.replace(frontend, address=address)] = entry
    return found


def for_peers(applied: Applied) -> dict[BackendKey, BackendEntry]:
    """The backends for which other nodes may hand flows over: all local ones, if there are other nodes. Pure."""
    if len(applied.nodes or ()) < 2:
        return {}
    return {key: entry for key, entry in applied.backends.items() if entry.target.via is None}


def served_as(source: FrontendEntry, frontend: Frontend, applied: Applied) -> FrontendEntry:
    """A frontend's entry as the fallback proxy serves it: where the programs' table passes flows on to it, with the
    table that they would have without. Pure."""
    state = dataclasses.replace(source.state, frontend=frontend)
    if not state.proxied or state.passing:
        return dataclasses.replace(source, state=state)
    held = ((target, applied.backends.get(key_of(state, target))) for target in state.targets)
    seeds = [(backend_seed(t.backend), entry.id, t.weight) for t, entry in held if entry is not None and t.weight]
    return dataclasses.replace(source, state=state, table=SlotTable.build(state.options.table_size, seeds))


class Fallback:
    """A ProxyDatapath that starts when the first frontend needs it, or when a second node is known."""

    def __init__(self, config: Config, inherited: Listeners | None, *, docker_host: bool) -> None:
        self._config = dataclasses.replace(config, threads=config.threads or 1)
        self._docker_host = docker_host
        self._inherited = inherited or {}  # listening sockets of an earlier process' fallback proxy
        self._proxy: ProxyDatapath | None = None
        self._applied = Applied()
        self._sources: dict[Frontend, FrontendEntry] = {}
        self._leaving: dict[Frontend, float] = {}  # until when what is no longer needed is served, monotonic
        self._peers: tuple[object, ...] = ()
        self._proof = NONE
        self._problem = ""
        if inherited is None:  # else the process that hands over may still need its table
            NftTable(table_name(config.state_dir)).delete_stale()

    def prepare(self, plan: Plan, held: Applied, addresses: Iterable[Address]) -> None:
        """Listen before the programs leave flows of a plan's frontends to it.

        Args:
            held: what is served until then.
        """
        fresh = {
            entry.state.frontend: entry
            for entry in plan.put_frontends
            if entry.state.proxied
            and ((was := held.frontends.get(entry.state.frontend)) is None or not was.state.proxied)
        }
        if fresh:
            frontends, backends = {**held.frontends, **fresh}, {**held.backends, **plan.result.backends}
            self.apply(Applied(plan.generation, frontends, backends, plan.result.nodes), addresses)

    def apply(self, applied: Applied, addresses: Iterable[Address]) -> None:
        """Serve what `applied` needs on these addresses of the node, and for a while what was proxied: a client's
        handshake may be under way. `problems` tells what fails."""
        sources = needed(applied, addresses)
        sources |= self._lingering(applied, sources)
        same = sources.keys() == self._sources.keys() and all(self._sources[f] is e for f, e in sources.items())
        peers = for_peers(applied)
        rules = rules_of(applied.frontends.values())
        same = same and self._peers == (applied.nodes, peers, rules)
        others = len(applied.nodes or ()) > 1  # they may call the peer port at any time
        if (same and not self._problem) or not (sources or others or self._proxy):
            return
        try:
            self._carry_out(applied, sources, peers, rules)
            self._peers = (applied.nodes, peers, rules)
            self._problem = ""
        except (DatapathError, ImportError, OSError) as error:
            self._problem = (
                "clients of the other IP version than their tasks', of backends at this node's own addresses, local "
                f"callers of tasks of other nodes, and nodes with the proxy engine are not served: {error}"
            )

    def _lingering(self, applied: Applied, sources: Mapping[Frontend, FrontendEntry]) -> dict[Frontend, FrontendEntry]:
        """Frontends that were proxied and are served by the programs now, with what they have there."""
        now = time.monotonic()
        left = {
            frontend: entry
            for frontend in self._sources.keys() - sources.keys()
            if (frontend in self._leaving or self._sources[frontend].state.proxied)
            and (entry := applied.frontends.get(frontend)) is not None
            and not entry.state.passing
        }
        self._leaving = {frontend: self._leaving.get(frontend, now + LINGER) for frontend in left}
        return {frontend: entry for frontend, entry in left.items() if now < self._leaving[frontend]}

    def _carry_out(
        self,
        applied: Applied,
        sources: Mapping[Frontend, FrontendEntry],
        peers: Mapping[BackendKey, BackendEntry],
        rules: Mapping[int, SourceRules],
    ) -> None:
        if self._proxy is None:
            from mesh.datapath.proxy.engine import ProxyDatapath  # noqa: PLC0415 -- only where it is needed

            self._proxy = ProxyDatapath(
                self._config, inherited=self._inherited, docker_host=self._docker_host, guard=False
            )
            self._inherited = {}
            self._proxy.open()
            self._proxy.prove(self._proof)
        entries = {
            frontend: self._applied.frontends[frontend]
            if self._sources.get(frontend) is source and frontend in self._applied.frontends
            else served_as(source, frontend, applied)
            for frontend, source in sources.items()
        }
        used = {owner for entry in entries.values() for owner in entry.backends}
        backends = {
            key: entry
            for key, entry in applied.backends.items()
            if (entry.id in used and (entry.target.via is None or entry.target.handed)) or key in peers
        }
        held = self._applied
        self._applied = self._proxy.apply(
            Plan(
                generation=applied.generation,
                put_backends=tuple(e for key, e in backends.items() if held.backends.get(key) is not e),
                put_frontends=tuple(e for f, e in entries.items() if held.frontends.get(f) is not e),
                drop_frontends=tuple(f for f in held.frontends if f not in entries),
                drop_backends=tuple(e for key, e in held.backends.items() if key not in backends),
                put_nodes=applied.nodes,
                result=Applied(applied.generation, entries, backends, applied.nodes),
            ),
            rules,
        )
        self._sources = dict(sources)

    def prove(self, proof: Proof) -> None:
        """See Datapath.prove."""
        self._proof = proof
        if self._proxy is not None:
            self._proxy.prove(proof)

    def heartbeat(self) -> None:
        """See Datapath.heartbeat."""
        if self._proxy is not None:
            self._proxy.heartbeat()

    def hung(self) -> Sequence[str]:
        """See Datapath.hung."""
        return self._proxy.hung() if self._proxy is not None else ()

    def problems(self) -> Sequence[str]:
        found = list(self._proxy.problems()) if self._proxy else []
        return [*found, self._problem] if self._problem else found

    def lookup(self, flow: Flow) -> Choice | None:
        """See Datapath.lookup."""
        return self._proxy.lookup(flow) if self._proxy else None

    def accepted(self, callers: Sequence[Caller]) -> Sequence[Accepted | None]:
        """See Datapath.accepted."""
        return self._proxy.accepted(callers) if self._proxy else [None] * len(callers)

    def missing(self) -> Sequence[str]:
        """See Datapath.missing."""
        return self._proxy.missing() if self._proxy else ()

    def signals(self) -> Sequence[Signal]:
        return self._proxy.signals() if self._proxy else ()

    def merge(self, stats: Stats, applied: Applied, kept: Kept) -> Stats:
        """The counters of both engines together, under the frontends that the user knows.

        Args:
            kept: what the proxy has counted and forgotten.
        """
        ours = self._proxy.stats() if self._proxy else Stats()

        def front(frontend: Frontend) -> Frontend | None:
            return known if (known := self._known(frontend, applied)) in stats.frontends else None

        def pair(row: tuple[Frontend, BackendKey]) -> tuple[Frontend, BackendKey] | None:
            known = self._known(row[0], applied)
            return (known, row[1].base) if known in applied.frontends and row[1] in applied.backends else None

        fronts, pairs = kept.hold(ours.frontends, ours.backends, lambda frontend: front(frontend) is not None)
        return dataclasses.replace(
            stats,
            frontends=added(CounterTable.of(stats.frontends), fronts, front),
            backends=added(CounterTable.of(stats.backends), pairs, pair),
            gauges={**ours.gauges, **stats.gauges},
            totals={**ours.totals, **stats.totals},
        )

    @staticmethod
    def _known(frontend: Frontend, applied: Applied) -> Frontend:
        return frontend if frontend in applied.frontends else dataclasses.replace(frontend, address=ANY_ADDRESS)

    def listeners(self) -> Listeners:
        """See Datapath.listeners."""
        return self._proxy.listeners() if self._proxy else {}

    def stop_accepting(self) -> None:
        """See Datapath.stop_accepting."""
        if self._proxy is not None:
            self._proxy.stop_accepting()

    def leave(self) -> None:
        """See Datapath.leave."""
        if self._proxy is not None:
            self._proxy.leave(release=True)

    def drop_inherited(self) -> None:
        """Close the inherited sockets, unless the proxy has them."""
        for fd in (fd for fds in self._inherited.values() for fd in fds):
            os.close(fd)
        self._inherited = {}

    def drain(self, seconds: float) -> int:
        return self._proxy.drain(seconds) if self._proxy else 0

    def close(self) -> None:
        self.drop_inherited()
        if self._proxy is not None:
            self._proxy.close(release=True)
            self._proxy = None
