# SPDX-License-Identifier: Apache-2.0
"""Which nodes prove themselves, and what this node demands of each: never more than the others are sure to give.

A node begins to prove as soon as its engine has a key, and says so with its reports. Managers pass that on, and others
demand it of that node a moment later. A node that has proven itself once has to for good, across restarts of whoever
asks; unless its agent itself says otherwise, as one of an earlier build does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from mesh.cluster import wire
from mesh.cluster.keys import Keys
from mesh.datapath.proof import WINDOW, Proof
from mesh.model import Address, Node, ProofLevel

GRACE: Final = 5.0  # seconds between a node's word that it proves, and the demand that it does
SKEW: Final = WINDOW / 2  # seconds: nodes whose clocks are as far from a manager's understand each other
NAME_AFTER: Final = 10.0  # seconds after which a node is named whose build does not know proofs


class _Demand:
    """Since when nodes are known to reach a level, and so of which it is demanded.

    Args:
        patient: nothing is demanded until GRACE after this node is known to reach the level itself, unless it was when
            this began: others have to know that before they prove anything to it.
    """

    def __init__(self, level: ProofLevel, *, patient: bool) -> None:
        self._level, self._patient = level, patient
        self._since: dict[str, float] = {}  # by node; monotonic
        self._own_since = -math.inf

    def of(
        self, levels: Mapping[str, Node], own: str, before: frozenset[str], now: float
    ) -> tuple[dict[str, Node], frozenset[str] | None]:
        """Nodes that reach the level, and which of them have to; None: nobody has to, for this node does not.

        Args:
            before: those that had to.
        """
        reach = {n.id: n for n in levels.values() if n.proof >= self._level and n.id != own and n.address is not None}
        if own not in levels or levels[own].proof < self._level:
            self._since, self._own_since = {}, math.inf
            return reach, None
        if self._own_since == math.inf:
            self._own_since = now
        self._since = {node: self._since.get(node, now) for node in reach}
        if self._patient and now - self._own_since < GRACE:
            return reach, None
        return reach, frozenset(n for n in reach if n in before or now - self._since[n] >= GRACE)


def _addresses(nodes: Iterable[Node]) -> frozenset[Address]:
    return frozenset(node.address for node in nodes if node.address is not None)


class Proofs:
    """What is known of other nodes' proofs, and of this node's own.

    Args:
        require: accept nothing unproven, whoever sends it (`peer_proof = "require"`).

    Attributes:
        holds: names of the keys that this node's engine has, first the one that it proves by.
        last: what the engine was given last.
    """

    def __init__(self, keys: Keys, *, require: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._require, self._clock = keys, require, clock
        self._told: dict[str, ProofLevel] = {}  # by nodes' agents themselves, to a manager
        self._peer = _Demand(ProofLevel.PROVES, patient=False)
        self._tunnel = _Demand(ProofLevel.TUNNEL, patient=True)
        self._without: dict[str, float] = {}  # when a node was first known not to know proofs; monotonic
        self._skews: dict[str, float] = {}  # of nodes' clocks, seconds, where it matters
        self.holds: tuple[str, ...] = ()
        self.last = Proof(require=require)

    @property
    def own(self) -> ProofLevel:
        """How far this node proves."""
        return ProofLevel.TUNNEL if self.holds else ProofLevel.KNOWS

    def heard(self, node: str, report: wire.Report, now: float) -> bool:
        """An agent's word, to a manager. Returns whether its node's level has changed.

        Args:
            now: Unix seconds.
        """
        level = ProofLevel.told(report.proof)
        if report.holds[:1] and report.holds[0] not in self._keys.entries:
            level = min(level, ProofLevel.KNOWS)  # it proves by a key that this node does not know
        skew = report.clock - now if report.clock else 0.0
        self._skews.pop(node, None)
        if abs(skew) > SKEW:
            self._skews[node] = skew
            level = min(level, ProofLevel.KNOWS)
        before, self._told[node] = self._told.get(node), level
        return level != before

    def level(self, node: Node, own: str, *, reads: bool) -> ProofLevel:
        """A node's level. A manager that reads the swarm knows it by the node's own word, else as it was before this
        process began; who is told knows it by a manager's."""
        if not reads:
            return node.proof
        if node.id == own:
            return self.own
        known = ProofLevel.PROVES if node.id in self._keys.proving else ProofLevel.NONE
        return self._told.get(node.id, ProofLevel.TUNNEL if node.id in self._keys.tunnel else known)

    def proof(self, nodes: Iterable[Node], own: str) -> Proof:
        """What the engine is to prove and to demand now, of nodes with their levels.

        A node that does not prove by a manager's word, such as one with a wrong clock, demands nothing either.
        """
        now = self._clock()
        levels = {n.id: n for n in nodes}
        called = levels[own].address if own in levels else None
        if not levels or not self.holds:  # not known yet, or the engine has no key to check by
            return Proof(self._keys.ring(), require=self._require, known=False, own=called)
        if (self._keys.proving | self._keys.tunnel) - levels.keys():
            self._keys.node_removed()
            self._keys.remember(proving=self._keys.proving & levels.keys(), tunnel=self._keys.tunnel & levels.keys())
        proving, due = self._peer.of(levels, own, self._keys.proving, now)
        tunnel, tunnel_due = self._tunnel.of(levels, own, self._keys.tunnel, now)
        self._keys.remember(proving=due, tunnel=tunnel_due)
        return Proof(
            self._keys.ring(),
            _addresses(proving[n] for n in due or ()),
            _addresses(proving.values()) if due is not None else frozenset(),
            self._require,
            _addresses(tunnel[n] for n in tunnel_due or ()),
            _addresses(tunnel.values()),
            own=called,
        )

    def ready(self, connected: Iterable[str], report_of: Callable[[str], wire.Report]) -> str:
        """The key that waits and that all agents that call this manager hold, or empty."""
        waiting = self._keys.waiting()
        if not waiting or waiting not in self.holds:
            return ""
        reports = (report_of(node) for node in connected)
        return waiting if all(waiting in report.holds for report in reports if report.proof) else ""

    def rows(self, reports: Mapping[str, wire.Report]) -> list[dict[str, Any]]:
        """The keys as `ClusterView.keys` shows them, the newest first.

        Args:
            reports: of this node's own agent and of those that call it, by node.
        """
        now = self._keys.now()
        used = next((name for name, key in self._keys.entries.items() if key.active), "")
        return [
            {
                "id": name,
                "state": "waiting" if not key.active else "in use" if name == used else "accepted",
                "age_seconds": max(now - key.made / 1000, 0.0),
                "missing": sorted(node for node, said in reports.items() if said.proof and name not in said.holds),
            }
            for name, key in self._keys.entries.items()
        ]

    def problems(self, nodes: Iterable[Node], own: str) -> Iterator[str]:
        """Nodes of which nothing is demanded, and clocks that are wrong, one sentence each."""
        now = self._clock()
        known = {n.id: n for n in nodes}
        without = {
            n.id
            for n in known.values()
            if n.engine and n.up and n.id != own and n.proof in (ProofLevel.NONE, ProofLevel.PROVES)
        }
        self._without = {node: self._without.get(node, now) for node in without}
        means = "refused" if self._require else "accepted without a proof"
        for node in sorted(n for n, since in self._without.items() if now - since >= NAME_AFTER):
            where = "" if known[node].proof is ProofLevel.NONE else " through the tunnel"
            yield (
                f"node {known[node].name}: its build of mesh does not prove that it is a node; what it hands "
                f"over{where} is {means} (upgrade it)"
            )
        for node, skew in sorted(self._skews.items()):
            if node in known:
                yield (
                    f"node {known[node].name}: its clock is {skew:+.0f} s off; what it hands over is {means} "
                    "(set its clock)"
                )
