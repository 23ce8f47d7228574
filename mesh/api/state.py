# SPDX-License-Identifier: Apache-2.0
"""What a running agent shows: the implementation of mesh.api.view.AgentView over the loop and the provider."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from mesh import __version__
from mesh._maglev import ABI_VERSION
from mesh.api.drained import DRAINED_FILE, _find, _load_drained, _save_drained
from mesh.api.explain import Explainer
from mesh.api.services import Services
from mesh.api.view import Json
from mesh.datapath.base import Stats
from mesh.datapath.paths.monitor import PathMonitor
from mesh.errors import MeshError
from mesh.health.monitor import Monitor
from mesh.model import Flow, Inventory, Locality
from mesh.providers.base import Provider
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Reconciler

log = structlog.get_logger("mesh")


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the daemon runs."""

    engine: str
    engine_reason: str
    state_dir: Path
    started: float  # Unix seconds


class View:
    """See AgentView.

    Args:
        stop: how the daemon is stopped; `release` hands the ports back.
        ways: what is known of the ways to other nodes, for who has any.
    """

    def __init__(
        self,
        facts: Facts,
        reconciler: Reconciler,
        provider: Provider,
        monitor: Monitor,
        stop: Callable[[bool], Awaitable[None]],
        ways: PathMonitor | None = None,
    ) -> None:
        self._facts = facts
        self._reconciler = reconciler
        self._provider = provider
        self._monitor = monitor
        self._stop = stop
        self._paths = ways
        self._services = Services(facts.engine)
        self._explainer = Explainer(reconciler)
        self.stopping = False
        self.refused = ""  # why the configuration that SIGHUP read is not used
        self.obstacles: Sequence[str] = ()  # what other daemons have in the kernel
        self.drained = _load_drained(facts.state_dir / DRAINED_FILE)

    def state(self) -> Json:
        loop, facts = self._reconciler, self._facts
        picture, applied, drained = loop.picture, loop.applied, self.drained  # each is replaced whole
        status = self._provider.status()
        paths = [str(problem) for problem in self._paths.problems] if self._paths else []
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
            },
            "generation": {"desired": picture.desired.generation, "applied": applied.generation},
            "apply": msgspec.to_builtins(loop.counts),
            "guard": {"holds": loop.guard_holds, "held": len(loop.held)},
            "probes": dict(self._monitor.counts),
            "node": {"id": status.node_id, "name": _node_name(picture.inventory, status.node_id)},
            "problems": [
                *([f"configuration not used, the one before stays: {self.refused}"] if self.refused else []),
                *(str(p) for p in picture.desired.problems),
                *(*loop.problems, *self.obstacles, *status.problems, *paths),
            ],
            "paths_down": len(paths),
            "services": self._services.shown(picture, applied),
            "drained": {"backends": sorted(drained.backends), "nodes": sorted(drained.nodes)},
            "stopping": self.stopping,
        }

    async def tables(self) -> tuple[int, dict[str, str]]:
        """The generation that is applied, and the digest of each table on which all nodes should agree."""
        picture, applied = self._reconciler.picture, self._reconciler.applied
        services = await asyncio.to_thread(self._services.shown, picture, applied)
        agreed = (s for s in services if s["options"]["locality"] != Locality.LOCAL_FIRST.value)
        digests = {f["frontend"]: f["digest"] for s in agreed for f in s["frontends"] if f["digest"]}
        return applied.generation, digests

    def cluster(self) -> Json:
        ask = getattr(self._provider, "cluster", None)
        if ask is None:
            raise MeshError("this daemon serves one node only", where="cluster", remedy="provider = swarm serves all")
        answer: Json = ask()
        return answer

    def nodes(self) -> Json:
        own, nodes = self._provider.status().node_id, self._reconciler.picture.inventory.nodes
        shown = [
            {"id": n.id, "name": n.name, "address": str(n.address or ""), "up": n.up, "engine": n.engine} for n in nodes
        ]
        return {"node": own, "nodes": shown}

    def ready(self) -> tuple[bool, Sequence[str]]:
        loop = self._reconciler
        reasons = []
        if self.stopping:
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
