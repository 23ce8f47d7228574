# SPDX-License-Identifier: Apache-2.0
"""What a running agent shows: the implementation of mesh.api.view.AgentView over the loop and the provider."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import structlog

from mesh import __version__
from mesh._abi import ABI_VERSION
from mesh.api.connectivity import Connectivity
from mesh.api.drained import (
    DRAINED_FILE,
    PENDING,
    DrainedState,
    connections_left,
    find,
    follow_rows,
    left_without_backend,
    still_without,
)
from mesh.api.explain import Explainer
from mesh.api.fares import Fares, sentences
from mesh.api.probing import Probing
from mesh.api.rates import LEAST, MOST, rates
from mesh.api.services import Services
from mesh.api.traffic import traffic
from mesh.api.view import Json, Traffic
from mesh.datapath.base import Stats
from mesh.datapath.paths.monitor import PathMonitor
from mesh.errors import MeshError
from mesh.health.monitor import Monitor
from mesh.model import EngineKind, Flow, Inventory, Node, Problem, Severity
from mesh.providers.base import ClusterView, Follower, Provider
from mesh.reconcile.loop import Reconciler
from mesh.supervisor import FAULTS

FOLLOW: Final = 3.0  # seconds for which an answer waits until all nodes follow a drain

log = structlog.get_logger("mesh")


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the daemon runs."""

    engine: EngineKind
    engine_reason: str
    state_dir: Path
    started: float  # Unix seconds


class View:
    """See AgentView.

    Args:
        stop: how the daemon is stopped; `release` hands the ports back.
        services: what is shown of services; None: of its own.
        drained: what is drained; None: of its own, for this node only.
        cluster: of a provider that serves all nodes of a cluster.
        paths: what is known of the paths to other nodes, for who has any.
        connectivity: makes this node's calls, also for others; None: of its own.
        problems: what is wrong with the daemon itself, one sentence each.
        stopping: whether the daemon is about to end.
    """

    def __init__(
        self,
        facts: Facts,
        reconciler: Reconciler,
        provider: Provider,
        monitor: Monitor,
        stop: Callable[[bool], Awaitable[None]],
        *,
        services: Services | None = None,
        drained: DrainedState | None = None,
        cluster: ClusterView | None = None,
        paths: PathMonitor | None = None,
        connectivity: Connectivity | None = None,
        problems: Callable[[], Iterable[str]] = tuple,
        stopping: Callable[[], bool] = bool,
    ) -> None:
        self._facts = facts
        self._reconciler = reconciler
        self._provider = provider
        self._monitor = monitor
        self._stop = stop
        self._cluster = cluster
        self._paths = paths
        self._own_problems = problems
        self._stopping = stopping
        self._services = services or Services(facts.engine)
        self._explainer = Explainer(reconciler)
        self._probing = Probing(reconciler, facts.engine)
        self._connectivity = connectivity or Connectivity(reconciler)
        self.fares = Fares(self.traffic, self._problems_of_paths)  # answers for this node, too
        self._drained = drained or DrainedState(facts.state_dir / DRAINED_FILE, reconciler.set_drained)

    def state(self) -> Json:
        loop, facts = self._reconciler, self._facts
        picture, applied, drained = loop.picture, loop.applied, self._drained.now  # each is replaced whole
        status = self._provider.status()
        paths = self._problems_of_paths()
        found = self.traffic()
        return {
            "version": __version__,
            "abi": ABI_VERSION,
            "pid": os.getpid(),
            "started": facts.started,
            "engine": facts.engine,
            "engine_reason": facts.engine_reason,
            "provider": {
                "kind": status.kind,
                "connected": status.connected,
                "age_seconds": status.age_seconds,
                "error": status.error,
                "doorbell": status.doorbell,
                "certificate_expires": status.certificate_expires,
                "left": status.left,
            },
            "generation": {"desired": picture.desired.generation, "applied": applied.generation},
            "apply": msgspec.to_builtins(loop.counts),
            "guard": {"holds": loop.guard_holds, "held": len(loop.held)},
            "probes": dict(self._monitor.counts),
            "node": {"id": status.node_id, "name": _node_name(picture.inventory, status.node_id)},
            "problems": [
                *self._own_problems(),
                *(str(p) for p in picture.desired.problems),
                *(*loop.problems, *status.problems, *paths),
            ],
            "critical": [str(p) for p in _critical(picture.desired.problems)],
            "paths_down": len(paths),
            "paths_refused": self._paths.refused if self._paths else 0,
            "paths": self._path_rows(),
            "traffic": {"verdict": found.verdict.value, "reasons": list(found.reasons)},
            "services": self._services.shown(picture, applied),
            "drained": {
                "backends": sorted(drained.backends),
                "nodes": sorted(drained.nodes),
                "here": sorted(drained.here),
            },
            "stopping": self._stopping(),
            "waiting": self._waiting(),
        }

    def _waiting(self) -> str:
        """What it waits for until it knows what to serve; empty: it knows."""
        if self._reconciler.known:
            return ""
        error = self._provider.status().error
        return "nothing is known of services yet" + (f": {error}" if error else "")

    async def cluster(self) -> Json:
        if self._cluster is None:
            raise MeshError("this daemon serves one node only", where="cluster", remedy="provider = swarm serves all")
        found = self._cluster.cluster()
        told = await self.fares.of_all(self._provider.status().node_id, found["nodes"], self._cluster)
        nodes = [{**node, "traffic": _traffic_of(told.get(node["id"]))} for node in found["nodes"]]
        return {**found, "nodes": nodes, "not_well": sentences(nodes, told)}

    def nodes(self) -> Json:
        own, nodes = self._provider.status().node_id, self._reconciler.picture.inventory.nodes
        paths: dict[str, dict[str, str]] = {}
        for row in self._path_rows():
            paths.setdefault(row["node"], {})[row["path"]] = row["state"]
        shown = [
            {
                "id": node.id,
                "name": node.name,
                "address": str(node.address or ""),
                "up": node.up,
                "engine": node.engine,
                "agent": self._agent(node, own),
                "paths": paths.get(node.id, {}),
            }
            for node in nodes
        ]
        return {"node": own, "nodes": shown, "waiting": self._waiting()}

    def _agent(self, node: Node, own: str) -> str:
        """See AgentView.nodes."""
        if node.id == own:
            return "here"
        if not node.engine:
            return "none"
        return self._paths.agent(node.id) if self._paths else ""

    def _problems_of_paths(self) -> list[str]:
        return [str(problem) for problem in self._paths.problems] if self._paths else []

    def _path_rows(self) -> list[dict[str, str]]:
        found = self._paths.states() if self._paths else ()
        return [
            {"node": node.id, "node_name": node.name, "path": path.value, "state": state.value}
            for node, path, state in found
        ]

    def traffic(self) -> Traffic:
        desired = self._reconciler.picture.desired
        return traffic(desired.frontends, self._reconciler.applied.frontends, _critical(desired.problems))

    def ready(self) -> tuple[bool, Sequence[str]]:
        loop = self._reconciler
        reasons = []
        if self._stopping():
            reasons.append("stopping")
        if waiting := self._waiting():
            reasons.append(waiting)
        elif not loop.stepped:
            reasons.append("the first state is being applied")
        if loop.counts.last_error:
            reasons.append(f"the last change could not be applied: {loop.counts.last_error}")
        reasons += loop.datapath.missing()
        if stuck := loop.stuck():
            reasons.append(f"a change has been applied for {stuck:.0f} s and does not end")
        reasons += [f"part {part} of the daemon keeps failing: {why}" for part, why in FAULTS.parts.items()]
        missing = [str(f) for f in loop.picture.desired.frontends if f not in loop.applied.frontends]
        if missing:
            some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            reasons.append(f"not served: {some}")
        return not reasons, reasons

    async def stats(self) -> Stats:
        return await asyncio.to_thread(self._reconciler.datapath.stats)

    async def rates(self, seconds: float) -> Json:
        if not LEAST <= seconds <= MOST:
            raise MeshError(f"{seconds:g} is not between {LEAST:g} and {MOST:g} seconds", where="seconds")
        before, began = await self.stats(), time.monotonic()
        await asyncio.sleep(seconds)
        now = await self.stats()
        return {"backends": list(rates(before, now, time.monotonic() - began))}

    async def explain(self, flow: Flow) -> Json:
        answer = await self._explainer.explain(flow)
        if "error" in answer and "agree" not in answer and (waiting := self._waiting()):
            return {"error": waiting, "remedy": ""}
        return answer

    async def probe(self, name: str) -> Json:
        return await self._probing.probe(name, self._cluster, self._paths)

    async def connectivity(self, services: Sequence[str]) -> Json:
        if self._cluster is None:
            raise MeshError("this daemon serves one node only", remedy="provider = swarm serves all")
        if waiting := self._waiting():
            raise MeshError(waiting)
        return await self._connectivity.test(self._provider.status().node_id, services, self._cluster)

    async def set_drained(self, kind: str, name: str, drained: bool, *, local: bool = False) -> Json:
        picture = self._reconciler.picture
        inventory, now = picture.inventory, self._drained.now
        things = {t.id: t.name for t in (inventory.nodes if kind == "node" else inventory.backends)}
        known = now.nodes if kind == "node" else now.backends
        if not things and not known and (waiting := self._waiting()):
            raise MeshError(waiting)
        found = find(kind, name, things | {each: "" for each in known if each not in things})
        shared = self._cluster is not None and not local
        if self._cluster is not None and shared:
            self._cluster.drain(f"{kind}:{found}", drained)
        else:
            self._drained.set_local(kind, found, drained)
        word = "drained" if drained else "undrained"
        log.info(f"{kind} {word}", id=found, name=things.get(found, ""), local=not shared)
        rows = await self._wait_for_followers() if shared else []
        picture = replace(picture, drained=self._drained.now)
        return {
            "kind": kind,
            "id": found,
            "name": things.get(found, ""),
            "drained": drained,
            "scope": "cluster" if shared else "node",
            "nodes": rows,
            "notes": left_without_backend(picture) if drained else still_without(kind, found, picture),
        }

    async def drains(self) -> Json:
        loop = self._reconciler
        own = await asyncio.to_thread(connections_left, self._drained.now, loop.applied, loop.datapath.stats)
        followers = dict(self._cluster.followers()) if self._cluster is not None else {}
        return {"nodes": follow_rows(self._nodes(), followers), "drained": self._drained_things(own, followers)}

    def keys(self) -> Json:
        return dict(self._swarm().keys())

    def rotate_keys(self) -> Json:
        return dict(self._swarm().rotate_keys())

    def _swarm(self) -> ClusterView:
        if self._cluster is None:
            raise MeshError("this daemon serves one node only: there are no keys", remedy="provider = swarm")
        return self._cluster

    def _drained_things(self, own: Mapping[str, int], followers: Mapping[str, Follower]) -> list[Json]:
        status, now, inventory = self._provider.status(), self._drained.now, self._reconciler.picture.inventory
        up = {node.id: node.name or node.id for node in inventory.nodes if node.up and node.engine}
        found: list[Json] = []
        for key, count in sorted(own.items()):
            kind, _, identity = key.partition(":")
            names = {t.id: t.name for t in (inventory.nodes if kind == "node" else inventory.backends)}
            shared = key in now.shared and self._cluster is not None
            held = {node: followers[node].held.get(key) if node in followers else None for node in up if shared}
            held[status.node_id] = count
            found.append(
                {
                    "kind": kind,
                    "id": identity,
                    "name": names.get(identity, ""),
                    "scope": "cluster" if shared else "node",
                    "connections": sum(each for each in held.values() if each is not None),
                    "untold": sorted(up[node] for node, each in held.items() if each is None),
                }
            )
        return found

    def _nodes(self) -> Sequence[Node]:
        return self._reconciler.picture.inventory.nodes

    async def _wait_for_followers(self) -> list[Json]:
        """How each node follows, as soon as all that can do, or after a while."""
        cluster = self._cluster
        assert cluster is not None
        deadline = time.monotonic() + FOLLOW
        while True:
            rows = follow_rows(self._nodes(), cluster.followers())
            if all(row["state"] != PENDING for row in rows) or time.monotonic() > deadline:
                return rows
            await asyncio.sleep(0.05)

    async def stop(self, *, release: bool) -> None:
        await self._stop(release)


def _traffic_of(told: Json | None) -> Json | None:
    return {key: told[key] for key in ("verdict", "reasons")} if told and told["verdict"] else None


def _critical(problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.severity is Severity.CRITICAL]


def _node_name(inventory: Inventory, node: str) -> str:
    return next((n.name for n in inventory.nodes if n.id == node), "") or socket.gethostname()
