# SPDX-License-Identifier: Apache-2.0
"""`mesh probe`: a backend is probed by its own node's agent, whichever node is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from mesh.api.drained import find
from mesh.api.services import path_of
from mesh.api.view import Json
from mesh.datapath.paths.monitor import PathMonitor
from mesh.errors import MeshError
from mesh.health.probe import ProbeError, probe
from mesh.model import Backend, EngineKind, PathState, ProbeKind, Protocol, Service, Target
from mesh.providers.base import ClusterView
from mesh.reconcile.loop import Reconciler

QUESTION: Final = "probe"
WAIT: Final = 8.0  # seconds for another node's answer
PORTS: Final = 16  # that are probed at most


class Probing:
    """Probes backends of this node for whoever asks, and asks other nodes for theirs."""

    def __init__(self, reconciler: Reconciler, engine: EngineKind) -> None:
        self._reconciler = reconciler
        self._engine = engine

    async def answer(self, query: Mapping[str, str]) -> Json:
        """Probe a backend of this node as the health monitor does, where `mesh.health=off` by TCP.

        Args:
            query: `backend`, its id.

        Returns:
            backend, name, service, address (its own), ports [{port, published [str], ok, said (why not), seconds,
            by ("tcp", "http /path")}]; no ports: it has none that can be probed.

        Raises:
            MeshError: it does not run here.
        """
        identity = query.get("backend", "")
        inventory = self._reconciler.picture.inventory
        backend = next((b for b in inventory.backends if b.id == identity), None)
        service = next((s for s in inventory.services if backend is not None and s.id == backend.service), None)
        if backend is None or service is None or not backend.local:
            raise MeshError("this node does not know it as its own", where=f"backend {identity}", remedy=_GONE)
        if backend.address is None:
            raise MeshError("it has no address on its node", where=f"backend {backend.name or identity}", remedy=_GONE)
        published: dict[int, list[str]] = {}
        for port in service.ports:
            if port.protocol is Protocol.TCP:
                published.setdefault(backend.port or port.target, []).append(str(port.frontend))
        rows = (self._probed(backend, service, port, published[port]) for port in sorted(published)[:PORTS])
        return {
            "backend": backend.id,
            "name": backend.name,
            "service": service.name,
            "address": str(backend.address),
            "ports": await asyncio.gather(*rows),
        }

    async def _probed(self, backend: Backend, service: Service, port: int, published: list[str]) -> dict[str, Any]:
        assert backend.address is not None
        check, said, began = service.options.health, "", time.monotonic()
        if check.kind is ProbeKind.OFF:
            check = replace(check, kind=ProbeKind.TCP)
        try:
            await probe(backend.address, port, check)
        except ProbeError as error:
            said = str(error)
        by = f"http {check.path}" if check.kind is ProbeKind.HTTP else "tcp"
        seconds = time.monotonic() - began
        return {"port": port, "published": published, "ok": not said, "said": said, "seconds": seconds, "by": by}

    async def probe(self, name: str, cluster: ClusterView | None, paths: PathMonitor | None) -> Json:
        """See AgentView.probe."""
        inventory = self._reconciler.picture.inventory
        identity = find("backend", name, {backend.id: backend.name for backend in inventory.backends})
        backend = next(b for b in inventory.backends if b.id == identity)
        node = next((n for n in inventory.nodes if n.id == backend.node), None)
        where = (node.name or node.id) if node is not None else backend.node
        found: dict[str, Any] = {"ports": [], "error": "", "remedy": "", "address": ""}
        try:
            if backend.local or cluster is None:
                found |= await self.answer({"backend": identity})
            else:
                found |= await cluster.ask(backend.node, QUESTION, {"backend": identity}, WAIT)
        except MeshError as error:
            found |= {"error": str(MeshError(error.message, where=error.where)), "remedy": error.remedy}
        ok = not found["error"] and all(row["ok"] for row in found["ports"])
        return {
            **found,
            "backend": identity,
            "name": backend.name,
            "node": backend.node,
            "node_name": where,
            "node_address": str(node.address or "") if node is not None else "",
            "ok": ok,
            "path": self._path(backend, paths),
        }

    def _path(self, backend: Backend, paths: PathMonitor | None) -> dict[str, Any]:
        """How this node gets there: by (here, tunnel, peer; empty: nothing leads there now), proven, states, masked."""
        target = self._target(backend)
        states = {
            path.value: state for node, path, state in (paths.states() if paths else ()) if node.id == backend.node
        }
        here = backend.local
        by = "here" if here else path_of(target, self._engine) if target is not None else ""
        masked = target.masked if target is not None else ""
        proven = here or (bool(by) and not masked and states.get(by) is PathState.UP)
        shown = {path: state.value for path, state in states.items()}
        return {"by": by, "proven": proven, "masked": masked, "states": shown}

    def _target(self, backend: Backend) -> Target | None:
        states = self._reconciler.picture.desired.frontends.values()
        its = (t for state in states if state.service == backend.service for t in state.targets)
        return next((target for target in its if target.backend == backend.id), None)


_GONE: Final = "it has gone, or is not there yet: `docker service ps SERVICE` says which"
