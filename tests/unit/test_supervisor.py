# SPDX-License-Identifier: Apache-2.0
"""What fails in the daemon is named, whoever would have noticed it, and tried again."""

from __future__ import annotations

import asyncio

import pytest

from mesh import supervisor
from mesh.errors import ProviderError
from mesh.supervisor import CALM, Faults, Told, recorded, supervise, watch_loop
from tests.support.polling import until


async def test_a_part_that_fails_twice_is_a_problem_until_it_is_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "AGAIN", (0.001, 0.001))
    now, runs = [0.0], [0]
    faults = Faults(lambda: now[0])

    async def work() -> None:
        runs[0] += 1
        if runs[0] < 4:
            assert len(faults.problems) == (runs[0] > 2), "one failure may be chance"
            raise ZeroDivisionError("oh")

    await supervise("paths", work, faults)
    assert faults.parts == {"paths": "ZeroDivisionError: oh"} and "part paths" in faults.problems[0]
    now[0] += CALM
    assert not faults.problems
    assert faults.failed("paths", "again") == 1


async def test_errors_that_nobody_waits_for_are_taken_down() -> None:
    faults = Faults()
    watch_loop(faults)
    loop = asyncio.get_running_loop()

    async def fails() -> None:
        raise LookupError("lost")

    for _ in range(2):
        loop.call_soon(lambda: 1 // 0)
        task = asyncio.create_task(fails(), name="forgotten")
        await asyncio.sleep(0.01)
        del task
    await until(lambda: faults.parts.keys() == {"event loop", "forgotten"}, "taken down")


def test_a_round_that_fails_is_recorded_but_for_foreseen_errors() -> None:
    faults = Faults()
    for _ in range(2):
        with recorded("probes", faults):
            raise KeyError("x")
    assert list(faults.parts) == ["probes"]
    with pytest.raises(ProviderError), recorded("probes", faults):
        raise ProviderError("docker is away")


def test_what_could_not_be_told_is_told_again() -> None:
    heard: list[int] = []
    told = Told(0)

    def listener(value: int) -> None:
        told.tell(value, listener)  # it may lead here again
        if value == 1 and not heard:
            heard.append(-1)
            raise RuntimeError
        heard.append(value)

    with pytest.raises(RuntimeError):
        told.tell(1, listener)
    assert told.value == 0
    told.tell(1, listener)
    told.tell(1, listener)
    assert (heard, told.value) == ([-1, 1], 1)
