# SPDX-License-Identifier: Apache-2.0
"""What a running agent shows: the implementation of mesh.metrics.view.AgentView over the loop and the provider."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from mesh import __version__
from mesh._maglev import ABI_VERSION, SlotTable
from mesh.datapath.base import OWNER_NONE, OWNER_PASS, Applied, BackendEntry, Choice, FrontendEntry, Stats
from mesh.errors import MeshError
from mesh.health.monitor import Monitor
from mesh.metrics.view import Json
from mesh.model import Backend, Flow, Frontend, FrontendState, Inventory, ServiceOptions, Target
from mesh.provider import Provider
from mesh.reconcile.compose import SERVING, Drained, standing
from mesh.reconcile.loop import Reconciler
from mesh.reconcile.plan import key_of

DRAINED_FILE: Final = "drained.json"

log = structlog.get_logger("mesh")


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the daemon runs."""

    engine: str
    engine_reason: str
    state_dir: Path
    started: float  # Unix seconds


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is shown of a table, computed once for each."""

    table: SlotTable
    shares: Mapping[int, int]
    tracked: int
    digest: str


def _summary(entry: FrontendEntry, backends: Mapping[int, BackendEntry]) -> _Summary:
    names = {owner: backends[owner].key.backend for owner in entry.backends if owner in backends}
    table = entry.table
    return _Summary(table, table.shares(), table.tracked_slots(), table.digest(names))


class View:
    """See AgentView.

    Args:
        stop: how the daemon is stopped; `release` hands the ports back.
    """

    def __init__(
        self,
        facts: Facts,
        reconciler: Reconciler,
        provider: Provider,
        monitor: Monitor,
        stop: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._facts = facts
        self._reconciler = reconciler
        self._provider = provider
        self._monitor = monitor
        self._stop = stop
        self._summaries: dict[Frontend, _Summary] = {}
        self._summing: asyncio.Task[None] | None = None
        self.stopping = False
        self.drained = _load_drained(facts.state_dir / DRAINED_FILE)

    def state(self) -> Json:
        loop, facts = self._reconciler, self._facts
        status = self._provider.status()
        self._summarize()
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
            "generation": {"desired": loop.picture.desired.generation, "applied": loop.applied.generation},
            "apply": msgspec.to_builtins(loop.counts),
            "guard": {"holds": loop.guard_holds, "held": len(loop.held)},
            "probes": dict(self._monitor.counts),
            "node": {"id": status.node_id, "name": _node_name(loop.picture.inventory, status.node_id)},
            "problems": [*(str(p) for p in loop.picture.desired.problems), *loop.problems],
            "services": self._services(),
            "drained": {"backends": sorted(self.drained.backends), "nodes": sorted(self.drained.nodes)},
            "stopping": self.stopping,
        }

    def _services(self) -> list[dict[str, Any]]:
        picture = self._reconciler.picture
        backends = {backend.id: backend for backend in picture.inventory.backends}
        services: dict[str, dict[str, Any]] = {
            s.id: {"id": s.id, "name": s.name, "options": _options(s.options), "frontends": []}
            for s in picture.inventory.services
        }
        for state in picture.desired.frontends.values():
            plain = {"id": state.service, "name": state.service_name, "options": _options(state.options)}
            service = services.setdefault(state.service, plain | {"frontends": []})
            service["frontends"].append(self._frontend(state, backends))
        return sorted(services.values(), key=lambda s: (s["name"], s["id"]))

    def _frontend(self, state: FrontendState, backends: Mapping[str, Backend]) -> dict[str, Any]:
        entry = self._reconciler.applied.frontends.get(state.frontend)
        summary = self._summaries.get(state.frontend) if entry else None
        return {
            "frontend": str(state.frontend),
            "table_size": state.options.table_size,
            "tracked_slots": summary.tracked if summary else 0,
            "digest": summary.digest if summary else "",
            "panic": state.panic,
            "served": entry is not None,
            "targets": [
                self._target(state, target, backends.get(target.backend), summary.shares if summary else {})
                for target in state.targets
            ],
        }

    def _target(
        self, state: FrontendState, target: Target, backend: Backend | None, shares: Mapping[int, int]
    ) -> dict[str, Any]:
        entry = self._reconciler.applied.backends.get(key_of(state, target))
        health = self._reconciler.picture.health
        return {
            "backend": target.backend,
            "name": backend.name if backend else "",
            "node": target.node,
            "address": str(target.address),
            "port": target.port,
            "weight": target.weight,
            "intent": backend.intent.value if backend else "gone",
            "health": health.of(target.backend).value,
            "health_reason": health.reasons.get(target.backend, ""),
            "slots": shares.get(entry.id, 0) if entry else 0,
            "local": target.local,
        }

    def _summarize(self) -> None:
        """Bring the summaries up to date: a few at once, many from a thread, so that the loop is not held up."""
        applied = self._reconciler.applied
        stale = [f for f, e in applied.frontends.items() if f not in self._summaries or self._is_stale(f, e)]
        for frontend in [f for f in self._summaries if f not in applied.frontends]:
            del self._summaries[frontend]
        if stale and len(stale) <= 4:
            self._summaries |= _summaries(applied, stale)
        elif stale and (self._summing is None or self._summing.done()):
            self._summing = asyncio.create_task(self._sum_later(applied, stale))

    def _is_stale(self, frontend: Frontend, entry: FrontendEntry) -> bool:
        return self._summaries[frontend].table is not entry.table

    async def _sum_later(self, applied: Applied, stale: Sequence[Frontend]) -> None:
        for start in range(0, len(stale), 16):
            self._summaries |= await asyncio.to_thread(_summaries, applied, stale[start : start + 16])

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
        choice = await asyncio.to_thread(self._reconciler.datapath.lookup, flow)
        if choice is None:
            return {
                "error": f"{flow.destination} port {flow.destination_port}/{flow.protocol} is not published here",
                "remedy": "`mesh services` lists what is",
            }
        entry = self._reconciler.applied.frontends.get(choice.frontend)
        tracked = entry.table.slot(choice.slot)[2] if entry is not None else False
        names = {e.id: e for e in self._reconciler.applied.backends.values()}
        return {
            "frontend": str(choice.frontend),
            "service": entry.state.service_name if entry else "",
            "hash": choice.hash,
            "table_size": entry.table.size if entry else 0,
            "slot": choice.slot,
            "current": _owner(choice.owner, names),
            "previous": _owner(choice.previous, names),
            "tracked": tracked,
            "backend": self._described(choice.backend) if choice.backend else None,
            "reasons": self._reasons(choice, entry, tracked),
            "next": [self._described(backend) for backend in choice.next],
        }

    def _described(self, entry: BackendEntry) -> dict[str, Any]:
        backends = {backend.id: backend for backend in self._reconciler.picture.inventory.backends}
        known = backends.get(entry.key.backend)
        health = self._reconciler.picture.health
        return {
            "backend": entry.key.backend,
            "name": known.name if known else "",
            "node": entry.target.node,
            "address": str(entry.target.address),
            "port": entry.target.port,
            "health": health.of(entry.key.backend).value,
        }

    def _reasons(self, choice: Choice, entry: FrontendEntry | None, tracked: bool) -> list[str]:
        if entry is None:
            return []
        by = "client's address" if entry.state.options.affinity.value == "client-ip" else "5-tuple"
        reasons = [f"the {by} hashes to {choice.hash:#010x}, slot {choice.slot} of {entry.table.size}"]
        if choice.owner == OWNER_NONE:
            reasons.append("no backend takes new connections")
        elif choice.owner == OWNER_PASS:
            reasons.append("left to whoever served the port before")
        if tracked and choice.previous != choice.owner:
            reasons.append("the slot is passing from one owner to another: connections from before stay where they are")
        if entry.state.panic:
            reasons.append("every backend is down by our probes, so all are used")
        picture = self._reconciler.picture
        nodes = {node.id: node for node in picture.inventory.nodes}
        for backend in picture.inventory.backends:
            if backend.service == entry.state.service:
                why = standing(backend, nodes.get(backend.node), picture.health.of(backend.id), picture.drained)
                if why != SERVING:
                    reasons.append(f"{backend.name or backend.id} takes no new connections: {why}")
        return reasons

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


def _summaries(applied: Applied, frontends: Sequence[Frontend]) -> dict[Frontend, _Summary]:
    backends = {entry.id: entry for entry in applied.backends.values()}
    return {frontend: _summary(applied.frontends[frontend], backends) for frontend in frontends}


def _node_name(inventory: Inventory, node: str) -> str:
    return next((n.name for n in inventory.nodes if n.id == node), "") or socket.gethostname()


def _options(options: ServiceOptions) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(options, enc_hook=str)
    return plain


def _owner(owner: int, names: Mapping[int, BackendEntry]) -> str:
    if owner in (OWNER_NONE, OWNER_PASS):
        return "none" if owner == OWNER_NONE else "pass"
    return names[owner].key.backend if owner in names else f"gone ({owner})"


def _find(kind: str, name: str, things: Mapping[str, str]) -> str:
    """The id of the one thing that `name` means: an id, a name, or the beginning of an id.

    Raises:
        MeshError: there is none, or more than one.
    """
    if name in things:
        return name
    found = [key for key, known in things.items() if known == name]
    found = found or [key for key in things if key.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise MeshError(f"{name!r} may be any of {', '.join(sorted(found)[:5])}", where=f"{kind} {name}")
    raise MeshError(f"there is no {kind} {name!r}", remedy=f"`mesh backends` lists {kind}s" if things else "")


def _load_drained(file: Path) -> Drained:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Drained)
    except FileNotFoundError:
        return Drained()
    except (OSError, msgspec.DecodeError) as error:
        log.error("what was drained cannot be read, so nothing is", file=str(file), error=str(error))
        return Drained()


def _save_drained(file: Path, drained: Drained) -> None:
    try:
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(drained))
        new.replace(file)
    except OSError as error:
        raise MeshError(f"cannot be written: {error.strerror}", where=str(file)) from error
