# SPDX-License-Identifier: Apache-2.0
"""The `services` of GET /state. Made on any thread from what never changes; what is as before is the same object."""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from mesh._abi import OWNER_FIRST
from mesh._maglev import SlotTable, backend_seed
from mesh.datapath.base import Applied, BackendEntry, FrontendEntry
from mesh.incremental import KeyedCache, Latest, same_objects
from mesh.model import (
    Backend,
    EngineKind,
    Frontend,
    FrontendState,
    Health,
    HealthView,
    Locality,
    Node,
    Path,
    Service,
    Target,
    port_key,
)
from mesh.options import to_plain
from mesh.reconcile.eligibility import SERVING, Drained, standing
from mesh.reconcile.loop import Picture

AT_ONCE: Final = 64  # tables that are summed while the caller waits; more are summed in the background

GONE: Final = (None, None)
NOT_KNOWN: Final = (Health.UNKNOWN, "", "")

Shown = dict[str, Any]
_Health = tuple[Health, str, str]  # verdict, reason, and where a backend of another node is reached there
_TargetInput = tuple[int, Target, Backend | None, Node | None, _Health, Drained]
"""All that is shown of a target, its slots in the table first: they change most often."""
_Targets = KeyedCache[str, _TargetInput, Shown]  # of one frontend, by backend


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is shown of a table, computed once for each."""

    table: SlotTable
    shares: Mapping[str, int]  # slots by backend
    tracked: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Input:
    """All that one service's part depends on."""

    id: str
    service: Service | None
    states: tuple[FrontendState, ...]
    served: tuple[FrontendEntry | None, ...]
    summaries: tuple[_Summary | None, ...]
    backends: tuple[Backend, ...]
    nodes: tuple[Node | None, ...]  # by backend
    drained: Drained
    health: tuple[_Health, ...]  # by target


@dataclass(frozen=True, slots=True)
class _Made:
    """One service's part, and what is kept of its frontends for the next time."""

    shown: Shown
    kept: Mapping[Frontend, tuple[str, _Targets]]  # as text, and its targets


def path_of(target: Target, engine: EngineKind) -> str:
    """How this node's engine gets to a target: "here", by "tunnel", or handed over at the other node's "peer" port."""
    if target.via is None:
        return "here"
    if target.path is Path.LOCAL:  # nothing is known of paths
        return "tunnel" if engine == EngineKind.KERNEL and target.engine != EngineKind.PROXY else "peer"
    return str(target.path.value)


def taking(backend: Backend | None, node: Node | None, target: Target, health: Health, drained: Drained) -> str:
    """Whether a target gets new connections: "yes", "no: WHY", or "yes, though WHY" where there is nobody better."""
    if target.masked:
        return f"no: masked here, {target.masked}"
    why = "gone" if backend is None else standing(backend, node, health, drained)
    if target.weight:
        return "yes" if why == SERVING else f"yes, though {why}"
    return f"no: {why}" if why != SERVING else "no: mesh.locality=local-first, and there are local ones"


class Services:
    """Remembers what it made: a scrape costs what has changed since the last one.

    Args:
        engine: how this node forwards.
    """

    def __init__(self, engine: EngineKind = EngineKind.UNKNOWN) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._summaries: dict[Frontend, _Summary] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mesh-tables")
        self._summing: Future[None] | None = None
        self._summed: Applied | None = None  # whose tables all have a summary
        self._health: Latest[HealthView, Mapping[str, _Health]] = Latest(operator.is_)
        self._each: KeyedCache[str, _Input, _Made] = KeyedCache(_same)
        self._sorted: Latest[dict[str, _Made], list[Shown]] = Latest(operator.is_)
        self._shown: Latest[tuple[object, ...], list[Shown]] = Latest(same_objects)

    def shown(self, picture: Picture, applied: Applied) -> list[Shown]:
        """Every service, sorted by name. Must not be changed by the caller."""
        with self._lock:
            self._summarize(applied)
            inputs = (picture.inventory, picture.desired, picture.health, picture.drained, applied)
            return self._shown.of((*inputs, *self._summaries.values()), lambda _: self._make(picture, applied))

    def digests(self, picture: Picture, applied: Applied) -> dict[str, str]:
        """The digest of each table on which all nodes should agree, by frontend."""
        agreed = (s for s in self.shown(picture, applied) if s["options"]["locality"] != Locality.LOCAL_FIRST.value)
        return {f["frontend"]: f["digest"] for s in agreed for f in s["frontends"] if f["digest"]}

    def _make(self, picture: Picture, applied: Applied) -> list[Shown]:
        made = self._each.update(self._inputs(picture, applied), partial(_service, self._engine))
        return self._sorted.of(made, _by_name)

    def _inputs(self, picture: Picture, applied: Applied) -> Iterator[tuple[str, _Input]]:
        services = {service.id: service for service in picture.inventory.services}
        nodes = {node.id: node for node in picture.inventory.nodes}
        states: dict[str, list[FrontendState]] = {service: [] for service in services}
        for state in picture.desired.frontends.values():
            states.setdefault(state.service, []).append(state)
        backends: dict[str, list[Backend]] = defaultdict(list)
        for backend in picture.inventory.backends:
            backends[backend.service].append(backend)
        health = self._health.of(picture.health, _health_of)
        for service, its in states.items():
            fronts = [state.frontend for state in its]
            yield (
                service,
                _Input(
                    service,
                    services.get(service),
                    tuple(its),
                    tuple([applied.frontends.get(frontend) for frontend in fronts]),
                    tuple([self._summaries.get(frontend) for frontend in fronts]),
                    tuple(backends[service]),
                    tuple([nodes.get(backend.node) for backend in backends[service]]),
                    picture.drained,
                    tuple([_said(health, target) for state in its for target in state.targets]),
                ),
            )

    def _summarize(self, applied: Applied) -> None:
        """Bring the summaries up to date: a few at once, many in the background, so that nobody waits for them."""
        if applied is self._summed:
            return
        held = applied.frontends
        for frontend in [f for f in self._summaries if f not in held]:
            del self._summaries[frontend]
        stale = [f for f, e in held.items() if (s := self._summaries.get(f)) is None or s.table is not e.table]
        if stale and len(stale) <= AT_ONCE:
            self._summaries |= _summaries(applied, stale)
            stale = []
        if not stale:
            self._summed = applied
        elif self._summing is None or self._summing.done():
            self._summing = self._worker.submit(self._sum_later, applied, stale)

    def _sum_later(self, applied: Applied, stale: Sequence[Frontend]) -> None:
        made = _summaries(applied, stale)
        with self._lock:
            self._summaries |= made


def _by_name(made: Mapping[str, _Made]) -> list[Shown]:
    return sorted([each.shown for each in made.values()], key=lambda s: (s["name"], s["id"]))


def _health_of(view: HealthView) -> Mapping[str, _Health]:
    """What is told of each backend, and by `port_key` of ports that stand otherwise."""
    told = view.verdicts.keys() | view.reasons.keys() | view.addresses.keys()
    return {name: (view.of(name), view.reasons.get(name, ""), view.addresses.get(name, "")) for name in told}


def own_address(target: Target, told: str) -> str:
    """Where a target's own node reaches it; empty: its node has not told."""
    return str(target.address) if target.via is None else told


def _said(health: Mapping[str, _Health], target: Target) -> _Health:
    """Of the port that a frontend uses."""
    whole = health.get(target.backend, NOT_KNOWN)
    verdict, reason, _ = health.get(port_key(target.backend, target.port), whole)
    return verdict, reason, whole[2]


def _same(a: _Input, b: _Input) -> bool:
    """Tables and what is held of them by identity, the rest by value."""
    held = zip((*a.served, *a.summaries), (*b.served, *b.summaries), strict=False)
    return (
        len(a.states) == len(b.states)
        and all(x is y for x, y in held)
        and (a.service, a.states, a.backends, a.health) == (b.service, b.states, b.backends, b.health)
        and (a.nodes, a.drained) == (b.nodes, b.drained)
    )


def _service(engine: EngineKind, given: _Input, before: tuple[_Input, _Made] | None) -> _Made:
    """One service. `before`: an earlier state of it, and what was made of that."""
    backends = {b.id: (b, node) for b, node in zip(given.backends, given.nodes, strict=True)}
    held = before[1].kept if before is not None else {}
    kept: dict[Frontend, tuple[str, _Targets]] = {}
    frontends = []
    health = iter(given.health)
    for state, entry, summary in zip(given.states, given.served, given.summaries, strict=True):
        name, cache = held.get(state.frontend) or (str(state.frontend), KeyedCache())
        shares = summary.shares if summary and entry else {}
        inputs = [
            (t.backend, (shares.get(t.backend, 0), t, *backends.get(t.backend, GONE), said, given.drained))
            for t, said in zip(state.targets, health, strict=False)
        ]
        frontends.append(
            {
                "frontend": name,
                "table_size": state.options.table_size,
                "tracked_slots": summary.tracked if summary and entry else 0,
                "digest": summary.digest if summary and entry else "",
                "panic": state.panic,
                "served": entry is not None,
                "targets": list(cache.update(inputs, partial(_target, engine)).values()),
            }
        )
        kept[state.frontend] = name, cache
    return _Made(_about(given, before) | {"frontends": frontends}, kept)


def _about(given: _Input, before: tuple[_Input, _Made] | None) -> Shown:
    """What does not depend on targets."""
    if before is not None and given.service is not None and given.service is before[0].service:
        return {key: before[1].shown[key] for key in ("id", "name", "ports", "options", "replicas")}
    known = given.service or given.states[0]
    name = known.name if isinstance(known, Service) else known.service_name
    ports = sorted({port.frontend for port in known.ports}) if isinstance(known, Service) else []
    return {
        "id": given.id,
        "name": name,
        "ports": [str(port) for port in ports],
        "options": to_plain(known.options),
        "replicas": known.replicas if isinstance(known, Service) else None,
    }


def _target(engine: EngineKind, given: _TargetInput, before: tuple[_TargetInput, Shown] | None) -> Shown:
    """One target. `before`: an earlier state of it, and as what that was shown: mostly only the slots differ."""
    slots, target, backend, node, (verdict, reason, told), drained = given
    if before is not None and before[0][1:] == given[1:]:
        return {**before[1], "slots": slots}
    return {
        "backend": target.backend,
        "name": backend.name if backend else "",
        "node": target.node,
        "node_name": node.name if node else "",
        "address": str(target.address),
        "own_address": own_address(target, told),
        "port": target.port,
        "weight": target.weight,
        "intent": backend.intent.value if backend else "gone",
        "taking": taking(backend, node, target, verdict, drained),
        "health": verdict.value,
        "health_reason": reason,
        "slots": slots,
        "local": target.local,
        "via": str(target.via or ""),
        "masked": target.masked,
        "path": path_of(target, engine),
    }


def _summaries(applied: Applied, frontends: Sequence[Frontend]) -> dict[Frontend, _Summary]:
    backends = {entry.id: entry for entry in applied.backends.values()}
    return {frontend: _summary(applied.frontends[frontend], backends) for frontend in frontends}


def _summary(entry: FrontendEntry, backends: Mapping[int, BackendEntry]) -> _Summary:
    names: Mapping[int, str] = {owner: backends[owner].key.backend for owner in entry.backends if owner in backends}
    table = entry.table
    if entry.state.proxied:  # the programs' table passes all flows on
        table, names = built(entry.state, {number: t.weight for number, t in numbered(entry.state).items()})
    shares: dict[str, int] = {}
    for owner, slots in table.shares().items():
        if owner in names:
            shares[names[owner]] = shares.get(names[owner], 0) + slots
    return _Summary(entry.table, shares, entry.table.tracked_slots(), _digest(entry, names))


def _digest(entry: FrontendEntry, names: Mapping[int, str]) -> str:
    """Of the table that all nodes agree upon: this node's, but for what it masks, or leaves to its fallback proxy."""
    if not entry.state.proxied and not any(target.masked for target in entry.state.targets):
        return entry.table.digest(names)
    weights = {number: target.agreed or target.weight for number, target in numbered(entry.state).items()}
    table, owners = built(entry.state, weights)
    return table.digest(owners)


def numbered(state: FrontendState) -> Mapping[int, Target]:
    """A frontend's backends by the owners that stand for them in a table of `built`."""
    return {OWNER_FIRST + number: target for number, target in enumerate(state.targets)}


def built(state: FrontendState, weights: Mapping[int, int]) -> tuple[SlotTable, Mapping[int, str]]:
    """A frontend's table with these weights, and the backends of its owners."""
    owners = numbered(state)
    rows = [(backend_seed(t.backend), number, weights[number]) for number, t in owners.items() if weights[number]]
    return SlotTable.build(state.options.table_size, rows), {number: t.backend for number, t in owners.items()}
