# SPDX-License-Identifier: Apache-2.0
"""The journal: a file that names what the pinned maps hold, because maps hold addresses and numbers only.

The maps are authoritative. Without a journal, or with one that does not match them, an agent restores the maps under
made-up names, and the next plan replaces these while connections go on.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from mesh import model
from mesh.datapath.base import Applied, BackendEntry, BackendKey, Plan
from mesh.model import Address, EngineKind, Frontend, FrontendState, Protocol, Target
from mesh.options import from_compact, to_compact

VERSION: Final = 3
SPARE: Final = 1 << 16  # bytes of changes for which the file is never rewritten
_CHANGES: Final = ("backends", "frontends", "gone_backends", "gone_frontends")


@dataclass(frozen=True, slots=True)
class Names:
    """What the journal says."""

    generation: int = 0
    backends: dict[int, BackendEntry] = field(default_factory=dict)
    frontends: dict[Frontend, FrontendState] = field(default_factory=dict)
    nodes: tuple[Address, ...] = ()


def _target_out(target: Target) -> list[Any]:
    place = [target.backend, str(target.address), target.port, target.weight, target.local]
    path = [target.path.value, target.masked, target.agreed] if target.path is not model.Path.LOCAL else []
    return [*place, target.node, target.container, str(target.via or ""), target.engine, *path]


def _target_in(row: list[Any]) -> Target:
    backend, address, port, weight, local, node, container, via, engine, *more = row
    away = ipaddress.ip_address(via) if via else None
    path, masked, agreed = more or (model.Path.LOCAL.value, "", 0)
    place = (
        backend,
        ipaddress.ip_address(address),
        port,
        weight,
        local,
        node,
        container,
        away,
        EngineKind.told(engine),
    )
    return Target(*place, path=model.Path(path), masked=masked, agreed=agreed)


def _place_out(frontend: Frontend) -> list[Any]:
    return [str(frontend.address), frontend.port, int(frontend.protocol)]


def _place_in(row: list[Any]) -> Frontend:
    address, port, protocol = row
    return Frontend(ipaddress.ip_address(address), port, Protocol(protocol))


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _frontend_out(state: FrontendState) -> dict[str, Any]:
    frontend = state.frontend
    return {
        "frontend": _place_out(frontend),
        "service": [state.service, state.service_name],
        "options": to_compact(state.options, whole=True),
        "targets": [_target_out(target) for target in state.targets],
        "panic": state.panic,
        **({"passing": True} if state.passing else {}),
        **({"proxied": True} if state.proxied else {}),
    }


def _frontend_in(row: dict[str, Any]) -> FrontendState:
    service, name = row["service"]
    return FrontendState(
        frontend=_place_in(row["frontend"]),
        service=service,
        service_name=name,
        options=from_compact(row["options"]),
        targets=tuple(_target_in(target) for target in row["targets"]),
        panic=row["panic"],
        passing=row.get("passing", False),
        proxied=row.get("proxied", False),
    )


def _backend_out(entry: BackendEntry) -> list[Any]:
    key = entry.key
    return [entry.id, key.backend, key.port, key.protocol, _target_out(entry.target), *([key.path] if key.path else [])]


def _backend_in(row: list[Any]) -> BackendEntry:
    number, backend, port, protocol, target, *path = row
    return BackendEntry(number, BackendKey(backend, port, protocol, *path), _target_in(target))


class Journal:
    """One file: a line with all names, then a line per change. It is rewritten when the changes outgrow the names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._backends: dict[int, msgspec.Raw] = {}
        self._frontends: dict[Frontend, msgspec.Raw] = {}
        self._nodes: list[str] = []
        self._spent = self._size = 0  # bytes of the changes, and of the line with all names names
        self.problem = ""  # why there is no file; empty: there is one

    def read(self) -> Names:
        """The names; none where the file is missing, damaged or of another version."""
        try:
            first, *changes = self._path.read_bytes().split(b"\n")
            row = msgspec.json.decode(first)
            if row["version"] != VERSION:
                return Names()
            backends = {b.id: b for b in map(_backend_in, row["backends"])}
            frontends = {f.frontend: f for f in map(_frontend_in, row["frontends"])}
            generation, nodes = row["generation"], row["nodes"]
            for row in map(msgspec.json.decode, changes[:-1]):  # a line without a line break is incomplete
                generation, nodes = row["generation"], row.get("nodes", nodes)
                backends |= {b.id: b for b in map(_backend_in, row["backends"])}
                frontends |= {f.frontend: f for f in map(_frontend_in, row["frontends"])}
                for number in row["gone_backends"]:
                    backends.pop(number, None)
                for place in row["gone_frontends"]:
                    frontends.pop(_place_in(place), None)
            return Names(generation, backends, frontends, tuple(map(ipaddress.ip_address, nodes)))
        except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
            return Names()

    def put(self, plan: Plan, held: Applied) -> None:
        """Add the names of what a plan is about to put; the first call also writes all that is `held` before it."""
        if not self._size:
            self._backends = {e.id: _raw(_backend_out(e)) for e in held.backends.values()}
            self._frontends = {f: _raw(_frontend_out(e.state)) for f, e in held.frontends.items()}
            self._nodes = [str(address) for address in held.nodes or ()]
        backends = {entry.id: _raw(_backend_out(entry)) for entry in plan.put_backends}
        frontends = {entry.state.frontend: _raw(_frontend_out(entry.state)) for entry in plan.put_frontends}
        self._backends |= backends
        self._frontends |= frontends
        change: dict[str, list[Any]] = {"backends": list(backends.values()), "frontends": list(frontends.values())}
        if plan.put_nodes is not None:
            self._nodes = change["nodes"] = [str(address) for address in plan.put_nodes]
        self._append(plan.generation, **change)

    def drop(self, plan: Plan) -> None:
        """Remove the names of what a plan has dropped."""
        held = {entry.id for entry in plan.put_backends}
        gone = [entry.id for entry in plan.drop_backends if entry.id not in held]
        for number in gone:
            self._backends.pop(number, None)
        for frontend in plan.drop_frontends:
            self._frontends.pop(frontend, None)
        if gone or plan.drop_frontends:
            places = [_place_out(frontend) for frontend in plan.drop_frontends]
            self._append(plan.generation, gone_backends=gone, gone_frontends=places)

    def _append(self, generation: int, **change: list[Any]) -> None:
        """Append a change. If that fails, remove the file: outdated names would be wrong ones.

        Raises:
            OSError: the file cannot even be removed.
        """
        try:
            self._append_or_write(generation, **change)
            self.problem = ""
        except OSError as error:
            self.remove()
            self._path.with_suffix(".partial").unlink(missing_ok=True)
            self._size = 0
            self.problem = f"{self._path}: cannot be written: {error.strerror}; should the daemon start again now, it "
            self.problem += "knows its backends by their tables only (make room there)"

    def _append_or_write(self, generation: int, **change: list[Any]) -> None:
        row = {"generation": generation, **{name: [] for name in _CHANGES}, **change}
        line = msgspec.json.encode(row) + b"\n"
        self._spent += len(line)
        if not self._size or self._spent > max(self._size, SPARE) or not self._path.exists():
            self._write(generation)
            return
        with self._path.open("ab") as file:
            file.write(line)

    def _write(self, generation: int) -> None:
        row = {
            "version": VERSION,
            "generation": generation,
            "backends": list(self._backends.values()),
            "frontends": list(self._frontends.values()),
            "nodes": self._nodes,
        }
        text = msgspec.json.encode(row) + b"\n"
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(text)
        partial.replace(self._path)
        self._spent, self._size = 0, len(text)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
