# SPDX-License-Identifier: Apache-2.0
"""What is left of an inventory for an engine that does not reach other nodes. Pure."""

from __future__ import annotations

from dataclasses import replace

from mesh.model import Inventory, Problem


def own_part(inventory: Inventory) -> Inventory:
    """The backends that this node reaches itself.

    Services that have backends, but on other nodes only, are left out whole: their ports stay with whoever serves them
    beside mesh (Docker's own mesh), which is told as one Problem. A service without any backend stays and is refused.
    """
    backends = tuple(b for b in inventory.backends if b.address is not None)
    elsewhere = {b.service for b in inventory.backends} - {b.service for b in backends}
    if len(backends) == len(inventory.backends):
        return inventory
    names = sorted(s.name for s in inventory.services if s.id in elsewhere and s.ports and s.options.enable)
    problems = inventory.problems
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        problems += (
            Problem(
                "engine kernel",
                f"tasks of {shown} run on other nodes only, so their ports are left to Docker's own mesh",
                'engine = "proxy" reaches the tasks of other nodes',
            ),
        )
    services = tuple(s for s in inventory.services if s.id not in elsewhere)
    return replace(inventory, services=services, backends=backends, problems=problems)
