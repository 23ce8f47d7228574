# SPDX-License-Identifier: Apache-2.0
"""Reverse entries of flows that both sides have closed: kept for late packets, then taken out by a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from mesh import _bpf
from mesh.datapath.kernel import codec

AGE: Final = 60.0  # seconds since the client was last heard
INTERVAL: Final = 30.0  # seconds between two sweeps
MOST: Final = 65536  # entries taken out in one sweep; the LRU takes what is more than that
PAUSE: Final = 1024  # entries after which others get their turn
FLAGS: Final = 34  # offset of mesh_reply.flags' low byte
STAMP: Final = 52  # offset of mesh_reply.stamp
CLOSED: Final = 0x4 | 0x8  # MESH_REPLY_FIN_IN | MESH_REPLY_FIN_OUT
MARKS: Final = bytes(flags & CLOSED == CLOSED for flags in range(256))

log = structlog.get_logger(__name__)


def _is_over(value: bytes, now: int, age: int) -> bool:
    seen = codec.unpack_u32(value[STAMP : STAMP + 4])
    return value[FLAGS] & CLOSED == CLOSED and (now - seen) & 0xFFFFFFFF >= age


def sweep(replies: _bpf.Map, seconds: float = AGE) -> int:
    """Take closed entries out whose client was last heard at least `seconds` ago; at most MOST. Any thread.

    An entry is looked at again right before it goes: its client may have used the port again meanwhile.

    Returns:
        How many went.
    """
    keys, values = replies.dump()
    age, now = int(seconds * 1e9) >> codec.STAMP_SHIFT, time.monotonic_ns() >> codec.STAMP_SHIFT
    size, step = replies.key_size, codec.REPLY.size
    marks = values[FLAGS::step].translate(MARKS)
    gone = at = looked = 0
    while (at := marks.find(1, at)) >= 0 and gone < MOST:
        key, value = keys[at * size : (at + 1) * size], values[at * step : (at + 1) * step]
        at += 1
        looked += 1
        if looked % PAUSE == 0:
            time.sleep(0.002)
        if not _is_over(value, now, age):
            continue
        held = replies.lookup(key)
        if held is not None and _is_over(held, now, age):
            gone += replies.delete(key)
    return gone


class Collector:
    """A thread that sweeps every INTERVAL until it is closed, or `may` says no."""

    def __init__(self, replies: _bpf.Map, may: Callable[[], bool]) -> None:
        self._replies, self._may = replies, may
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mesh-kernel-sweep", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL) and self._may():
            try:
                sweep(self._replies)
            except Exception as error:  # the next sweep tries again
                log.warning("closed flows not swept", error=str(error))

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
