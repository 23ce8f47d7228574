# SPDX-License-Identifier: Apache-2.0
"""Writes plans to the maps, make before break: the order of steps is that of bpf/lib/maps.h."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from mesh import _abi
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import Applied, BackendEntry, FrontendEntry, Plan
from mesh.datapath.conntrack import unanswered
from mesh.datapath.kernel.acl import compile_rules
from mesh.datapath.kernel.codec import network_bits
from mesh.datapath.kernel.locator import Location, is_held
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.tunnel import Ids, seed_of
from mesh.errors import DatapathError
from mesh.model import Affinity, Frontend, Network, Path, ServiceOptions

AWAY_VERSION: Final = 4  # tasks of other nodes are reached there by docker_gwbridge, whose addresses are IPv4
HOLD: Final = 4.0  # seconds in which UDP flows from before a take-over must send to stay where they are


class Publisher:
    """Publishes backends and frontends. Not thread-safe.

    Args:
        ids: what other nodes call this node's backends.
        held: what the maps hold already.

    Attributes:
        failures: why a frontend is not served as the last plan wanted it; kept until it is, or is gone.
    """

    def __init__(self, config: Config, maps: KernelMaps, ids: Ids, held: Applied) -> None:
        self._maps = maps
        self._ids = ids
        self._pass_if_none = config.no_backend == "pass"
        self._tables = {frontend: entry.table for frontend, entry in held.frontends.items()}
        sure = (entry.state for entry in held.frontends.values() if not entry.doubtful)
        self._rules = {state.frontend: _rules_of(state.options) for state in sure}  # those that are in force
        self.failures: dict[Frontend, str] = {}
        self._placed: dict[int, Location] = {}  # as the maps hold them
        self._held_until: dict[Frontend, float] = {}  # monotonic

    def publish(
        self, plan: Plan, applied: Applied, locations: Mapping[int, Location], *, taking_over: bool = False
    ) -> Applied:
        """Carry out a plan: first what is new, then what refers to it, then what nothing refers to any more.

        A frontend that fails does not keep the others from being served: see `failures`.

        Args:
            applied: what the maps hold before.
            taking_over: whoever served the ports before may have UDP flows under way, which stay with it.

        Returns:
            What is held now: the plan's result, but for frontends that failed. These are absent, or keep their table.
        """
        self._put_backends(plan.put_backends, locations)
        self._maps.arenas.reserve(e.table.size for e in plan.put_frontends if not self._has_table(e))
        for entry in plan.put_frontends:
            try:
                self._put_frontend(entry, taking_over=taking_over)
            except DatapathError as error:
                self._close(entry, error)
            self._maps.rule_backends(entry.backends, entry.state.frontend)
        dropped = {*plan.drop_frontends, *self.failures.keys() - plan.result.frontends.keys()}
        if self._maps.unrule_backends(dropped):
            for entry in plan.result.frontends.values():
                self._maps.rule_backends(entry.backends, entry.state.frontend)
        self._ids.put(plan.put_backends)
        for frontend in dropped:
            self._maps.drop_frontend(frontend)
            self._tables.pop(frontend, None)
            self._rules.pop(frontend, None)
            self._held_until.pop(frontend, None)
            self.failures.pop(frontend, None)
        held = self._held(plan, applied)
        gone = [backend.id for backend in plan.drop_backends if backend.key not in held.backends]
        self._ids.drop(gone)
        self._maps.free_backends(gone)
        for number in gone:
            self._placed.pop(number, None)
        return held

    def _held(self, plan: Plan, applied: Applied) -> Applied:
        """The result of a plan whose frontends in `failures` keep their tables, and the backends that these name."""
        if not self.failures:
            return plan.result
        frontends, named = dict(plan.result.frontends), set[int]()
        for frontend in self.failures:
            if frontend in self._maps.served and (held := applied.frontends.get(frontend)) is not None:
                frontends[frontend] = dataclasses.replace(held, doubtful=True)
                named |= set(held.backends)
            else:
                frontends.pop(frontend, None)
        kept = {e.key: dataclasses.replace(e, doubtful=True) for e in plan.drop_backends if e.id in named}
        return dataclasses.replace(plan.result, frontends=frontends, backends={**plan.result.backends, **kept})

    def restore(self, tables: Mapping[Frontend, SlotTable]) -> None:
        """Take these for the slot tables that the maps hold."""
        self._tables = dict(tables)

    def keep(self, backends: Iterable[BackendEntry]) -> None:
        """Take from other nodes the flows of no other backends than these."""
        self._ids.keep(e.id for e in backends if e.target.via is None)

    def move(self, backends: Iterable[BackendEntry], locations: Mapping[int, Location]) -> None:
        """Publish the locations of those backends that are somewhere else than in the maps."""
        self._put_backends([e for e in backends if self._placed.get(e.id) != locations.get(e.id)], locations)

    def _put_backends(self, backends: Collection[BackendEntry], locations: Mapping[int, Location]) -> None:
        for entry in backends:
            location = locations.get(entry.id, Location())
            self._maps.put_networks(entry.id, location.networks if entry.target.via is None else (), location.source)
        self._maps.put_backends({e.id: backend_slot(e, locations.get(e.id, Location())) for e in backends})
        self._placed |= {e.id: locations[e.id] for e in backends if e.id in locations}

    def _put_frontend(self, entry: FrontendEntry, *, taking_over: bool) -> None:
        frontend, options = entry.state.frontend, entry.state.options
        new, rules = frontend not in self._maps.served, _rules_of(options)
        if new and taking_over and is_held(frontend):
            self._held_until[frontend] = time.monotonic() + HOLD
        same = not new and self._rules.pop(frontend, None) == rules
        self._maps.put_frontend(
            frontend,
            slots=None if self._has_table(entry) else entry.table.to_bytes(),
            flags=self._flags(frontend, options),
            rules=None if same else compile_rules(*rules),
        )
        self._tables[frontend], self._rules[frontend] = entry.table, rules
        self.failures.pop(frontend, None)

    def _close(self, entry: FrontendEntry, error: DatapathError) -> None:
        """A frontend could not be put: where that leaves rules that are not in force, it lets nobody in."""
        frontend, options = entry.state.frontend, entry.state.options
        served = self._maps.served.get(frontend)
        means = "it is not served" if served is None else "it is served as before"
        if served is not None and self._maps.rules_of(frontend) != frozenset(compile_rules(*_rules_of(options))):
            self._maps.put_frontend(frontend, None, self._flags(frontend, options) | _abi.FRONTEND_DENY, ())
            means = "it lets nobody in"
        self.failures[frontend] = f"frontend {frontend} of service {entry.state.service_name}: {means}: {error}"

    def _has_table(self, entry: FrontendEntry) -> bool:
        return self._tables.get(entry.state.frontend) is entry.table

    def _flags(self, frontend: Frontend, options: ServiceOptions) -> int:
        held = _abi.FRONTEND_HOLD if frontend in self._held_until else 0
        return flags_of(options, pass_if_none=self._pass_if_none) | held

    def due(self) -> float:
        """Seconds until `release_holds` has something to do; infinite: nothing is held."""
        return max(0.0, min(self._held_until.values(), default=float("inf")) - time.monotonic())

    def release_holds(self, applied: Applied) -> None:
        """Take over the UDP flows that have been idle, or that nobody has answered, since the frontend was published
        HOLD seconds ago."""
        now = time.monotonic()
        for frontend in [f for f, until in self._held_until.items() if until <= now]:
            del self._held_until[frontend]
            entry = applied.frontends.get(frontend)
            if entry is not None and frontend in self._maps.served:
                self._maps.put_frontend(frontend, None, self._flags(frontend, entry.state.options), None)
                self._maps.forget(unanswered(frontend))


def _rules_of(options: ServiceOptions) -> tuple[Sequence[Network], Sequence[Network]]:
    return options.allow, options.deny


def flags_of(options: ServiceOptions, *, pass_if_none: bool) -> int:
    """mesh_frontend.flags of a frontend that holds nothing back. Pure."""
    flags = _abi.FRONTEND_CLIENT if options.affinity is Affinity.CLIENT_IP else 0
    flags |= _abi.FRONTEND_DENY if options.allow else 0
    return flags | (_abi.FRONTEND_PASS_IF_NONE if pass_if_none else 0)


def backend_slot(entry: BackendEntry, location: Location) -> _abi.Backend:
    """A backend as the programs need it. Pure.

    Args:
        location: where it is, for a backend of this node.
    """
    target = entry.target
    slot = _abi.Backend(
        address=target.via or target.address,
        port=entry.key.port,
        protocol=entry.key.protocol,
        state=_abi.BACKEND_ACTIVE if target.weight else _abi.BACKEND_DRAINING,
    )
    if target.via is not None:
        tunnelled = entry.key.path != Path.PEER.value
        version = AWAY_VERSION if tunnelled else 0
        return slot._replace(seed=seed_of(entry.key), version=version, handed=int(target.handed))
    bridge = _abi.LOOPBACK if location.own else location.via
    networks = network_bits(location.networks) if location.source is not None else 0
    return slot._replace(ifindex=location.veth, bridge=bridge, mac=location.mac, networks=networks)
