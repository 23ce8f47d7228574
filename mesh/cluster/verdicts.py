# SPDX-License-Identifier: Apache-2.0
"""What is known of all backends' health: the merge of this node's probes, other nodes' reports and a manager's word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from mesh.cluster import wire
from mesh.cluster.readiness import ReadinessGate
from mesh.cluster.relay_client import view_of
from mesh.cluster.reports import Deaths, Reports
from mesh.model import Health, HealthView, Inventory, backend_of_key
from mesh.supervisor import Told

OnHealth = Callable[[HealthView], None]


class Verdicts:
    """The health of all backends, on a node that reads the swarm or is told of it.

    Args:
        inventory: as this node knows it now; None before the first.
        ended: why backends of this node do not serve although other nodes take them for ready, by backend.
        unreached: why this node does not reach backends that run here, by backend.
        addresses: where backends are reached on their own nodes, as these tell.
        hears: whether a node's agent reports to this one; the readiness gate does not wait for others.
        on_health: takes all verdicts whenever they have changed; called on the event loop by `merge`.
        on_due: `merge` is due, as reports or the readiness gate have changed; called on the event loop.
    """

    def __init__(
        self,
        *,
        inventory: Callable[[], Inventory | None],
        ended: Callable[[], Mapping[str, str]],
        unreached: Callable[[], Mapping[str, str]] = dict,
        addresses: Callable[[], Mapping[str, str]] = dict,
        hears: Callable[[str], bool],
        on_health: OnHealth,
        on_due: Callable[[], None],
    ) -> None:
        self.reports = Reports(on_due)
        self._inventory = inventory
        self._ended = ended
        self._unreached = unreached
        self._addresses = addresses
        self._on_health = on_health
        self._on_due = on_due
        self._readiness = ReadinessGate(hears)
        self._let_in: asyncio.TimerHandle | None = None  # when the next pending backend has been waited for long enough
        self._deaths = Deaths()
        self._told = HealthView()  # by managers, to a node that is told
        self._own = HealthView()
        self._health = Told(HealthView())

    def probed(self, view: HealthView) -> None:
        """Take what this node's probes say."""
        self._own = view

    def told(self, view: HealthView) -> None:
        """Take what a manager tells."""
        self._told = view

    def keep_as_told(self) -> None:
        """Take what is known now for told: from now on this node is told, and nothing is forgotten until then."""
        self._told = view_of(self.all())

    def arrive(self, inventory: Inventory, *, hold: bool) -> None:
        """Look at a new inventory.

        Args:
            hold: keep new backends at the readiness gate; a node that is told leaves that to the managers.
        """
        self._readiness.take(inventory, hold=hold)

    def all(self) -> dict[str, wire.HealthReport]:
        """All that is known of all backends: what each node says of its own, and who is pending."""
        inventory = self._inventory()
        known = {b.id for b in inventory.backends} if inventory else set()
        everything = {**self.reports.verdicts, **self.own()}
        said = {key: report for key, report in everything.items() if backend_of_key(key) in known}
        return self._readiness.apply(said)

    def own(self) -> dict[str, wire.HealthReport]:
        """This node's word for its own backends; one that the others cannot see to have ended is DOWN to them, and one
        that they cannot see to be out of reach UNREACHED."""
        found = {
            key: wire.health_report(health, self._own.reasons.get(key, ""))
            for key, health in self._own.verdicts.items()
            if health is not Health.UNKNOWN
        }
        found |= {key: wire.health_report(Health.UNREACHED, why) for key, why in self._unreached().items()}
        return found | {key: wire.health_report(Health.DOWN, why) for key, why in self._ended().items()}

    def to_report(self) -> dict[str, wire.HealthReport]:
        """What to report to managers: `own`, and for a while backends that were DOWN before they were forgotten."""
        return self._deaths.keep(self.own(), self._inventory())

    def merge(self, *, reads: bool) -> dict[str, wire.HealthReport] | None:
        """Bring all verdicts together, and tell of them where they have changed.

        Args:
            reads: this node reads the swarm; else a manager's word counts for other nodes' backends.

        Returns:
            All verdicts, to be told to other nodes; None on a node that is told.
        """
        verdicts = self.all() if reads else None
        others = self._told if verdicts is None else view_of(verdicts)
        told = others.of
        own = {k: v for k, v in self._own.verdicts.items() if v is Health.UP or told(k) is not Health.PENDING}
        mine = {backend_of_key(key) for key in self._own.verdicts}  # what others still say of their ports is old
        rest = {k: v for k, v in others.verdicts.items() if not is_port_of(k, mine)}
        view = HealthView(
            {**rest, **own},
            {**{k: r for k, r in others.reasons.items() if k in rest and k not in own}, **self._own.reasons},
            self._addresses(),
        )
        self._health.tell(view, self._on_health)
        self._let_in_later(self._readiness.due if reads else None)
        return verdicts

    def _let_in_later(self, due: float | None) -> None:
        if self._let_in is not None:
            self._let_in.cancel()
        self._let_in = None if due is None else asyncio.get_running_loop().call_later(due, self._on_due)


def is_port_of(key: str, backends: Collection[str]) -> bool:
    """Whether a verdict's key is of a port of one of these backends."""
    backend = backend_of_key(key)
    return backend != key and backend in backends
