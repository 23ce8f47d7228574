# SPDX-License-Identifier: Apache-2.0
"""Backends that the guard holds back are probed too: it lets go of one that is dead."""

from __future__ import annotations

from dataclasses import replace

from mesh.health.monitor import Monitor
from mesh.model import Backend, Inventory
from mesh.reconcile.loop import Picture, Reconciler


class HeldBackends:
    """Has the monitor probe the inventory's backends, and those that are gone from it but held back by the guard."""

    def __init__(self, reconciler: Reconciler, monitor: Monitor) -> None:
        self._reconciler = reconciler
        self._monitor = monitor
        self._inventory = Inventory()
        self._held: dict[str, Backend] = {}

    def publish(self, inventory: Inventory) -> None:
        """Take a provider's inventory."""
        self._inventory = inventory
        self._watch()

    def changed(self, before: Picture, after: Picture) -> None:
        """See what the guard holds back now, after the loop's picture has changed."""
        if not self._held and not self._reconciler.held:
            return
        known = self._held | {backend.id: backend for backend in before.inventory.backends}
        present = {backend.id for backend in after.inventory.backends}
        held = {b: known[b] for _, b in self._reconciler.held if b in known and b not in present}
        if held != self._held:
            self._held = held
            self._watch()

    def _watch(self) -> None:
        present = {backend.id for backend in self._inventory.backends} if self._held else set()
        held = tuple(backend for backend in self._held.values() if backend.id not in present)
        inventory = self._inventory
        self._monitor.watch(replace(inventory, backends=(*inventory.backends, *held)) if held else inventory)
