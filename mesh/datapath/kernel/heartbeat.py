# SPDX-License-Identifier: Apache-2.0
"""The agent's heartbeat: until when the programs forward by the tables, should nobody keep them any more.

The programs themselves compare it with the clock (bpf/lib/lb.h), so that it needs no process to hand back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh._abi import ORPHAN_NEVER, STAMP_SHIFT
from mesh.datapath.kernel import codec
from mesh.errors import BpfError

NAME: Final = "mesh_heartbeat"
LEAST: Final = 3.0  # seconds: a shorter timeout than a few beats would hand back while the agent is well
MARGIN: Final = 1  # stamps before the tables are orphaned from which on they count as orphaned to an agent


class Heartbeat:
    """mesh_heartbeat of open maps; any thread, never blocks.

    Args:
        timeout: orphan_timeout, in seconds; 0: never.
        clock: CLOCK_MONOTONIC in nanoseconds.
    """

    def __init__(self, held: _bpf.Map, timeout: float, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._word = _bpf.Mapping(held)
        self._timeout = int(max(timeout, LEAST) * 1e9) if timeout else 0
        self._clock = clock

    @property
    def orphaned(self) -> bool:
        """Whether the programs hand back by now, or may before the next beat is seen."""
        left = stamps_left(self._word.load32(0), self._clock())
        return left is not None and left <= MARGIN

    def beat(self) -> None:
        """Put off the moment from which the tables are orphaned."""
        stamp = ORPHAN_NEVER
        if self._timeout:
            stamp = ((self._clock() + self._timeout >> STAMP_SHIFT) + 1) & 0xFFFFFFFF or 1
        self._word.store32(0, stamp)


def stamps_left(stamp: int, nanoseconds: int) -> int | None:
    """Stamps until tables with this heartbeat are orphaned, 0 or less: they are. None: never. Pure."""
    if stamp == ORPHAN_NEVER:
        return None
    left = stamp - (nanoseconds >> STAMP_SHIFT) & 0xFFFFFFFF
    return left - (1 << 32) if left >> 31 else left


def seconds_left(home: Path) -> float | None:
    """Seconds until the tables pinned below `home` are orphaned, 0 or less: they are, for as long.

    None: never, or they are of a build without heartbeat, or may not be read.
    """
    found = []
    try:
        for pin in home.glob(f"*/{NAME}"):
            held = _bpf.Map.open(str(pin))
            try:
                found.append(stamps_left(codec.unpack_u32(held.lookup(bytes(4)) or bytes(4)), time.monotonic_ns()))
            finally:
                held.close()
    except (BpfError, OSError):
        return None
    known = [left for left in found if left is not None]
    return max(known) * (1 << STAMP_SHIFT) / 1e9 if known and len(known) == len(found) else None
