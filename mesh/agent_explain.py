# SPDX-License-Identifier: Apache-2.0
"""Where a flow goes, and why: by the applied tables and, where the engine runs a program of its own, by that one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from mesh.agent_services import way_of
from mesh.datapath.base import OWNER_FIRST, OWNER_NONE, OWNER_PASS, BackendEntry, Choice, Explanation, FrontendEntry
from mesh.metrics.view import Json
from mesh.model import Flow, Protocol, ServiceOptions
from mesh.reconcile.compose import SERVING, standing
from mesh.reconcile.loop import Reconciler

TRIES: Final = 3  # a plan may be on its way between the two questions
AGAIN: Final = 0.2  # seconds
NOT_OURS: Final = "not ours"


class Explainer:
    """The answer of AgentView.explain."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    async def explain(self, flow: Flow) -> Json:
        """See AgentView.explain."""
        answer: Json = {}
        for turn in range(TRIES):
            if turn:
                await asyncio.sleep(AGAIN)
            answer = await asyncio.to_thread(self._explained, flow)
            if answer.get("agree") is not False:
                break
        return answer

    def _explained(self, flow: Flow) -> Json:
        datapath, applied = self._reconciler.datapath, self._reconciler.applied
        choice, program = datapath.lookup(flow), datapath.explain(flow)
        called = f"{flow.destination} port {flow.destination_port}/{flow.protocol}"
        if choice is None:
            if program is not None and program.verdict != NOT_OURS:
                return {
                    "error": f"the tables and the loaded program DISAGREE: by the tables {called} is not published "
                    f"here, but the program serves it (verdict {program.verdict})",
                    "remedy": "restart the daemon, which reads the maps back and repairs them, and report this",
                    "agree": False,
                }
            return {"error": f"{called} is not published here", "remedy": "`mesh services` lists what is"}
        entry = applied.frontends.get(choice.frontend)
        tracked = entry.table.slot(choice.slot)[2] if entry is not None else False
        denied = entry is not None and is_denied(flow, entry.state.options)
        names = {e.id: e for e in applied.backends.values()}
        agree = None if program is None else agrees(flow, choice, program, tracked=tracked, denied=denied)
        return {
            "frontend": str(choice.frontend),
            "service": entry.state.service_name if entry else "",
            "hash": choice.hash,
            "table_size": entry.table.size if entry else 0,
            "slot": choice.slot,
            "current": _owner(choice.owner, names),
            "previous": _owner(choice.previous, names),
            "tracked": tracked,
            "backend": self._described(choice.backend) if choice.backend and not denied else None,
            "reasons": self._reasons(flow, choice, entry, tracked=tracked, denied=denied),
            "next": [self._described(backend) for backend in choice.next],
            "program": None if program is None else self._told(program, names),
            "agree": agree,
        }

    def _told(self, program: Explanation, names: Mapping[int, BackendEntry]) -> Json:
        backend = names.get(program.owner) if program.owner >= OWNER_FIRST else None
        return {
            "verdict": program.verdict,
            "hash": program.hash,
            "slot": program.slot,
            "owner": _owner(program.owner, names),
            "backend": self._described(backend) if backend else None,
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
            "way": way_of(entry.target, self._reconciler.datapath.name),
            "port": entry.target.port,
            "health": health.of(entry.key.backend).value,
        }

    def _sent(self, entry: BackendEntry) -> str:
        """How a flow gets to another node."""
        names = {node.id: node.name for node in self._reconciler.picture.inventory.nodes}
        name = names.get(entry.target.node) or entry.target.node
        where = f"node {name} ({entry.target.via})"
        engine = self._reconciler.datapath.name
        if way_of(entry.target, engine) == "tunnel":
            return f"goes to {where} through the tunnel"
        by = " by the proxy engine beside" if engine == "kernel" else ""
        return f"is handed over to {where} at its peer port{by}"

    def _reasons(
        self, flow: Flow, choice: Choice, entry: FrontendEntry | None, *, tracked: bool, denied: bool
    ) -> list[str]:
        if entry is None:
            return []
        by = "client's address" if entry.state.options.affinity.value == "client-ip" else "5-tuple"
        reasons = [f"the {by} hashes to {choice.hash:#010x}, slot {choice.slot} of {entry.table.size}"]
        if denied:
            reasons.append("mesh.allow and mesh.deny of the service do not let this client in")
        if choice.owner == OWNER_NONE:
            reasons.append("no backend takes new connections")
        elif choice.owner == OWNER_PASS:
            reasons.append("left to whoever served the port before")
        elif (
            self._reconciler.datapath.name == "kernel"
            and choice.backend
            and choice.backend.target.address.version != flow.source.version
        ):
            reasons.append("the client's IP version is not the backend's: the proxy engine beside serves it")
        elif choice.backend and choice.backend.target.via is not None:
            reasons.append(self._sent(choice.backend))
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


def is_denied(flow: Flow, options: ServiceOptions) -> bool:
    """Whether mesh.allow and mesh.deny keep this client out."""
    if any(flow.source in network for network in options.deny):
        return True
    return bool(options.allow) and not any(flow.source in network for network in options.allow)


def agrees(flow: Flow, choice: Choice, program: Explanation, *, tracked: bool, denied: bool) -> bool:
    """Whether the program says of a flow that starts now what the tables say of it.

    UDP has no start: in a slot in transition its flow may be an old one, which stays with the owner that it has.
    """
    if program.verdict == NOT_OURS or program.hash != choice.hash:
        return False
    if denied or program.verdict == "denied":
        return denied and program.verdict == "denied"
    if program.slot != choice.slot:
        return False
    if flow.protocol is Protocol.UDP and tracked:
        return program.verdict == "noted" or program.owner in (choice.owner, choice.previous)
    return program.owner == choice.owner


def _owner(owner: int, names: Mapping[int, BackendEntry]) -> str:
    if owner in (OWNER_NONE, OWNER_PASS):
        return "none" if owner == OWNER_NONE else "pass"
    return names[owner].key.backend if owner in names else f"gone ({owner})"
