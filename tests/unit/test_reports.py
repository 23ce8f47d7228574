# SPDX-License-Identifier: Apache-2.0
"""What a manager's agent keeps of the others' reports."""

from __future__ import annotations

import asyncio

from mesh.cluster.reports import LINGER, Deaths, Reports
from mesh.cluster.wire import HealthReport, Report
from mesh.model import Backend, Inventory

UP, DOWN = HealthReport("up"), HealthReport("down", "refused")


async def test_verdicts_of_all_nodes_are_one_and_told_once_for_many() -> None:
    told: list[dict[str, HealthReport]] = []
    reports = Reports(lambda: told.append(dict(reports.verdicts)))
    assert (reports.of("n1"), reports.age("n1")) == (Report({}), None)
    for number in range(50):
        reports.take(f"n{number}", Report({f"t{number}": UP}))
    assert not told
    await asyncio.sleep(0.05)
    assert told == [{f"t{number}": UP for number in range(50)}]
    reports.take("n1", Report({"t1": UP}, {"*:80/tcp": "d"}))  # the same verdicts
    await asyncio.sleep(0.05)
    assert len(told) == 1
    assert reports.of("n1").digests == {"*:80/tcp": "d"}
    reports.take("n1", Report({"new": DOWN}))
    await asyncio.sleep(0.05)
    assert (told[-1]["new"], "t1" in told[-1], len(told)) == (DOWN, False, 2)
    age = reports.age("n1")
    assert age is not None and 0 <= age < 60
    reports.clear()
    assert not reports.verdicts


def test_a_death_is_told_longer_than_its_node_knows_the_backend() -> None:
    """Another manager that has not read yet that it is gone would use it again; seen when an Engine was just back."""
    now = 0.0
    deaths = Deaths(clock=lambda: now)

    def inventory(*names: str) -> Inventory:
        return Inventory((), tuple(Backend(name, "s", "n", None) for name in names))

    assert deaths.keep({"a": UP, "b": DOWN, "c": DOWN}, inventory("a", "b", "c")) == {"a": UP, "b": DOWN, "c": DOWN}
    now = 1.0
    assert deaths.keep({"a": UP}, inventory("a", "c")) == {
        "a": UP,
        "b": DOWN,
    }  # nothing is known of c now: it may serve
    now = 1.0 + LINGER / 2
    assert deaths.keep({}, inventory()) == {"b": DOWN}
    assert deaths.keep({"b": UP}, inventory("b")) == {"b": UP}
    now = LINGER
    assert deaths.keep({}, inventory()) == {}
