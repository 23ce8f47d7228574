# SPDX-License-Identifier: Apache-2.0
"""What somebody else removes of ours from the kernel: nftables tables, hooks, pins, listening sockets.

An engine looks whether all of it is there, when the kernel announces a change and every LOOK seconds, and puts back
what is not. Each loss is logged and counted once, and the node is not ready until it is made good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from mesh.datapath.netlink import Monitor
from mesh.errors import MeshError
from mesh.supervisor import FAULTS

LOOK: Final = 1.0  # seconds between two looks at what the kernel announces no change of
QUIET: Final = 0.05  # least seconds between two looks, however often it announces one

log = structlog.get_logger("mesh")


class Losses:
    """The losses of one engine and of what stands beside it; any thread may read them.

    Attributes:
        count: how many things were found removed, since the engine was opened.
    """

    def __init__(self) -> None:
        self.count = 0
        self._missing: dict[str, tuple[str, ...]] = {}  # by part
        self._reasons: dict[str, str] = {}  # why a part could not be put back

    @property
    def missing(self) -> Sequence[str]:
        """What is away now, one sentence each."""
        parts = list(self._missing.items())
        return [
            f"{name} was removed by somebody else" + (f", and cannot be put back: {why}" if why else "")
            for part, names in parts
            for why in (self._reasons.get(part, ""),)
            for name in names
        ]

    def check(self, part: str, lost: Callable[[], Sequence[str]], restore: Callable[[], None]) -> None:
        """Look, and put back what is away.

        Args:
            part: whose look this is.
            lost: names what is away now.
            restore: puts it back. A MeshError or OSError is logged, and the next look tries again.
        """
        gone = tuple(lost())
        known = self._missing.get(part, ())
        if not gone and not known:
            return
        self._missing[part] = gone
        fresh = [name for name in gone if name not in known]
        self.count += len(fresh)
        for name in fresh:
            log.warning("removed from the kernel by somebody else; putting it back", what=name)
        why = ""
        try:
            if gone:
                restore()
        except (MeshError, OSError) as error:
            why = str(error)
            if why != self._reasons.get(part):
                log.error("cannot put back what somebody else has removed; retrying", what=list(gone), error=why)
        left = tuple(lost()) if gone else ()
        self._reasons[part] = why if left else ""
        self._missing[part] = left
        back = [name for name in {*known, *gone} if name not in left]
        if back:
            log.info("in the kernel again", what=sorted(back))


class Watch:
    """A thread that calls `look` every LOOK seconds, and at once when `monitor` tells of a change.

    Args:
        monitor: closed with the watch; None: there is nothing to be told.
    """

    def __init__(self, name: str, look: Callable[[], None], monitor: Monitor | None = None) -> None:
        self._look = look
        self._monitor = monitor
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            started = time.monotonic()
            if self._monitor is None:
                self._closed.wait(LOOK)
            else:
                self._monitor.wait(LOOK)
            if self._closed.is_set():
                return
            try:
                self._look()
            except Exception as error:  # the next look tries again
                FAULTS.failed(f"thread {self._thread.name}", error)
                log.warning("cannot look after what is ours in the kernel; retrying", error=str(error))
                self._closed.wait(LOOK)
            self._closed.wait(max(QUIET - (time.monotonic() - started), 0.0))

    def close(self) -> None:
        """End the thread; again: does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._monitor is not None:
            self._monitor.wake()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self._monitor is not None:
            self._monitor.close()
