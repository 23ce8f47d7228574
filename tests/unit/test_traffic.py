# SPDX-License-Identifier: Apache-2.0
"""The second verdict of `mesh status`: how new connections fare."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from mesh.api.traffic import traffic
from mesh.api.view import Traffic, Verdict
from mesh.model import ANY_ADDRESS, Frontend, FrontendState, Problem, Protocol, ServiceOptions, Severity, Target
from mesh.rules import NOBODY

ADDRESS = ipaddress.ip_address("10.77.0.12")
GOOD = Target("a", ADDRESS, 80, 1)
DOWN = Target("b", ADDRESS, 80, 0)
MASKED = Target("c", ADDRESS, 80, 0, masked="no path to node2", agreed=1)


def state(*targets: Target, port: int = 8080, name: str = "web") -> FrontendState:
    return FrontendState(Frontend(ANY_ADDRESS, port, Protocol.TCP), name, name, ServiceOptions(), targets)


def judged(*states: FrontendState, without: int = 0) -> Traffic:
    desired = {each.frontend: each for each in states}
    return traffic(desired, {f: None for f in desired if f.port != without})


def test_all_is_well_also_beside_a_service_without_tasks() -> None:
    assert judged(state(GOOD, DOWN), state(port=8081, name="idle")) == Traffic(Verdict.OK, ())
    assert judged() == Traffic(Verdict.OK, ())


def test_a_rule_that_is_not_in_force_is_no_traffic_that_is_well() -> None:
    empty = Problem("service web, label mesh.allow", "is empty", severity=Severity.CRITICAL)
    closed = replace(state(GOOD), options=ServiceOptions(deny=NOBODY))
    found = traffic({closed.frontend: closed}, {closed.frontend: None}, [empty])
    assert found == Traffic(Verdict.FAILING, ("service web: nobody is let in: label mesh.allow is empty",))
    opened = state(GOOD)
    found = traffic({opened.frontend: opened}, {opened.frontend: None}, [empty])
    assert found.verdict is Verdict.DEGRADED and "a rule that was asked for is not in force" in found.reasons[0]


def test_masked_tasks_are_counted_once_with_the_nodes() -> None:
    other = replace(MASKED, backend="d", masked="no proven path to node3")
    found = judged(state(GOOD, MASKED, other), state(GOOD, MASKED, other, port=8081))
    assert found.verdict is Verdict.DEGRADED
    assert found.reasons == (
        "service web: 2 of its 3 tasks get no new connections from here: no path to node2, no proven path to node3",
    )


def test_a_port_that_is_left_to_docker_is_degraded_and_one_without_anybody_fails() -> None:
    passing = replace(state(MASKED), passing=True)
    found = judged(passing)
    assert found.verdict is Verdict.DEGRADED and len(found.reasons) == 1 and "Docker's own mesh" in found.reasons[0]
    found = judged(state(DOWN, port=8081, name="api"), passing)
    assert found.verdict is Verdict.FAILING
    assert found.reasons[0] == "service api: none of its 1 tasks takes new connections" and len(found.reasons) == 2


def test_a_port_that_the_engine_does_not_hold_fails() -> None:
    found = judged(state(GOOD), state(GOOD, port=8081), without=8081)
    assert found == Traffic(Verdict.FAILING, ("service web: *:8081/tcp is not served",))


def test_panic_is_degraded() -> None:
    assert judged(replace(state(GOOD), panic=True)).verdict is Verdict.DEGRADED
