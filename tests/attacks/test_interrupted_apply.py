# SPDX-License-Identifier: Apache-2.0
"""Kill the daemon in the middle of an apply: the next one says "in step" while rules and weights are not enforced
(issue 12, item 2).

The process is killed after each single write to a map or to the journal, and what counts is what the loaded program
does with a packet after the restart.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, Plane
from tests.support.lab.netns import Lab

pytestmark = [pytest.mark.root, pytest.mark.bpf]

GOOD, BAD, OTHER = "192.0.2.7", "198.51.100.7", "203.0.113.9"
CLIENT_IP, DENY_OTHERS = 1, 2  # mesh_frontend.flags

Step = list[dict[str, Any]]


def service(number: int, backends: dict[str, int], protocol: str = "tcp", **options: Any) -> dict[str, Any]:
    """A service whose port is PORT + number; `backends` are weights by name."""
    places = {name: [f"172.31.0.{int(name[1:])}", TARGET, weight] for name, weight in backends.items()}
    options = {"table_size": 1021, **options}
    return {
        "name": f"s{number}",
        "published": PORT + number,
        "protocol": protocol,
        "backends": places,
        "options": options,
    }


BEFORE: Step = [
    service(0, {"b11": 1, "b12": 1}),
    service(1, {"b11": 1, "b12": 1}, allow=["192.0.2.0/24"]),
    service(2, {"b13": 1}, "udp", deny=["203.0.113.0/24"]),
    service(3, {"b13": 1}),
]
AFTER: Step = [
    service(0, {"b11": 3, "b12": 1}, deny=["198.51.100.0/24"]),  # a rule is added, a weight changes
    service(1, {"b11": 1, "b12": 0}, deny=["198.51.100.0/24", "2001:db8::/32"]),  # another list, a drain
    service(2, {"b13": 1, "b14": 1}, "udp", allow=["192.0.2.0/24"]),  # a new backend
    service(4, {"b14": 1}, allow=["192.0.2.0/24"]),  # new, while one goes
]
DENIED = {
    "before": {(OTHER, 1), (BAD, 1), (OTHER, 2)},
    "after": {(BAD, 0), (BAD, 1), (BAD, 2), (OTHER, 2), (BAD, 4), (OTHER, 4)},
}
FLAGS = {
    "before": {0: 0, 1: DENY_OTHERS, 2: 0, 3: 0},
    "after": {0: 0, 1: 0, 2: DENY_OTHERS, 4: DENY_OTHERS},
}
WEIGHTS = {
    "before": {0: {"b11": 1, "b12": 1}, 1: {"b11": 1, "b12": 1}, 2: {"b13": 1}, 3: {"b13": 1}},
    "after": {0: {"b11": 3, "b12": 1}, 1: {"b11": 1}, 2: {"b13": 1, "b14": 1}, 4: {"b14": 1}},
}


def wrong(view: dict[str, Any], calls: list[list[Any]], name: str) -> list[str]:
    """What is not as the step called `name` wants it."""
    found = []
    for (source, _, port, _), verdict in zip(calls, view["verdicts"], strict=True):
        if (verdict == "DENIED") is not ((source, port - PORT) in DENIED[name]):
            found.append(f"{source} to port {port}: {verdict}")
    if {f"*:{PORT + n}/{'udp' if n == 2 else 'tcp'}" for n in WEIGHTS[name]} != view["shares"].keys():
        found.append(f"served: {sorted(view['shares'])}")
    for frontend, (flags, shares) in view["shares"].items():
        number = int(frontend.partition(":")[2].partition("/")[0]) - PORT
        weights = WEIGHTS[name].get(number, {})
        fair = {b: 1021 * weight / sum(weights.values()) for b, weight in weights.items()}
        if shares.keys() != fair.keys() or any(abs(shares[b] - fair[b]) > 60 for b in shares):
            found.append(f"slots of {frontend}: {shares}")
        if flags & (CLIENT_IP | DENY_OTHERS) != FLAGS[name].get(number, 0):
            found.append(f"flags of {frontend}: {flags}")
    return found


def test_what_is_enforced_after_a_kill_at_every_write_of_an_apply() -> None:
    with Lab() as lab:
        plane = Plane(lab, backends=0)
        engine: Driver = plane.driver()
        calls = [
            [source, plane.node.address, PORT + n, "udp" if n == 2 else "tcp"]
            for source in (GOOD, BAD, OTHER)
            for n in range(5)
        ]
        plans = {"before": BEFORE, "after": AFTER}
        number, killed = 0, True
        bad: list[str] = []
        while killed:
            number += 1
            # What was asked for as the process was killed is asked for again, or taken back.
            names = ("after", "before") if number % 2 else ("before", "after", "before")
            names = (*names, "after", "before") if number == 1 else names
            done = engine.interrupt(steps=[plans[name] for name in names], calls=calls, at=number)
            killed = done["killed"]
            for name, view in zip(names, done["views"], strict=True):
                bad += [f"killed at write {number - 1}, {name}: {each}" for each in wrong(view, calls, name)]
        assert number > 20, "as many writes as that plan takes at least"
        print("writes:", number)
        assert not bad, bad
        engine.end()
