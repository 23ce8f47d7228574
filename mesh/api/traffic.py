# SPDX-License-Identifier: Apache-2.0
"""Whether new connections are served as they should be, apart from whether the daemon does its work: the second verdict
of `mesh status`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mesh.api.view import Traffic, Verdict
from mesh.model import Frontend, FrontendState, Problem
from mesh.rules import NOBODY


def traffic(
    desired: Mapping[Frontend, FrontendState], applied: Mapping[Frontend, object], critical: Iterable[Problem] = ()
) -> Traffic:
    """Judge what this node should serve and what its engine holds.

    A service without any task is not judged: it was scaled to 0, or Swarm has not started any yet.

    Args:
        desired: what this node should serve.
        applied: what its engine holds, by frontend.
        critical: what keeps clients out, or leaves a rule unapplied; `where` begins with "service NAME, ".
    """
    by_service: dict[str, list[FrontendState]] = {}
    for state in desired.values():
        by_service.setdefault(state.service_name or state.service, []).append(state)
    failing, degraded = list[str](), list[str]()
    for name, states in sorted(by_service.items()):
        failing += (f"service {name}: {why}" for why in _failing(states, applied))
        degraded += (f"service {name}: {why}" for why in _degraded(states))
    for problem in critical:
        name, _, place = problem.where.removeprefix("service ").partition(", ")
        closed = any(set(NOBODY) <= set(state.options.deny) for state in by_service.get(name, ()))
        means = "nobody is let in" if closed else "a rule that was asked for is not in force"
        (failing if closed else degraded).append(f"service {name}: {means}: {place} {problem.message}")
    verdict = Verdict.FAILING if failing else Verdict.DEGRADED if degraded else Verdict.OK
    return Traffic(verdict, (*failing, *degraded))


def _failing(states: Sequence[FrontendState], applied: Mapping[Frontend, object]) -> Iterator[str]:
    missing = [str(state.frontend) for state in states if state.frontend not in applied]
    if missing:
        yield f"{', '.join(missing)} is not served"
    if any(s.targets and not s.passing and not any(t.weight for t in s.targets) for s in states):
        yield f"none of its {max(len(state.targets) for state in states)} tasks takes new connections"


def _degraded(states: Sequence[FrontendState]) -> Iterator[str]:
    if any(state.passing for state in states):
        yield "none of its tasks can be reached from here, so new connections are left to Docker's own mesh"
    masked = {t.backend: t for state in states if not state.passing for t in state.targets if t.masked}
    if masked:
        count = max(len(state.targets) for state in states)
        why = ", ".join(sorted({target.masked for target in masked.values()}))
        yield f"{len(masked)} of its {count} tasks get no new connections from here: {why}"
    if any(state.panic for state in states):
        yield "all its tasks are down by our probes, so all are used"
