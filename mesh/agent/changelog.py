# SPDX-License-Identifier: Apache-2.0
"""The daemon's log: structured, to standard error, one line per change of state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import structlog

from mesh.model import Backend, FrontendState, Health, Severity
from mesh.reconcile.eligibility import SERVING, standing
from mesh.reconcile.loop import Picture

LEVELS: Final = {Severity.INFO: "info", Severity.WARNING: "warning", Severity.CRITICAL: "error"}
MOST: Final = 200  # lines about one kind of thing in one change; what goes beyond is counted in one more

log = structlog.get_logger("mesh")


def tell(before: Picture, after: Picture) -> None:
    """One line for every service, port or backend whose state is not what it was."""
    lines = [*_services(before, after), *_ports(before, after), *_backends(before, after)]
    known = set(before.desired.problems)
    lines += [(LEVELS[p.severity], "problem", {"problem": str(p)}) for p in after.desired.problems if p not in known]
    for level, event, values in lines[:MOST]:
        getattr(log, level)(event, **values)
    if len(lines) > MOST:
        log.info("more changes", count=len(lines) - MOST)


_Line = tuple[str, str, dict[str, Any]]


def _services(before: Picture, after: Picture) -> list[_Line]:
    old = {s.service: s.service_name for s in before.desired.frontends.values()}
    new = {s.service: s.service_name for s in after.desired.frontends.values()}
    gone = [("info", "service gone", {"service": old[s], "id": s}) for s in old if s not in new]
    return [*gone, *(("info", "service appeared", {"service": new[s], "id": s}) for s in new if s not in old)]


def _ports(before: Picture, after: Picture) -> list[_Line]:
    old, new = before.desired.frontends, after.desired.frontends
    lines: list[_Line] = [
        ("info", "port no longer published", {"port": str(f), "service": s.service_name})
        for f, s in old.items()
        if f not in new
    ]
    for frontend, state in new.items():
        was = old.get(frontend)
        values = {"port": str(frontend), "service": state.service_name}
        if was is None or was.service != state.service:
            lines.append(("info", "port published", values | {"backends": _using(state)}))
        if state.panic and (was is None or not was.panic):
            lines.append(("error", "EVERY BACKEND IS DOWN: all are used again", values | {"backends": _using(state)}))
        elif was is not None and was.panic and not state.panic:
            lines.append(("info", "backends are up again", values | {"backends": _using(state)}))
        if was is not None and _using(was) and not _using(state):
            lines.append(("warning", "no backend takes new connections", values))
    return lines


def _using(state: FrontendState) -> int:
    return sum(target.weight > 0 for target in state.targets)


def standings(picture: Picture, backends: Iterable[Backend] | None = None) -> dict[str, tuple[Backend, str]]:
    """Each backend, or these, with why it gets no new flows; `serving` before the first verdict, `up` after a good
    one."""
    nodes = {node.id: node for node in picture.inventory.nodes}
    found = {}
    for backend in picture.inventory.backends if backends is None else backends:
        verdict = picture.health.of(backend.id)
        word = standing(backend, nodes.get(backend.node), verdict, picture.drained)
        found[backend.id] = backend, "up" if word == SERVING and verdict is Health.UP else word
    return found


def _touched(before: Picture, after: Picture) -> Iterator[tuple[Backend | None, Backend | None]]:
    """Backends that may stand otherwise than before: all, but for those of which everything is the same object."""
    old = {backend.id: backend for backend in before.inventory.backends}
    same = before.drained == after.drained
    at, moved = ({node.id: node for node in picture.inventory.nodes}.get for picture in (before, after))
    was, now = before.health.verdicts.get, after.health.verdicts.get
    for backend in after.inventory.backends:
        known = old.pop(backend.id, None)
        stays = same and known is backend and at(backend.node) is moved(backend.node)
        if not stays or was(backend.id) is not now(backend.id):
            yield known, backend
    for gone in old.values():
        yield gone, None


def _backends(before: Picture, after: Picture) -> list[_Line]:
    touched = list(_touched(before, after))
    old = standings(before, (b for b, _ in touched if b is not None))
    new = standings(after, (b for _, b in touched if b is not None))
    names = {s.id: s.name for picture in (before, after) for s in picture.inventory.services}
    names |= {n.id: n.name for picture in (before, after) for n in picture.inventory.nodes}
    lines: list[_Line] = []
    for key, (backend, word) in new.items():
        was = old[key][1] if key in old else "new"
        if was != word:
            values = _values(backend, names) | {"was": was}
            reason = after.health.reasons.get(key)
            level = "warning" if word == "down" else "info"
            lines.append((level, f"backend {word}", values | ({"reason": reason} if reason else {})))
    gone = ((backend, word) for key, (backend, word) in old.items() if key not in new)
    if before.health is not after.health:
        lines += _port_verdicts(before, after, names)
    return [*lines, *(("info", "backend gone", _values(b, names) | {"was": word}) for b, word in gone)]


def _port_verdicts(before: Picture, after: Picture, names: dict[str, str]) -> Iterator[_Line]:
    """Ports that stand otherwise than their backend, where that is new, or over."""
    was, now = before.health.apart(), after.health.apart()
    backends = {b.id: b for b in after.inventory.backends} if was or now else {}
    for key in sorted(was.keys() | now.keys()):
        if key not in backends:
            continue
        old, new = was.get(key, {}), now.get(key, {})
        for port in sorted(old.keys() | new.keys()):
            verdict = after.health.of(key, port)
            if old.get(port) is new.get(port) or verdict is before.health.of(key, port):
                continue
            reason = after.health.reason(key, port) if port in new else ""
            values = _values(backends[key], names) | {"port": port} | ({"reason": reason} if reason else {})
            yield "warning" if verdict is Health.DOWN else "info", f"backend port {verdict.value}", values


def _values(backend: Backend, names: dict[str, str]) -> dict[str, Any]:
    return {
        "backend": backend.name or backend.id,
        "id": backend.id,
        "service": names.get(backend.service, backend.service),
        "node": names.get(backend.node) or backend.node,
        "address": str(backend.address or ""),
    }
