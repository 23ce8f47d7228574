# SPDX-License-Identifier: Apache-2.0
"""What operators drained, on this node and on all: stored in a file, found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from mesh.api.view import Json
from mesh.datapath.base import Applied, Stats
from mesh.errors import MeshError
from mesh.model import ANY_ADDRESS, Backend, Health, Node
from mesh.providers.base import Follower
from mesh.reconcile.eligibility import SERVING, Drained, standing
from mesh.reconcile.loop import Picture

log = structlog.get_logger("mesh")


DRAINED_FILE: Final = "drained.json"
FOLLOWS: Final = "follows"
PENDING: Final = "does not follow yet"
EARLIER: Final = "its build knows no drains of all nodes"
NO_AGENT: Final = "no agent"
AWAY: Final = "down or silent"


class DrainedState:
    """What is drained: on this node by its own file, and on all nodes by the cluster's word.

    Args:
        file: of what is drained on this node only.
        apply: takes the union whenever it has changed, and once at first.
    """

    def __init__(self, file: Path, apply: Callable[[Drained], None]) -> None:
        self._file = file
        self._apply = apply
        self._shared: frozenset[str] | None = None
        self.local = _load_drained(file)
        self.now = self.local
        apply(self.now)

    def set_local(self, kind: str, identity: str, drained: bool) -> None:
        """Drain or undrain on this node only.

        Raises:
            MeshError: the file cannot be written.
        """
        old = self.local.nodes if kind == "node" else self.local.backends
        new = old | {identity} if drained else old - {identity}
        local = Drained(self.local.backends, new) if kind == "node" else Drained(new, self.local.nodes)
        _save_drained(self._file, local)
        self.local = local
        self._unite()

    def set_shared(self, keys: frozenset[str]) -> None:
        """Take what is drained on all nodes, as "backend:ID" and "node:ID"."""
        self._shared = keys
        self._unite()

    def _unite(self) -> None:
        local, now = self.local, self.local
        if self._shared is not None:
            pairs = [key.partition(":")[::2] for key in self._shared]
            backends = frozenset(identity for kind, identity in pairs if kind == "backend")
            nodes = frozenset(identity for kind, identity in pairs if kind == "node")
            here = (local.backends - backends) | (local.nodes - nodes)
            now = Drained(local.backends | backends, local.nodes | nodes, here)
        if now != self.now:
            self.now = now
            self._apply(now)


def connections_left(drained: Drained, applied: Applied, stats: Callable[[], Stats]) -> dict[str, int]:
    """Connections and sessions that this node has to each drained thing, by "backend:ID" or "node:ID".

    The kernel engine does not know when a UDP flow ends, and counts none.
    """
    left = dict.fromkeys([f"backend:{each}" for each in drained.backends], 0)
    left |= dict.fromkeys([f"node:{each}" for each in drained.nodes], 0)
    if not left:
        return left
    for (_, key), counters in stats().backends.items():
        entry = applied.backends.get(key)
        for name in (f"backend:{key.backend}", f"node:{entry.target.node}" if entry is not None else ""):
            if name in left:
                left[name] += counters.active
    return left


def find(kind: str, name: str, things: Mapping[str, str]) -> str:
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
        raise MeshError(f"{name!r} is ambiguous: {', '.join(sorted(found)[:5])}", where=f"{kind} {name}")
    raise MeshError(f"there is no {kind} {name!r}", remedy=f"`mesh {kind}s` lists them" if things else "")


def _load_drained(file: Path) -> Drained:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Drained)
    except FileNotFoundError:
        return Drained()
    except (OSError, msgspec.DecodeError) as error:
        log.error("the list of what was drained cannot be read; nothing is drained", file=str(file), error=str(error))
        return Drained()


def _save_drained(file: Path, drained: Drained) -> None:
    try:
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode({"backends": drained.backends, "nodes": drained.nodes}))
        new.replace(file)
    except OSError as error:
        raise MeshError(f"cannot be written: {error.strerror}", where=str(file)) from error


def follow_rows(nodes: Iterable[Node], followers: Mapping[str, Follower]) -> list[Json]:
    """How each node follows what is drained on all nodes: name, and FOLLOWS, PENDING, EARLIER, NO_AGENT or AWAY."""

    def state(node: Node) -> str:
        said = followers.get(node.id)
        if not node.up:
            return AWAY
        if said is None:
            return EARLIER if node.engine else NO_AGENT
        return FOLLOWS if said.follows else PENDING

    return [{"node": node.name or node.id, "state": state(node)} for node in nodes]


def still_without(kind: str, identity: str, picture: Picture) -> list[str]:
    """Why something that is drained no more still gets no new connections, as this node sees it."""
    nodes = {node.id: node for node in picture.inventory.nodes}
    if kind == "node":
        node = nodes.get(identity)
        if node is None:
            return ["this node knows no such node now"]
        probe = Backend("", "", identity, node.address or ANY_ADDRESS)
        why = standing(probe, node, Health.UP, picture.drained)
    else:
        backend = next((b for b in picture.inventory.backends if b.id == identity), None)
        if backend is None:
            return ["this node knows no such backend now"]
        why = standing(backend, nodes.get(backend.node), picture.health.of(identity), picture.drained)
    return [] if why == SERVING else [f"still no new connections: {why}{_REMEDIES.get(why, '')}"]


_REMEDIES: Final = {
    "node weight 0": " (label mesh.weight: docker node update --label-rm mesh.weight NODE)",
    "drained here": " (mesh undrain --local, on this node)",
    "node drained here": " (mesh undrain --local node NODE, on this node)",
    "drained": " (mesh undrain, without --local)",
    "node drained": " (mesh undrain node NODE, without --local)",
}


def left_without_backend(picture: Picture) -> list[str]:
    """Services of which no backend is left for new connections by what is drained, one sentence each."""
    nodes = {node.id: node for node in picture.inventory.nodes}
    taking: dict[str, bool] = {}
    for backend in picture.inventory.backends:
        on = nodes.get(backend.node)
        health = picture.health.of(backend.id)
        before, now = (standing(backend, on, health, each) == SERVING for each in (Drained(), picture.drained))
        if before:
            taking[backend.service] = taking.get(backend.service, False) or now
    names = {service.id: service.name for service in picture.inventory.services}
    lost = sorted(names.get(service, service) for service, left in taking.items() if not left)
    return [f"service {name} has no backend left: new connections fail" for name in lost]
