# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's memory at its end."""

from __future__ import annotations

import gc
import sys

from mesh._fastpath import Engine


def test_an_engine_that_the_garbage_collector_frees() -> None:
    """Of a daemon that could not start, for one: its engine is part of a cycle."""
    complaints: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, complaints.append
    try:
        cycle: list[object] = [
            Engine(
                threads=1, retries=0, connect_timeout=1, idle_timeout=0, udp_idle_timeout=1,
                udp_sessions=1, connections=1, pipes=0, ports=(30000, 30001),
            )
        ]  # fmt: skip
        cycle.append(cycle)
        del cycle
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert not complaints
