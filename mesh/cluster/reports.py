# SPDX-License-Identifier: Apache-2.0
"""What the other nodes' agents told a manager last, and all their verdicts as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Final

from mesh.cluster import wire
from mesh.model import Address, Health, Inventory, backend_of_key
from mesh.netaddr import usable

GATHER: Final = 0.005  # seconds for which changes are gathered
LINGER: Final = 10.0  # seconds for which a dead backend is reported that its node's inventory does not name any more
AGAIN: Final = 1.0  # seconds until work that failed is tried again
SHARE: Final = 3.0  # and so many times as long as the work took: at most a quarter of the time goes into it


class Soon:
    """Work that is done once for all who ask for it at about the same time, on the event loop."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._pending: asyncio.TimerHandle | None = None
        self._took = 0.0  # seconds

    def ask(self) -> None:
        """Have it done soon."""
        if self._pending is None:
            pause = max(GATHER, SHARE * self._took)
            self._pending = asyncio.get_running_loop().call_later(pause, self._do)

    def _do(self) -> None:
        self._pending = None
        started = time.monotonic()
        try:
            self._work()
        except Exception:  # the loop takes it down
            self._pending = asyncio.get_running_loop().call_later(AGAIN, self._do)
            raise
        self._took = time.monotonic() - started


class Texts:
    """One object for equal texts, of which there are few. It forgets them all once there were many: sys.intern forgets
    none in some versions of Python, and what is reported is up to the other nodes."""

    MOST: Final = 8192

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._known)

    def one(self, text: str) -> str:
        """The first object that was given for this text."""
        if len(self._known) >= self.MOST:
            self._known.clear()
        return self._known.setdefault(text, text)


class Deaths:
    """A node's word that backends of its own are down, kept for a while after it knows these no more: a manager
    that has not read so yet would take them for serving again."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._down: dict[str, tuple[wire.HealthReport, float]] = {}  # with when it was last true

    def keep(
        self, verdicts: Mapping[str, wire.HealthReport], inventory: Inventory | None
    ) -> dict[str, wire.HealthReport]:
        """What to report, of this node's verdicts and the inventory as it knows it."""
        now = self._clock()
        self._down |= {key: (said, now) for key, said in verdicts.items() if wire.health_of(said) is Health.DOWN}
        missing = self._down.keys() - verdicts.keys()
        present = {b.id for b in inventory.backends} if missing and inventory else set()
        known = {key for key in missing if backend_of_key(key) in present}
        self._down = {key: held for key, held in self._down.items() if now - held[1] < LINGER and key not in known}
        return {**{key: said for key, (said, _) in self._down.items()}, **verdicts}


class Reports:
    """The last report of each node.

    Args:
        on_verdicts: called on the event loop when verdicts have changed, once for many.
    """

    def __init__(self, on_verdicts: Callable[[], None]) -> None:
        self._last: dict[str, wire.Report] = {}
        self._heard: dict[str, float] = {}  # when, monotonic
        self._verdicts: dict[str, wire.HealthReport] = {}
        self._soon = Soon(on_verdicts)

    @property
    def verdicts(self) -> Mapping[str, wire.HealthReport]:
        """Of all nodes over their own backends."""
        return self._verdicts

    def of(self, node: str) -> wire.Report:
        """A node's last report; an empty one where there was none."""
        return self._last.get(node, wire.Report({}))

    def address(self, node: str) -> Address | None:
        """Where a node says that others reach it; None: it does not say, or says nothing that can be used."""
        text = self.of(node).address
        try:
            return usable(ip_address(text)) if text else None
        except ValueError:
            return None

    def age(self, node: str) -> float | None:
        """Seconds since a node was heard; None: never."""
        heard = self._heard.get(node)
        return None if heard is None else time.monotonic() - heard

    def take(self, node: str, report: wire.Report) -> None:
        """A node's new report."""
        before = self._last.get(node)
        self._last[node] = report
        self._heard[node] = time.monotonic()
        if before is not None and before.verdicts == report.verdicts:
            if before.address != report.address:
                self._soon.ask()
            return
        for key in before.verdicts.keys() - report.verdicts.keys() if before is not None else ():
            self._verdicts.pop(key, None)
        self._verdicts |= report.verdicts
        self._soon.ask()

    def clear(self) -> None:
        """Forget all: this node is told by managers from now on."""
        self._last.clear()
        self._verdicts.clear()
