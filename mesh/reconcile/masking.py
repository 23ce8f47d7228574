# SPDX-License-Identifier: Apache-2.0
"""This node's exceptions from the tables that all nodes agree upon: tasks that it cannot reach. Pure.

compose() says what every node serves alike. Where this node cannot reach a task, its flows must not go there while
others can serve: the target is masked, which is a drain that holds on this node only. Established flows stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mesh.model import (
    DesiredState,
    EngineKind,
    Frontend,
    FrontendState,
    Node,
    Path,
    PathState,
    PathView,
    Problem,
    Protocol,
    ProxyProtocol,
    Target,
)

_STATES: Final = {PathState.UNPROVEN: "no proven path", PathState.DOWN: "no path"}


@dataclass(slots=True)
class MaskCache:
    """What the last call made of each frontend. Not to be used by two threads at once."""

    whole: tuple[object, ...] = ()
    frontends: dict[Frontend, tuple[FrontendState, FrontendState]] = field(default_factory=dict)  # agreed, masked


def peer_path(protocol: Protocol) -> Path:
    """The path by which flows of a protocol are handed over."""
    return Path.PEER_UDP if protocol is Protocol.UDP else Path.PEER


def path_to(target: Target, protocol: Protocol, view: PathView, engine: str) -> tuple[Path, str]:
    """How this node gets to a target, and why it cannot; empty: it can.

    The tunnel joins two kernel engines. What it does not carry is handed over at the peer port.

    Args:
        engine: how this node forwards.
    """
    if target.via is None:
        return Path.LOCAL, ""
    tunnel = engine == EngineKind.KERNEL and target.engine != EngineKind.PROXY
    handed = (peer_path(protocol),)
    for path in (Path.TUNNEL, *handed) if tunnel else handed:
        if view.of(target.node, path) is PathState.UP:
            return (path if path is Path.TUNNEL else Path.PEER), ""
    states = {view.of(target.node, path) for path in ((Path.TUNNEL, *handed) if tunnel else handed)}
    worst = PathState.UNPROVEN if PathState.UNPROVEN in states else PathState.DOWN
    return Path.TUNNEL if tunnel else Path.PEER, _STATES[worst]


def mask(
    desired: DesiredState,
    view: PathView,
    nodes: Mapping[str, Node],
    engine: str,
    cache: MaskCache | None = None,
) -> DesiredState:
    """What this node serves of what all nodes agreed upon.

    A target without a proven path weighs nothing here. Where that leaves a frontend nobody, though the agreed table
    has somebody, it is `passing`: flows that start are left to Docker's own mesh.

    Args:
        view: the state of this node's paths.
        nodes: by id, for their names.
        engine: how this node forwards.
        cache: of the calls before; frontends that are as before are then the same objects.
    """
    cache = cache if cache is not None else MaskCache()
    whole = (view, engine, {node.id: node.name for node in nodes.values()})
    before = cache.frontends if whole == cache.whole else {}
    made: dict[Frontend, tuple[FrontendState, FrontendState]] = {}
    for frontend, state in desired.frontends.items():
        known = before.get(frontend)
        made[frontend] = (
            known if known is not None and known[0] is state else (state, _masked(state, view, nodes, engine))
        )
    for frontend, (state, masked) in made.items():  # equal ones stay the same object, whatever the view
        was = cache.frontends.get(frontend)
        if was is not None and was[1] is not masked and was[1] == masked:
            made[frontend] = state, was[1]
    cache.whole, cache.frontends = whole, made
    problems = [*desired.problems, *_problems([masked for state, masked in made.values() if not state.passing])]
    return replace(desired, frontends={f: masked for f, (_, masked) in made.items()}, problems=tuple(problems))


def proxied(state: FrontendState, engine: str) -> bool:
    """Whether this node's fallback proxy serves a frontend: programs cannot put the PROXY protocol before a flow."""
    announced = state.options.proxy_protocol is ProxyProtocol.V2 and state.frontend.protocol is Protocol.TCP
    return announced and engine == EngineKind.KERNEL


def _masked(state: FrontendState, view: PathView, nodes: Mapping[str, Node], engine: str) -> FrontendState:
    if proxied(state, engine):
        state, engine = replace(state, proxied=True), EngineKind.PROXY
    if all(target.via is None for target in state.targets):
        return state
    targets, by_peer = [], peer_path(state.frontend.protocol)
    for target in state.targets:
        path, why = path_to(target, state.frontend.protocol, view, engine)
        handed = target.via is None or view.of(target.node, by_peer) is PathState.UP
        if why and target.weight:
            node = nodes.get(target.node)
            name = node.name if node is not None and node.name else target.node
            masked = f"{why} to {name}"
            targets.append(replace(target, path=path, weight=0, masked=masked, agreed=target.weight, handed=handed))
        else:
            targets.append(replace(target, path=path, handed=handed))
    passing = state.passing or (any(t.weight for t in state.targets) and not any(t.weight for t in targets))
    return replace(state, targets=tuple(targets), passing=passing)


def unmasked(desired: DesiredState) -> DesiredState:
    """What was agreed upon where this is what was served."""
    states = {frontend: _unmasked(state) for frontend, state in desired.frontends.items()}
    return replace(desired, frontends=states)


def _unmasked(state: FrontendState) -> FrontendState:
    if not state.punted and all(target.path is Path.LOCAL for target in state.targets):
        return state
    targets = [
        replace(t, path=Path.LOCAL, masked="", agreed=0, weight=t.agreed or t.weight, handed=True)
        for t in state.targets
    ]
    return replace(state, targets=tuple(targets), passing=False, proxied=False)


def _problems(states: list[FrontendState]) -> list[Problem]:
    """Services of which this node reaches no task. Nodes that cannot be reached are the path monitor's to name."""
    passing = {state.service_name for state in states if state.passing}
    return [
        Problem(
            f"service {name}",
            "none of its tasks can be reached from this node, so its ports are left to Docker's own mesh here",
            "`mesh nodes` shows the paths from here to other nodes; `mesh check --cluster` tries each",
        )
        for name in sorted(passing)
    ]
