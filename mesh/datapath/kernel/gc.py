# SPDX-License-Identifier: Apache-2.0
"""Garbage collection: a thread deletes reverse NAT entries some time after both sides have closed the flow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from mesh import _bpf
from mesh._abi import REVNAT, STAMP_SHIFT
from mesh.datapath.kernel.codec import REVNAT_CLOSED
from mesh.supervisor import FAULTS

AGE: Final = 60.0  # seconds since the client was last heard
INTERVAL: Final = 30.0  # seconds between two collections
MOST: Final = 65536  # entries deleted in one collection; the LRU evicts the rest
PAUSE: Final = 1024  # entries after which other threads get their turn

log = structlog.get_logger(__name__)


def _is_over(value: bytes, now: int, age: int) -> bool:
    seen = REVNAT.load("stamp", value)
    return REVNAT.load("flags", value) & REVNAT_CLOSED == REVNAT_CLOSED and (now - seen) & 0xFFFFFFFF >= age


def collect(replies: _bpf.Map, seconds: float = AGE) -> int:
    """Delete closed entries whose client was last heard at least `seconds` ago; at most MOST. Any thread.

    An entry is checked again right before it is deleted: its client may have reused the port meanwhile.

    Returns:
        How many were deleted.
    """
    keys, values = replies.dump()
    age, now = int(seconds * 1e9) >> STAMP_SHIFT, time.monotonic_ns() >> STAMP_SHIFT
    size, step = replies.key_size, REVNAT.size
    gone = 0
    for looked, at in enumerate(REVNAT.rows_with("flags", REVNAT_CLOSED, values), start=1):
        if gone >= MOST:
            break
        key, value = keys[at * size : (at + 1) * size], values[at * step : (at + 1) * step]
        if looked % PAUSE == 0:
            time.sleep(0.002)
        if not _is_over(value, now, age):
            continue
        held = replies.lookup(key)
        if held is not None and _is_over(held, now, age):
            gone += replies.delete(key)
    return gone


class Collector:
    """A thread that collects every INTERVAL seconds until it is closed, or `may` returns False."""

    def __init__(self, replies: _bpf.Map, may: Callable[[], bool]) -> None:
        self._replies, self._may = replies, may
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mesh-kernel-gc", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL) and self._may():
            try:
                collect(self._replies)
            except Exception as error:  # the next collection tries again
                FAULTS.failed("collection of closed flows", error)
                log.warning("cannot delete closed flows; retrying", error=str(error))

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
