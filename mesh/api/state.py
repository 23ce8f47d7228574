# SPDX-License-Identifier: Apache-2.0
"""What a running agent shows: the implementation of mesh.api.view.AgentView over the loop and the provider."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from mesh import __version__
from mesh._abi import ABI_VERSION
from mesh.api.drained import DRAINED_FILE, _find, _load_drained, _save_drained
from mesh.api.explain import Explainer
from mesh.api.services import Services
from mesh.api.traffic import traffic
from mesh.api.view import Json, Traffic
from mesh.datapath.base import Stats
from mesh.datapath.paths.monitor import PathMonitor
from mesh.errors import MeshError
from mesh.health.monitor import Monitor
from mesh.model import EngineKind, Flow, Inventory
from mesh.providers.base import ClusterView, Provider
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Reconciler

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
        cluster: of a provider that serves all nodes of a cluster.
        paths: what is known of the paths to other nodes, for who has any.
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
        cluster: ClusterView | None = None,
        paths: PathMonitor | None = None,
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
        self.drained = _load_drained(facts.state_dir / DRAINED_FILE)

    def state(self) -> Json:
        loop, facts = self._reconciler, self._facts
        picture, applied, drained = loop.picture, loop.applied, self.drained  # each is replaced whole
        status = self._provider.status()
        paths = [str(problem) for problem in self._paths.problems] if self._paths else []
        found = traffic(picture.desired.frontends, applied.frontends)
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
            "paths_down": len(paths),
            "paths": self._path_rows(),
            "traffic": {"verdict": found.verdict.value, "reasons": list(found.reasons)},
            "services": self._services.shown(picture, applied),
            "drained": {"backends": sorted(drained.backends), "nodes": sorted(drained.nodes)},
            "stopping": self._stopping(),
        }

    def cluster(self) -> Json:
        if self._cluster is None:
            raise MeshError("this daemon serves one node only", where="cluster", remedy="provider = swarm serves all")
        return self._cluster.cluster()

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
                "paths": paths.get(node.id, {}),
            }
            for node in nodes
        ]
        return {"node": own, "nodes": shown}

    def _path_rows(self) -> list[dict[str, str]]:
        found = self._paths.states() if self._paths else ()
        return [
            {"node": node.id, "node_name": node.name, "path": path.value, "state": state.value}
            for node, path, state in found
        ]

    def traffic(self) -> Traffic:
        return traffic(self._reconciler.picture.desired.frontends, self._reconciler.applied.frontends)

    def ready(self) -> tuple[bool, Sequence[str]]:
        loop = self._reconciler
        reasons = []
        if self._stopping():
            reasons.append("stopping")
        if not loop.known:
            error = self._provider.status().error
            reasons.append("nothing is known of services yet" + (f": {error}" if error else ""))
        elif not loop.stepped:
            reasons.append("the first state is being applied")
        if loop.counts.last_error:
            reasons.append(f"the last change could not be applied: {loop.counts.last_error}")
        missing = [str(f) for f in loop.picture.desired.frontends if f not in loop.applied.frontends]
        if missing:
            some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            reasons.append(f"not served: {some}")
        return not reasons, reasons

    async def stats(self) -> Stats:
        return await asyncio.to_thread(self._reconciler.datapath.stats)

    async def explain(self, flow: Flow) -> Json:
        return await self._explainer.explain(flow)

    async def set_drained(self, kind: str, name: str, drained: bool) -> Json:
        inventory = self._reconciler.picture.inventory
        old = self.drained.nodes if kind == "node" else self.drained.backends
        things = {t.id: t.name for t in (inventory.nodes if kind == "node" else inventory.backends)}
        found = _find(kind, name, things | {known: "" for known in old if known not in things})
        new = old | {found} if drained else old - {found}
        if kind == "node":
            self.drained = Drained(self.drained.backends, new)
        else:
            self.drained = Drained(new, self.drained.nodes)
        _save_drained(self._facts.state_dir / DRAINED_FILE, self.drained)
        self._reconciler.set_drained(self.drained)
        log.info(f"{kind} {'drained' if drained else 'undrained'}", id=found, name=things.get(found, ""))
        return {"kind": kind, "id": found, "name": things.get(found, ""), "drained": drained}

    async def stop(self, *, release: bool) -> None:
        await self._stop(release)


def _node_name(inventory: Inventory, node: str) -> str:
    return next((n.name for n in inventory.nodes if n.id == node), "") or socket.gethostname()
