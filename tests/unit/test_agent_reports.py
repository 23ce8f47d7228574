# SPDX-License-Identifier: Apache-2.0
"""What a manager's agent keeps of the others' reports."""

from __future__ import annotations

import asyncio

from mesh.agent_reports import Reports
from mesh.cluster.wire import Report, Verdict

UP, DOWN = Verdict("up"), Verdict("down", "refused")


async def test_verdicts_of_all_nodes_are_one_and_told_once_for_many() -> None:
    told: list[dict[str, Verdict]] = []
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
