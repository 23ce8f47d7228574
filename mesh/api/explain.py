# SPDX-License-Identifier: Apache-2.0
"""Where a flow goes, and why: by the applied tables and, where the engine runs a program of its own, by that one."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Mapping
from typing import Any, Final

from mesh._abi import OWNER_FIRST, OWNER_NONE, OWNER_PASS
from mesh.api.services import own_address, path_of
from mesh.api.view import Json
from mesh.datapath.base import BackendEntry, Choice, Explanation, FrontendEntry
from mesh.model import Address, EngineKind, Flow, FrontendState, Health, Protocol, ServiceOptions
from mesh.reconcile.eligibility import SERVING, standing
from mesh.reconcile.loop import Reconciler

TRIES: Final = 3  # a plan may be on its way between the two questions
AGAIN: Final = 0.2  # seconds
NOT_OURS: Final = "not ours"
MOST: Final = 20  # backends of which it is said why they take nothing


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
            return self._unserved(flow, called)
        entry = applied.frontends.get(choice.frontend)
        tracked = entry.table.slot(choice.slot)[2] if entry is not None else False
        denied = entry is not None and is_denied(flow, entry.state.options)
        names = {e.id: e for e in applied.backends.values()}
        agree = None if program is None else agrees(flow, choice, program, tracked=tracked, denied=denied)
        reasons = self._reasons(flow, choice, entry, tracked=tracked, denied=denied)
        return {
            "frontend": str(choice.frontend),
            "service": entry.state.service_name if entry else "",
            "hash": choice.hash,
            "table_size": entry.table.size if entry else 0,
            "slot": choice.slot,
            "current": _owner(choice.owner, names),
            "previous": _owner(choice.previous, names),
            "tracked": tracked,
            "previous_backend": self._described(names[choice.previous]) if choice.previous in names else None,
            "backend": self._described(choice.backend) if choice.backend and not denied else None,
            "reasons": [*reasons, *_of_source(program)],
            "next": [] if denied else [self._described(backend) for backend in choice.next],
            "program": None if program is None else self._told(program, names),
            "agree": agree,
        }

    def _unserved(self, flow: Flow, called: str) -> Json:
        """Why nothing answers for an address and a port, as far as is known."""
        port, protocol = flow.destination_port, Protocol(flow.protocol)
        applied, picture = self._reconciler.applied.frontends, self._reconciler.picture
        served = [f for f in applied if (f.port, f.protocol) == (port, protocol)]
        if served:
            services = ", ".join(sorted({applied[frontend].state.service_name for frontend in served}))
            return {
                "error": f"{flow.destination} is no address of this node; {services} is published at "
                f"{', '.join(map(str, served))}",
                "remedy": "call an address of this node, or ask the node that has this one",
            }
        if missing := [
            s.service_name for f, s in picture.desired.frontends.items() if (f.port, f.protocol) == (port, protocol)
        ]:
            return {"error": f"{called} of {missing[0]} is not served", "remedy": "`mesh status` says why"}
        for service in picture.inventory.services:
            if not service.options.enable and any((p.published, p.protocol) == (port, protocol) for p in service.ports):
                left = "is left to Docker's own mesh by the label mesh.enable=false"
                return {
                    "error": f"{called}: service {service.name} {left}",
                    "remedy": "remove the label to serve it here",
                }
        remedy = "`mesh services` lists what is; ports in host mode (mode=host) are Docker's own"
        return {"error": f"{called} is not published here", "remedy": remedy}

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
            "node_name": self._node_name(entry.target.node),
            "address": str(entry.target.address),
            "own_address": own_address(entry.target, health.addresses.get(entry.key.backend, "")),
            "via": str(entry.target.via or ""),
            "path": path_of(entry.target, self._reconciler.datapath.name),
            "port": entry.target.port,
            "health": health.of(entry.key.backend, entry.key.port).value,
        }

    def _node_name(self, node: str) -> str:
        return next((n.name for n in self._reconciler.picture.inventory.nodes if n.id == node), "")

    def _sent(self, entry: BackendEntry) -> str:
        """How a flow gets to another node."""
        where = f"node {self._node_name(entry.target.node) or entry.target.node} ({entry.target.via})"
        engine = self._reconciler.datapath.name
        if path_of(entry.target, engine) == "tunnel":
            return f"goes to {where} through the tunnel"
        by = " by the fallback proxy" if engine == EngineKind.KERNEL else ""
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
        elif choice.owner == OWNER_NONE:
            reasons.append("no backend takes new connections")
        elif choice.owner == OWNER_PASS:
            proxied = entry.state.proxied
            by = "the fallback proxy, which announces the client to the task (mesh.proxy-protocol=v2)"
            reasons.append(f"served by {by}" if proxied else "left to whoever served the port before")
        elif choice.backend:
            reasons += self._path(flow, choice.backend)
        if not _is_here(flow.destination):
            reasons.append(f"{flow.destination} is no address of this node at the moment: nothing for it comes here")
        if tracked and choice.previous != choice.owner:
            reasons.append("the slot is in transition: established connections stay where they are")
        if entry.state.panic:
            reasons.append("every backend is down by our probes, so all are used")
        return [*reasons, *self._away(entry.state)]

    def _path(self, flow: Flow, entry: BackendEntry) -> list[str]:
        if self._reconciler.datapath.name == EngineKind.KERNEL and entry.target.address.version != flow.source.version:
            return ["the client's IP version is not the backend's: the fallback proxy serves it"]
        return [] if entry.target.via is None else [self._sent(entry)]

    def _away(self, state: FrontendState) -> list[str]:
        """Why there is nobody, or which backends are not as they should be, and why."""
        picture = self._reconciler.picture
        nodes = {node.id: node for node in picture.inventory.nodes}
        targets = {target.backend: target for target in state.targets}
        its = [backend for backend in picture.inventory.backends if backend.service == state.service]
        if not its:
            ask = f"in a swarm `docker service ps {state.service_name}` says why"
            return [f"{state.service_name} has no backend at all ({ask})"]
        reasons = []
        for backend in its:
            port = targets[backend.id].port if backend.id in targets else 0
            verdict = picture.health.of(backend.id, port)
            why = standing(backend, nodes.get(backend.node), verdict, picture.drained)
            if why != SERVING:
                used = backend.id in targets and targets[backend.id].weight > 0
                told = picture.health.reason(backend.id, port) if verdict is Health.DOWN else ""
                does = "is used, though" if used else "takes no new connections:"
                reasons.append(f"{backend.name or backend.id} {does} {why}" + (f" ({told})" if told else ""))
        return [*reasons[:MOST], *([f"and {len(reasons) - MOST} more like these"] if len(reasons) > MOST else [])]


def _of_source(program: Explanation | None) -> list[str]:
    """What the program says of the source that the backend sees, if that is not the client's own."""
    if program is not None and program.verdict == "translated":
        return [
            "the backend sees it by another source: it has a connection of this client address and port, or a network "
            "of its own that has the address"
        ]
    if program is not None and program.verdict == "collision":
        return ["it is refused: the backend has connections of this client's address from all ports that it could get"]
    return []


def _is_here(address: Address) -> bool:
    """Whether the node has this address, or may take packets for it (ip_nonlocal_bind)."""
    try:
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


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
