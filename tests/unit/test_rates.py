# SPDX-License-Identifier: Apache-2.0
"""Rates of backends, from two looks at the counters."""

from __future__ import annotations

import ipaddress

import pytest

from mesh.api.rates import rates
from mesh.datapath.base import BackendKey, Stats
from mesh.datapath.counters import Counters, Failure
from mesh.model import Frontend, Protocol

FRONT = Frontend(ipaddress.ip_address("::"), 80, Protocol.TCP)
A, B = (BackendKey(name, 80, 6) for name in "ab")


def test_what_was_counted_in_between_is_divided_by_the_time() -> None:
    failed = {Failure.REFUSED: 5, Failure.UNANSWERED: 1}
    before = Stats(backends={(FRONT, A): Counters(opened=10, closed=4, active=6, failed={Failure.REFUSED: 2})})
    now = Stats(
        backends={
            (FRONT, A): Counters(opened=20, closed=13, active=7, failed=failed),
            (FRONT, B): Counters(opened=3, active=3),
        }
    )
    first, second = rates(before, now, 2.0)
    assert first == {
        "frontend": str(FRONT),
        "backend": "a",
        "open": 7,
        "new_per_second": 5.0,
        "failed_per_second": 2.0,
    }
    assert (second["backend"], second["open"], second["new_per_second"]) == ("b", 3, 1.5)


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_counters_that_have_begun_anew_give_no_rate_below_zero(seconds: float) -> None:
    before = Stats(backends={(FRONT, A): Counters(opened=10, failed={Failure.REFUSED: 2})})
    (row,) = rates(before, Stats(backends={(FRONT, A): Counters(opened=1)}), seconds)
    assert row["new_per_second"] == row["failed_per_second"] == 0
