# SPDX-License-Identifier: Apache-2.0
"""A run: three nodes, flows and changes by a seed, and what became of all flows."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import Any

from tests.flows.changes import Changes
from tests.flows.check import Checker, Flow, Verdict
from tests.flows.nodes import Nodes
from tests.support.lab.netns import Lab

DATAGRAM = 1372  # bytes: what fits through the tunnel where the MTU is 1,500


@dataclass
class Outcome:
    """What a run showed.

    Attributes:
        changes: how many were made, by kind.
        failures: what the nodes counted, by "SERVICE CAUSE".
        history: when what changed, and what was served from then on.
        uncounted: sentences, of flows that were refused without any node counting it.
    """

    engine: str
    return_path: str
    seed: int
    seconds: float
    verdict: Verdict
    changes: dict[str, int]
    failures: dict[str, int]
    verdicts: dict[str, int]
    uncounted: list[str]
    history: list[tuple[float, str]]

    @property
    def right(self) -> bool:
        return not self.verdict.wrong and not self.uncounted

    def told(self) -> dict[str, Any]:
        """For a person, and for a table."""
        found = self.verdict
        return {
            "engine": self.engine,
            "return_path": self.return_path,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "flows": found.flows,
            "results": dict(sorted(found.results.items())),
            "wrong": len(found.wrong),
            "refused": dict(sorted(found.refused.items())),
            "ended with their task": dict(sorted(found.broken.items())),
            "datagrams sent again": found.lost,
            "shown the node's address": found.exceptional,
            "longest": round(found.longest, 2),
            "changes": self.changes,
            "counted failures": dict(sorted(self.failures.items())),
            "verdicts": {name: n for name, n in sorted(self.verdicts.items()) if n},
            "uncounted": self.uncounted,
        }


def run(engine: str, seed: int, flows: int, *, datagram: int = DATAGRAM, lab: Lab | None = None) -> Outcome:
    """Let so many flows go through nodes with this engine.

    The seed decides what is called from where and with what, and what changes; the order in which both meet is the
    machine's.
    """
    chance = random.Random(seed)
    return_path = chance.choice(("tunnel", "direct"))
    begun = time.monotonic()
    with lab or Lab() as made:
        nodes = Nodes(made, engine, return_path)
        changes = Changes(nodes, chance)
        changes.begin()
        changes.run(flows, datagram)
        failures, verdicts = nodes.failures(), nodes.verdicts()
        known_as = {a: nodes.router.address for caller in nodes.callers[1:] for a in caller.addresses}
        nodes.close()
    checker = Checker(engine, changes.all_tasks, changes.troubles, known_as)
    for caller in changes.callers:
        for line in caller.lines:
            checker.judge(Flow.of(line))
    seconds = time.monotonic() - begun
    uncounted = checker.uncounted(failures)
    found, history = checker.verdict, changes.history
    return Outcome(engine, return_path, seed, seconds, found, changes.made, failures, verdicts, uncounted, history)


def show(outcome: Outcome, limit: int = 20) -> str:
    """The same as text, with the first of what was wrong, and what had happened."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in outcome.told().items()]
    if not outcome.right:
        lines += [f"WRONG {each}" for each in outcome.verdict.wrong[:limit]]
        lines += [f"{when:.3f} {what}" for when, what in outcome.history]
    return "\n".join(lines)
