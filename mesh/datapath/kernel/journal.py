# SPDX-License-Identifier: Apache-2.0
"""The journal: a file that names what the pinned maps hold, because maps hold addresses and numbers only.

The maps are authoritative. Without a journal, or with one that does not match them, an agent restores the maps under
made-up names, and the next plan replaces these while connections go on.

A plan's names are written before the maps, and that it was carried out after them. What was named and not confirmed is
in doubt: the maps may hold it, or what was there before, or a part. The next plan puts it anew.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
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
class Doubt:
    """What a plan was about to change that nobody has confirmed.

    Attributes:
        former: the backends that had such an id before, by id.
    """

    backends: set[int] = field(default_factory=set)
    frontends: set[Frontend] = field(default_factory=set)
    former: dict[int, BackendEntry] = field(default_factory=dict)

    def clear(self) -> None:
        for each in (self.backends, self.frontends, self.former):
            each.clear()


@dataclass(frozen=True, slots=True)
class Names:
    """What the journal says."""

    generation: int = 0
    backends: dict[int, BackendEntry] = field(default_factory=dict)
    frontends: dict[Frontend, FrontendState] = field(default_factory=dict)
    nodes: tuple[Address, ...] = ()
    doubt: Doubt = field(default_factory=Doubt, compare=False)


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


def _take(names: Names, row: dict[str, Any]) -> None:
    """Read a line. Lines of other builds confirm nothing, so all that these have written is in doubt."""
    doubt = names.doubt
    for entry in map(_backend_in, row["backends"]):
        if entry.id in names.backends and entry.id not in doubt.backends:
            doubt.former[entry.id] = names.backends[entry.id]
        doubt.backends.add(entry.id)
        names.backends[entry.id] = entry
    for state in map(_frontend_in, row["frontends"]):
        doubt.frontends.add(state.frontend)
        names.frontends[state.frontend] = state
    doubt.backends.update(row.get("leaving_backends", ()))
    doubt.frontends.update(map(_place_in, row.get("leaving_frontends", ())))
    for number in row.get("gone_backends", ()):
        names.backends.pop(number, None)
    for place in row.get("gone_frontends", ()):
        names.frontends.pop(_place_in(place), None)
    if row.get("done"):
        doubt.clear()


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
            names = Names()
            _take(names, row)
            generation, nodes = row["generation"], row["nodes"]
            for row in map(msgspec.json.decode, changes[:-1]):  # a line without a line break is incomplete
                generation, nodes = row["generation"], row.get("nodes", nodes)
                _take(names, row)
            return replace(names, generation=generation, nodes=tuple(map(ipaddress.ip_address, nodes)))
        except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
            return Names()

    def put(self, plan: Plan, held: Applied) -> None:
        """Add the names of what a plan is about to put; the first call also writes all that is `held` before it.

        All of this, and what the plan drops, is in doubt until `finish`.
        """
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
        if plan.drop_backends:
            change["leaving_backends"] = [entry.id for entry in plan.drop_backends]
        if plan.drop_frontends:
            change["leaving_frontends"] = [_place_out(frontend) for frontend in plan.drop_frontends]
        self._append(plan.generation, **change)

    def finish(self, plan: Plan, *, sure: bool = True) -> None:
        """The maps hold what `put` has named: remove the names of what the plan has dropped.

        Args:
            sure: nothing of this plan, and of those before that were not finished, is in doubt any more.
        """
        held = {entry.id for entry in plan.put_backends}
        gone = [entry.id for entry in plan.drop_backends if entry.id not in held]
        for number in gone:
            self._backends.pop(number, None)
        for frontend in plan.drop_frontends:
            self._frontends.pop(frontend, None)
        places = [_place_out(frontend) for frontend in plan.drop_frontends]
        self._append(plan.generation, gone_backends=gone, gone_frontends=places, **({"done": True} if sure else {}))

    def _append(self, generation: int, **change: Any) -> None:
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

    def _append_or_write(self, generation: int, **change: Any) -> None:
        row = {"generation": generation, **{name: [] for name in _CHANGES}, **change}
        line = msgspec.json.encode(row) + b"\n"
        self._spent += len(line)
        if not self._size or self._spent > max(self._size, SPARE) or not self._path.exists():
            self._write(generation)
            if "done" not in change:
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
