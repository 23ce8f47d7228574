# SPDX-License-Identifier: Apache-2.0
"""Backends that are new: a manager keeps them from all nodes until their own node has found that they answer.

Docker calls a task running when its process runs, which may be before it listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from mesh.cluster import wire
from mesh.model import Backend, Health, Intent, Inventory, ProbeKind, Protocol, Service

HOLD: Final = 1.0  # seconds at most from the first inventory that calls a backend ready


class ReadinessGate:
    """Which backends are pending. Those of the first inventory are not: they may have served for long.

    Every manager comes to the same answer by itself, within the moments by which they hear of things: all are told of
    all probes, and all count from Docker's word.

    Args:
        hears: whether a node's agent will tell of its probes; other nodes' backends are not waited for.
    """

    def __init__(self, hears: Callable[[str], bool], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._hears = hears
        self._clock = clock
        self._backends: object = None  # those that were looked at last
        self._known: frozenset[str] | None = None  # of these, who was ever ready
        self._until: dict[str, float] = {}

    def take(self, inventory: Inventory, *, hold: bool) -> None:
        """Look at an inventory.

        Args:
            hold: wait for those that are new; a node that is told by others holds nobody back.
        """
        if inventory.backends is not self._backends:
            self._backends = inventory.backends
            known = self._known
            before = known or ()
            self._known = frozenset(b.id for b in inventory.backends if b.ready or b.id in before)
            if hold and known is not None and self._known - known:
                self._await(inventory, self._known - known)
        self._until = {key: until for key, until in self._until.items() if hold and key in (self._known or ())}

    @property
    def due(self) -> float | None:
        """Seconds until `apply` answers otherwise by itself; None: it does not."""
        return max(min(self._until.values()) - self._clock(), 0.0) if self._until else None

    def _await(self, inventory: Inventory, new: Iterable[str]) -> None:
        services = {service.id: service for service in inventory.services if _is_probed(service)}
        until, fresh = self._clock() + HOLD, frozenset(new)
        for backend in inventory.backends:
            if backend.id in fresh and backend.service in services and self._is_told_of(backend):
                self._until[backend.id] = until

    def _is_told_of(self, backend: Backend) -> bool:
        return backend.intent is Intent.ACTIVE and (backend.local or self._hears(backend.node))

    def apply(self, verdicts: Mapping[str, wire.HealthReport]) -> dict[str, wire.HealthReport]:
        """The verdicts, with PENDING for backends at the gate. One that is UP, or whose time is over, is let in."""
        now = self._clock()
        for key, until in list(self._until.items()):
            if until <= now or ((said := verdicts.get(key)) is not None and wire.health_of(said) is Health.UP):
                del self._until[key]
        pending = {
            key: wire.health_report(Health.PENDING, said.reason if (said := verdicts.get(key)) is not None else "")
            for key in self._until
        }
        return {**verdicts, **pending}


def _is_probed(service: Service) -> bool:
    probed = service.options.health.kind is not ProbeKind.OFF
    return probed and any(port.protocol is Protocol.TCP for port in service.ports)
