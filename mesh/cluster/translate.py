# SPDX-License-Identifier: Apache-2.0
"""Inventories to what goes over the wire and back, where nearly all is as it was the last time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from mesh.cluster import wire
from mesh.model import Backend, Inventory, Node, Service


class _Named(Protocol):
    @property
    def id(self) -> str: ...


_In = TypeVar("_In", bound=_Named)
_Out = TypeVar("_Out")


class Memo(Generic[_In, _Out]):
    """Translates things that have an id, and remembers what each very object became."""

    def __init__(self, make: Callable[[_In], _Out]) -> None:
        self._make = make
        self._given: object = None
        self._held: dict[str, tuple[_In, _Out]] = {}
        self._made: dict[str, _Out] = {}

    def of(self, given: Iterable[_In], whole: object) -> dict[str, _Out]:
        """What they become, by id, in their order. `whole`: an object that is the same only if all of them are."""
        if whole is not self._given:
            held, self._held = self._held, {}
            for thing in given:
                known = held.get(thing.id)
                self._held[thing.id] = known if known is not None and known[0] is thing else (thing, self._make(thing))
            self._made = {key: made for key, (_, made) in self._held.items()}
            self._given = whole
        return self._made


class Outgoing:
    """A manager's inventories, one after the other, as contents."""

    def __init__(self) -> None:
        self._services: Memo[Service, wire.WireService] = Memo(wire.service_of)
        self._backends: Memo[Backend, wire.WireBackend] = Memo(wire.backend_of)
        self._nodes: Memo[Node, wire.WireNode] = Memo(wire.node_of)

    def content(self, inventory: Inventory, verdicts: dict[str, wire.HealthReport]) -> wire.Content:
        """An inventory as it goes over the wire."""
        return wire.Content(
            self._services.of(inventory.services, inventory.services),
            self._backends.of(inventory.backends, inventory.backends),
            self._nodes.of(inventory.nodes, inventory.nodes),
            verdicts,
        )


class Incoming:
    """Contents, one after the other, as inventories."""

    def __init__(self) -> None:
        self._services: Memo[wire.WireService, Service] = Memo(wire.to_service)
        self._backends: Memo[wire.WireBackend, Backend] = Memo(wire.to_backend)
        self._nodes: Memo[wire.WireNode, Node] = Memo(wire.to_node)

    def inventory(self, content: wire.Content) -> Inventory:
        """The inventory that a content stands for.

        Raises:
            WireError: a value is out of range; the message names it.
        """
        try:
            services = self._services.of(content.services.values(), content.services)
            backends = self._backends.of(content.backends.values(), content.backends)
            nodes = self._nodes.of(content.nodes.values(), content.nodes)
        except ValueError as error:
            raise wire.WireError(f"an inventory that cannot be used: {error}", where="relay") from error
        return Inventory(_sorted(services), _sorted(backends), _sorted(nodes), source=wire.SOURCE)


def _sorted(things: dict[str, _In]) -> tuple[_In, ...]:
    return tuple(sorted(things.values(), key=lambda thing: thing.id))
