# SPDX-License-Identifier: Apache-2.0
"""Inventories to wire contents and back. What has not changed since the last call stays the very same object."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from mesh.cluster import wire
from mesh.incremental import KeyedCache, Latest
from mesh.model import Backend, Inventory, Node, Problem, Service


class _Named(Protocol):
    @property
    def id(self) -> str: ...


_id: Final[Callable[[Any], str]] = operator.attrgetter("id")
_In = TypeVar("_In", bound=_Named)
_Out = TypeVar("_Out")


class _Translation(Generic[_In, _Out]):
    """Translates objects that have an id; the same object gives the same object again."""

    def __init__(self, translate: Callable[[_In], _Out]) -> None:
        self._translate = translate
        self._all: Latest[object, dict[str, _Out]] = Latest(operator.is_)
        self._each: KeyedCache[str, _In, _Out] = KeyedCache(operator.is_)

    def of_all(self, given: Sequence[_In]) -> dict[str, _Out]:
        """The translations by id, in the order of `given`."""
        return self._all.of(given, lambda _: self._update(zip(map(_id, given), given, strict=True)))

    def of_each(self, given: Mapping[str, _In]) -> dict[str, _Out]:
        """The same for objects by id. A mapping that was given once is never changed."""
        return self._all.of(given, lambda _: self._update(given.items()))

    def _update(self, given: Iterable[tuple[str, _In]]) -> dict[str, _Out]:
        return self._each.update(given, lambda each, _: self._translate(each))


class Outgoing:
    """Translates a manager's successive inventories to contents."""

    def __init__(self) -> None:
        self._services: _Translation[Service, wire.WireService] = _Translation(wire.service_of)
        self._backends: _Translation[Backend, wire.WireBackend] = _Translation(wire.backend_of)
        self._nodes: _Translation[Node, wire.WireNode] = _Translation(wire.node_of)
        self._problems: Latest[tuple[Problem, ...], dict[str, wire.WireProblem]] = Latest()

    def content(self, inventory: Inventory, verdicts: dict[str, wire.HealthReport]) -> wire.Content:
        """An inventory as it goes over the wire."""
        return wire.Content(
            self._services.of_all(inventory.services),
            self._backends.of_all(inventory.backends),
            self._nodes.of_all(inventory.nodes),
            verdicts,
            self._problems.of(inventory.problems, _problems_of),
        )


class Incoming:
    """Translates successive contents to inventories."""

    def __init__(self) -> None:
        self._services: _Translation[wire.WireService, Service] = _Translation(wire.to_service)
        self._backends: _Translation[wire.WireBackend, Backend] = _Translation(wire.to_backend)
        self._nodes: _Translation[wire.WireNode, Node] = _Translation(wire.to_node)

    def inventory(self, content: wire.Content) -> Inventory:
        """The inventory of a content, sorted by id; its `source` is "relay".

        Raises:
            WireError: a value is out of range; the message names it. What was translated before stays.
        """
        try:
            services = self._services.of_each(content.services)
            backends = self._backends.of_each(content.backends)
            nodes = self._nodes.of_each(content.nodes)
        except ValueError as error:
            raise wire.WireError(f"unusable inventory: {error}", where="relay") from error
        problems = tuple(wire.to_problem(problem) for _, problem in sorted(content.problems.items()))
        return Inventory(_sorted(services), _sorted(backends), _sorted(nodes), problems, source=wire.SOURCE)


def _problems_of(problems: tuple[Problem, ...]) -> dict[str, wire.WireProblem]:
    """By place and message, which no two problems share."""
    return {f"{p.where}: {p.message}": wire.problem_of(p) for p in problems}


def _sorted(things: dict[str, _In]) -> tuple[_In, ...]:
    return tuple(sorted(things.values(), key=lambda thing: thing.id))
