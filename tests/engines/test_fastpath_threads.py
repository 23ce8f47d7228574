# SPDX-License-Identifier: Apache-2.0
"""The threads of the proxy engine, as the kernel's scheduler sees them."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import NamedTuple

from tests.support.fastpath_bench import engine
from tests.support.polling import wait_for

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
LAYOUT = "IIQiIQQQ"  # struct sched_attr, sched_setattr(2)


class Scheduling(NamedTuple):
    size: int
    policy: int
    flags: int
    nice: int
    priority: int
    slice: int  # ns; 0 where the kernel has no slices to ask for (before 6.12)
    deadline: int
    period: int


def scheduling(thread: int) -> Scheduling:
    """How a thread is scheduled."""
    answer = ctypes.create_string_buffer(struct.calcsize(LAYOUT))
    number = SCHED_GETATTR[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number, thread, answer, len(answer), 0) == 0
    return Scheduling(*struct.unpack(LAYOUT, answer.raw))


def threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def test_the_threads_ask_for_longer_slices_and_for_nothing_else() -> None:
    before, known = scheduling(0), threads()
    longer = before._replace(slice=2 * before.slice)
    with engine(threads=2):
        wait_for(lambda: [scheduling(thread) for thread in threads() - known].count(longer) >= 2)
    assert scheduling(0) == before
