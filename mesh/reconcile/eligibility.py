# SPDX-License-Identifier: Apache-2.0
"""Whether a backend gets new flows, and why not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from mesh.model import (
    ANY_ADDRESS,
    Address,
    Backend,
    Health,
    Intent,
    Node,
)

SERVING: Final = "serving"


@dataclass(frozen=True, slots=True)
class Drained:
    """Ids that the operator has drained, apart from anything the orchestrator wants.

    `here`: those of them that are drained on this node only, where others are drained on all nodes.
    """

    backends: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    here: frozenset[str] = frozenset()

    @property
    def shared(self) -> frozenset[str]:
        """Those that are drained on all nodes, as "backend:ID" and "node:ID"."""
        backends = {f"backend:{each}" for each in self.backends - self.here}
        return frozenset(backends | {f"node:{each}" for each in self.nodes - self.here})


def standing(backend: Backend, node: Node | None, health: Health, drained: Drained) -> str:
    """Why a backend gets no new flows, in a word or two for people; `SERVING` where it does.

    One of: serving, draining, not ready, drained, drained here, node drained, node drained here, node down,
    node weight 0, weight 0, no address, first probe pending, down.
    """
    reasons = (
        (backend.intent is Intent.DRAINING, "draining"),
        (not backend.ready, "not ready"),
        (backend.id in drained.backends, "drained here" if backend.id in drained.here else "drained"),
        (backend.node in drained.nodes, "node drained here" if backend.node in drained.here else "node drained"),
        (node is not None and not node.up, "node down"),
        (node is not None and node.weight <= 0, "node weight 0"),
        (backend.weight <= 0, "weight 0"),
        (_place(backend, node) is None or health is Health.UNREACHED, "no address"),
        (health is Health.PENDING, "first probe pending"),
        (health is Health.DOWN, "down"),
    )
    return next((reason for holds, reason in reasons if holds), SERVING)


def left_to_docker(backend: Backend, node: Node | None, health: Health | None, drained: Drained) -> bool:
    """Whether a backend would serve if its own node reached it: Docker's own mesh does, by another of its networks."""
    if health is not Health.UNREACHED and not backend.unreached:
        return False
    return standing(replace(backend, address=ANY_ADDRESS), node, Health.UNKNOWN, drained) == SERVING


def _place(backend: Backend, node: Node | None) -> Address | None:
    """Where flows for a backend are sent: to itself where it is here, else to its node."""
    if backend.local or backend.address is not None:
        return backend.address
    return node.address if node is not None else None
