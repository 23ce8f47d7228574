# SPDX-License-Identifier: Apache-2.0
"""A short run of random flows (`make random` makes long ones), and what the checker takes for wrong."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from tests.flows.changes import Task, Trouble
from tests.flows.check import Checker, Flow
from tests.flows.nodes import Place
from tests.flows.run import run, show

FLOWS = 3000
SEED = random.SystemRandom().randrange(1 << 31) if os.environ.get("MESH_TEST_ALL") else 20


@pytest.mark.root
@pytest.mark.parametrize("engine", ["proxy", pytest.param("kernel", marks=pytest.mark.bpf)])
def test_every_flow_is_answered_rightly_or_its_refusal_has_a_cause(engine: str) -> None:
    outcome = run(engine, SEED, FLOWS)
    print(text := show(outcome))
    assert outcome.right, text
    assert outcome.verdict.flows >= FLOWS
    assert sum(n for result, n in outcome.verdict.results.items() if result.endswith(" ok")) > FLOWS * 0.7
    assert outcome.verdict.exceptional > 0
    if engine == "kernel":
        assert outcome.verdicts["translated"] > 0


def place(*networks: str) -> Place:
    nowhere: Any = None
    return Place(nowhere, nowhere, tuple(map(ip_network, ("172.31.0.0/24", *networks))))


TASKS = {
    "web-1": Task("web-1", "web", place("10.0.1.0/24")),
    "web-2": Task("web-2", "web", place(), drained=50.0),
    "web-3": Task("web-3", "web", place(), drained=50.0, killed=60.0),
    "api-1": Task("api-1", "api", place()),
}
TROUBLES = (
    Trouble("api", 100.0, 110.0, "api-0 died"),
    Trouble("", 200.0, 210.0, "no agent on n1"),
    Trouble("web", 300.0, 301.0, "web-0 had left", lossy=True),
)
OK = Flow.of("F 7 web tcp 192.0.2.11 192.0.2.14 40000 70.0 70.5 10 20 1 1 ok web-1 ::ffff:192.0.2.14 40000")
INNER = replace(OK, source="10.88.1.2", seen="::ffff:192.0.2.15", seen_port=40001)
FAILED = replace(OK, service="api", result="ECONNREFUSED", name="-", seen="-", seen_port=0)


def judged(flow: Flow, engine: str = "kernel") -> Checker:
    checker = Checker(engine, TASKS, TROUBLES, {"10.88.1.2": "192.0.2.15"})
    checker.judge(flow)
    return checker


@pytest.mark.parametrize(
    "flow",
    [
        OK,
        INNER,
        replace(OK, source="10.0.1.77", seen="::ffff:172.31.0.1"),
        replace(OK, source="10.0.1.77", name="web-2", seen="::ffff:10.0.1.77", start=40.0),
        replace(OK, source="2001:db8::14", seen="::ffff:172.31.0.1"),
        replace(OK, protocol="udp", name="web-2"),
        replace(FAILED, start=105.0, end=106.0),
        replace(FAILED, start=99.0, end=101.0),
        replace(FAILED, source="2001:db8::14", start=205.0, end=206.0),
        replace(FAILED, source="203.0.113.66", result="silent"),
        replace(OK, protocol="udp", sends=2, start=300.5, end=302.5),
    ],
)
def test_what_is_right(flow: Flow) -> None:
    assert judged(flow).verdict.wrong == []


@pytest.mark.parametrize(
    ("flow", "reason"),
    [
        (replace(OK, name="web-9"), "nobody has this name"),
        (replace(OK, name="api-1"), "another service's task"),
        (replace(OK, name="web-2"), "a connection to a drained task"),
        (replace(OK, protocol="udp", name="web-3"), "a task that had ended"),
        (replace(OK, seen="::ffff:172.31.0.1"), "the client's address is not kept"),
        (replace(OK, source="10.0.1.77", seen="::ffff:10.0.1.77"), "neither the client's address nor the node's"),
        (replace(INNER, seen="::ffff:10.88.1.2"), "the client's address is not kept"),
        (replace(OK, source="203.0.113.66", seen="::ffff:203.0.113.66"), "answered, but denied"),
        (replace(OK, protocol="udp", sends=2), "a datagram was lost"),
        (replace(OK, result="ECONNREFUSED", start=300.5, end=302.5), "refused, and nothing had happened"),
        (replace(OK, result="corrupt"), "corrupt"),
        (replace(OK, result="moved"), "moved"),
        (replace(FAILED, result="silent", start=105.0, end=135.0), "hung"),
        (FAILED, "refused, and nothing had happened"),
        (replace(FAILED, start=205.0, end=206.0), "refused, and nothing had happened"),
    ],
)
def test_what_is_wrong(flow: Flow, reason: str) -> None:
    (said,) = judged(flow).verdict.wrong
    assert said.startswith(f"{reason}: ")


def test_the_proxy_engine_shows_the_node() -> None:
    assert judged(replace(OK, seen="::ffff:172.31.0.1"), "proxy").verdict.wrong == []
    assert judged(OK, "proxy").verdict.wrong


@pytest.mark.parametrize(("counted", "enough"), [({}, False), ({"web refused": 1}, False), ({"api refused": 1}, True)])
def test_a_refusal_must_have_been_counted(counted: dict[str, int], enough: bool) -> None:
    checker = judged(replace(FAILED, start=105.0, end=106.0))
    assert (checker.uncounted(counted) == []) is enough
    assert judged(replace(FAILED, start=105.0, end=106.0, result="ECONNRESET")).uncounted(counted) == []
    assert judged(replace(FAILED, source="2001:db8::14", start=205.0, end=206.0)).uncounted(counted) == []
