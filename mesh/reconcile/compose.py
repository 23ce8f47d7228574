# SPDX-License-Identifier: Apache-2.0
"""Composes inventory, health and the operator's wishes into what this node should serve. Pure."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mesh._abi import TABLE_SIZES
from mesh.config.keys import Config
from mesh.incremental import KeyedCache, Latest
from mesh.model import (
    WEIGHT_MAX,
    Address,
    Backend,
    DesiredState,
    EngineKind,
    Frontend,
    FrontendState,
    Health,
    HealthView,
    Inventory,
    Locality,
    Node,
    Problem,
    PublishedPort,
    Service,
    ServiceOptions,
    Severity,
    Target,
)
from mesh.reconcile.eligibility import SERVING, Drained, _place, left_to_docker, standing
from mesh.rules import MOST, NOBODY, compact


@dataclass(frozen=True, slots=True)
class _Member:
    """A backend of a service with the weight it would have, were it up."""

    backend: Backend
    node: Node | None
    address: Address
    weight: int
    up: bool
    away: bool = False  # it would serve, were its node not down


_Part = tuple[tuple[Problem, ...], tuple[tuple[PublishedPort, FrontendState], ...]]
_Apart = Mapping[int, Health]  # verdicts over single ports of one backend
_Input = tuple[Service, list[Backend], list[Health | None], list[_Apart | None], list[Node | None], Drained, float]
"""All that a service's part depends on; verdicts and nodes are by backend, the number is the panic threshold."""


@dataclass(slots=True)
class ComposeCache:
    """What the last compose made of each service: with it, the next one costs what has changed.

    It never changes what is composed. Not to be used by two threads at once.
    """

    parts: KeyedCache[str, _Input, _Part] = field(default_factory=KeyedCache)  # by service id
    order: Latest[list[Frontend], list[Frontend]] = field(default_factory=Latest)  # unsorted to sorted
    apart: Latest[HealthView, Mapping[str, _Apart]] = field(default_factory=lambda: Latest(operator.is_))


def compose(
    inventory: Inventory, health: HealthView, drained: Drained, config: Config, cache: ComposeCache | None = None
) -> DesiredState:
    """What the node should serve. `generation` is left at 0: the loop counts.

    A backend gets new flows while the orchestrator wants it, it is ready, neither it nor its node is drained, down or
    weighs nothing, its first probe is not pending, and probes do not say DOWN, of the port that a frontend uses.
    Otherwise it stays with weight 0, so that its flows stay. A backend of another node is reached by way of that node;
    without an address of it, it is left out. One that its own node does not reach gets no flows at all; where no other
    could serve, the frontend is left to Docker's own mesh on all nodes (`passing`). Where all that could serve are on
    nodes that are down, they are used nevertheless: it may be this node that is cut off. Where the share of backends
    that probes let through is at or below `config.panic_threshold`, the probes of that service are disregarded
    (`panic`). Two services with one frontend: the first by id keeps it.

    Args:
        cache: of the calls before, brought up to date; frontends that are as before are then the same objects.
    """
    cache = cache if cache is not None else ComposeCache()
    nodes = {node.id: node for node in inventory.nodes}
    node_of = nodes.get
    backends: defaultdict[str, list[Backend]] = defaultdict(list)
    for backend in sorted(inventory.backends, key=_by_id):
        backends[backend.service].append(backend)
    verdict = health.verdicts.get
    apart = cache.apart.of(health, HealthView.apart).get

    def inputs() -> Iterator[tuple[str, _Input]]:
        for service in services:
            its = backends[service.id]
            verdicts, on = [verdict(backend.id) for backend in its], [node_of(backend.node) for backend in its]
            ports = [apart(backend.id) for backend in its]
            yield service.id, (service, its, verdicts, ports, on, drained, config.panic_threshold)

    services = [service for service in sorted(inventory.services, key=_by_id) if service.options.enable]
    parts = cache.parts.update(inputs(), _part)
    frontends: dict[Frontend, FrontendState] = {}
    problems = list(inventory.problems)
    for service in services:
        problems += _add(frontends, service, parts[service.id])
    addresses = {node.address for node in inventory.nodes if node.address is not None}
    by_version = sorted(addresses, key=lambda a: (a.version, a.packed))
    return DesiredState(0, _sorted(frontends, cache), tuple(problems), tuple(by_version))


_by_id: Final = operator.attrgetter("id")


def _sorted(frontends: dict[Frontend, FrontendState], cache: ComposeCache) -> dict[Frontend, FrontendState]:
    return {frontend: frontends[frontend] for frontend in cache.order.of(list(frontends), sorted)}


def _member(backend: Backend, node: Node | None, address: Address, verdict: Health, drained: Drained) -> _Member:
    away = node is not None and not node.up
    reachable = replace(node, up=True) if node is not None and away else node
    probed = verdict if verdict in (Health.PENDING, Health.UNREACHED) else Health.UNKNOWN
    if standing(backend, reachable, probed, drained) != SERVING:
        return _Member(backend, node, address, 0, up=False)
    weight = min(backend.weight * (node.weight if node else 1), WEIGHT_MAX)
    return _Member(backend, node, address, weight, verdict is not Health.DOWN, away)


def _without_those_away(members: Sequence[_Member]) -> tuple[Sequence[_Member], bool]:
    """Members with no weight where their node is down, unless nobody else could serve; and whether that is so."""
    away = any(m.away for m in members)
    if not away or not any(m.weight and not m.away for m in members):
        return members, away
    return [replace(m, weight=0, up=False) if m.away else m for m in members], False


@dataclass(frozen=True, slots=True)
class _Weighed:
    """A service's backends by the verdicts over one port of theirs. `healthy` of the `eligible` are up.

    `left`: those that only Docker's own mesh reaches.
    """

    members: Sequence[_Member]
    weights: Mapping[str, int]
    panic: bool
    all_away: bool
    eligible: int
    healthy: int
    left: Sequence[Backend]

    @property
    def passing(self) -> bool:
        """Whether only Docker's own mesh can serve."""
        return bool(self.left) and not any(self.weights.values())


def _part(given: _Input, _: object) -> _Part:
    """A service by itself: problems, and what each of its ports would be."""
    service, backends, verdicts, apart, _nodes, _drained, _threshold = given
    options, unfitting = _fitting(service, sum(place is not None for place in map(_place, backends, given[4])))
    options, too_many = _within_budget(service, options)
    problems: list[Problem] = []
    states: list[tuple[PublishedPort, FrontendState]] = []
    by_verdicts: dict[tuple[Health | None, ...], _Weighed] = {}
    for port in sorted(set(service.ports)):
        found = tuple(
            verdict if its is None else its.get(backend.port or port.target, verdict)
            for backend, verdict, its in zip(backends, verdicts, apart, strict=True)
        )
        if (weighed := by_verdicts.get(found)) is None:
            weighed = by_verdicts[found] = _weigh(given, found)
            problems += _complaints(service, port, weighed, whole=found == tuple(verdicts), known=problems)
        targets = tuple(_target(m, port, weighed.weights[m.backend.id]) for m in weighed.members)
        state = FrontendState(
            port.frontend, service.id, service.name, options, targets, weighed.panic, passing=weighed.passing
        )
        states.append((port, state))
    return (*problems, *(problem for problem in (unfitting, too_many) if problem)), tuple(states)


def _weigh(given: _Input, verdicts: Sequence[Health | None]) -> _Weighed:
    service, backends, _, _, nodes, drained, panic_threshold = given
    members, all_away = _without_those_away(
        [
            _member(backend, node, place, verdict or Health.UNKNOWN, drained)
            for backend, verdict, node in zip(backends, verdicts, nodes, strict=True)
            if (place := _place(backend, node)) is not None
        ]
    )
    eligible = [m for m in members if m.weight]
    healthy = sum(m.up for m in eligible)
    panic = healthy < len(eligible) and healthy <= panic_threshold * len(eligible)
    weights = _weights(members, service.options, panic=panic)
    left = [
        backend
        for backend, verdict, node in zip(backends, verdicts, nodes, strict=True)
        if left_to_docker(backend, node, verdict, drained)
    ]
    return _Weighed(members, weights, panic, all_away, len(eligible), healthy, left)


def _complaints(
    service: Service, port: PublishedPort, found: _Weighed, *, whole: bool, known: Sequence[Problem]
) -> list[Problem]:
    """What is wrong with a service's backends: all their ports (`whole`), or this one."""
    problems = []
    if found.all_away:
        problems.append(
            Problem(
                f"service {service.name}",
                "all nodes that could serve it are down or silent, so their backends are used nevertheless",
                "`docker node ls` and `mesh check --cluster` say which, and why",
            )
        )
    if found.panic:
        problems.append(
            Problem(
                f"service {service.name}" + ("" if whole else f", port {port.published}/{port.protocol}"),
                f"{found.eligible - found.healthy} of {found.eligible} backends are down by our probes, so all are "
                "used again",
                f"`mesh backends {service.name}` has the reasons; set the label mesh.health=off if the probe is wrong",
            )
        )
    if found.left:
        names = sorted(backend.name or backend.id for backend in found.left)
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        serve = "so its ports are left to Docker's own mesh" if found.passing else "so they get no connections"
        problems.append(
            Problem(
                f"service {service.name}",
                f"{some}: leaves its node by a network by which the node itself does not reach it, such as macvlan, "
                f"{serve}",
                "take that network from the service, or publish the port in mode host",
            )
        )
    return [problem for problem in problems if problem not in known]


def _add(frontends: dict[Frontend, FrontendState], service: Service, part: _Part) -> list[Problem]:
    """Add a service's frontends to those of the services before it."""
    problems = list(part[0])
    for port, state in part[1]:
        taken = frontends.setdefault(state.frontend, state)
        if taken is not state:
            problems.append(
                Problem(
                    f"service {service.name}, port {port.published}/{port.protocol}",
                    f"{port.frontend} is already published by service {taken.service_name}, which keeps it",
                    "publish one of the two on another port",
                )
            )
    return problems


def _weights(members: Sequence[_Member], options: ServiceOptions, *, panic: bool) -> Mapping[str, int]:
    weights = {m.backend.id: m.weight if m.up or panic else 0 for m in members}
    if options.locality is Locality.LOCAL_FIRST and any(m.backend.local and weights[m.backend.id] for m in members):
        return {m.backend.id: weights[m.backend.id] if m.backend.local else 0 for m in members}
    return weights


def _fitting(service: Service, count: int) -> tuple[ServiceOptions, Problem | None]:
    """The service's options with a table that `count` backends fit in; nodes agree, since all know all backends."""
    size = service.options.table_size
    if count <= size:
        return service.options, None
    fitting = next((s for s in TABLE_SIZES if s >= count), TABLE_SIZES[-1])
    return replace(service.options, table_size=fitting), Problem(
        f"service {service.name}, table size {size}",
        f"{count} backends do not fit, so {fitting} slots are used",
        f"set mesh.table-size to {fitting} or more",
    )


def _within_budget(service: Service, options: ServiceOptions) -> tuple[ServiceOptions, Problem | None]:
    """The options with rules that there is room for; where there is none, nobody is let in, on all nodes alike."""
    if len(options.allow) + len(options.deny) <= MOST:
        return options, None
    allow, deny = compact(options.allow, options.deny)
    count = len(allow) + len(deny)
    if count <= MOST:
        return replace(options, allow=allow, deny=deny), None
    return replace(options, allow=(), deny=NOBODY), Problem(
        f"service {service.name}, mesh.allow and mesh.deny",
        f"{count} prefixes, even merged, and room for {MOST}: nobody is let in",
        "write wider networks, or filter in front of the swarm",
        Severity.CRITICAL,
    )


def _target(member: _Member, port: PublishedPort, weight: int) -> Target:
    backend, node = member.backend, member.node
    away = backend.address is None
    return Target(
        backend.id,
        member.address,
        backend.port or port.target,
        weight,
        backend.local,
        backend.node,
        backend.container,
        via=member.address if away else None,
        engine=node.engine if node is not None and away else EngineKind.UNKNOWN,
    )
