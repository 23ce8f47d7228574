# SPDX-License-Identifier: Apache-2.0
"""What the control plane's functions cost at scale, by pytest-benchmark. Part of `make bench`, not of `make test`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mesh._maglev import OWNER_FIRST, SlotTable, backend_seed

BACKENDS = 1000


def members(count: int) -> list[tuple[bytes, int, int]]:
    """(seed, owner, weight) of backends, as SlotTable.build takes them."""
    return [(backend_seed(f"backend-{n}"), OWNER_FIRST + n, 1) for n in range(count)]


@pytest.mark.parametrize("size", [16381, 65537])
def test_table_build(benchmark: BenchmarkFixture, size: int):
    """A table of 1,000 backends."""
    table = benchmark(SlotTable.build, size, members(BACKENDS))
    assert len(table.owners()) == BACKENDS


@pytest.mark.parametrize("size", [16381, 65537])
def test_transition(benchmark: BenchmarkFixture, size: int):
    """One of 1,000 backends leaves."""
    before, after = SlotTable.build(size, members(BACKENDS)), SlotTable.build(size, members(BACKENDS)[1:])
    table = benchmark(before.transition, after)
    assert table.tracked_slots() >= 0
