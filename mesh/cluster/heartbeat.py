# SPDX-License-Identifier: Apache-2.0
"""Whether the other ends of connections live, by what they say and by what their kernels acknowledge.

A process that is busy says nothing for a while, but its host still acknowledges what it is sent; a host without power
does not. Time in which this process itself did not get to run counts for nobody's silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from mesh._linux import TCPINFO
from mesh.supervisor import recorded

PERIOD: Final = 0.1  # seconds between looks
QUIET: Final = 1.1  # seconds without a word after which the other end is asked; agents report every second
DEAD: Final = 0.35  # seconds after that in which its kernel has to acknowledge the question
HUNG: Final = 5.0  # seconds without a word although its kernel acknowledges
_ROUNDING: Final = 0.02  # seconds by which the kernel's clock is coarser

Ask = Callable[[], Coroutine[Any, Any, None]]


def acknowledged(sock: socket.socket | None) -> float:
    """Seconds since the peer's kernel last acknowledged anything; much, where nobody can tell."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCPINFO.size)  # type: ignore[union-attr]
        return TCPINFO.load("tcpi_last_ack_recv", data) / 1e3  # milliseconds
    return float("inf")


class Heartbeat:
    """One connection; `heard` is to be called whenever the other end has said anything."""

    def __init__(self, pulses: Heartbeats, sock: socket.socket | None, ask: Ask, silent: Callable[[], None]) -> None:
        self._heartbeats, self._sock, self._ask, self._silent = pulses, sock, ask, silent
        self._heard = pulses.lived
        self._asked: tuple[float, float] | None = None  # when, of lived and of all seconds
        self._asking: asyncio.Task[None] | None = None

    def heard(self) -> None:
        """The other end lives."""
        self._heard, self._asked = self._heartbeats.lived, None

    def look(self, lived: float) -> None:
        """Ask, wait, or give it up."""
        if lived - self._heard < QUIET:
            return
        if self._asked is not None:
            if lived - self._asked[0] < DEAD:
                return
            is_alive = acknowledged(self._sock) <= time.monotonic() - self._asked[1] + _ROUNDING
            if not is_alive or lived - self._heard >= HUNG:
                self.end()
                self._silent()
                return
        self._asked = lived, time.monotonic()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._try())

    async def _try(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # a connection that ends meanwhile is told of elsewhere
            await self._ask()

    def end(self) -> None:
        """Look no more."""
        self._heartbeats.drop(self)
        if self._asking is not None:
            self._asking.cancel()


class Heartbeats:
    """Looks at many connections while `run` runs. `lived`: the seconds in which this process could have heard them."""

    def __init__(self) -> None:
        self.lived = 0.0
        self._all: dict[Heartbeat, None] = {}

    def watch(self, sock: socket.socket | None, ask: Ask, silent: Callable[[], None]) -> Heartbeat:
        """Look at a connection from now on.

        Args:
            sock: whose acknowledgements are looked at; None: only words count.
            ask: sends a ping.
            silent: called once, if the other end is taken for dead.
        """
        pulse = Heartbeat(self, sock, ask, silent)
        self._all[pulse] = None
        return pulse

    def drop(self, pulse: Heartbeat) -> None:
        """Look at it no more."""
        self._all.pop(pulse, None)

    async def run(self) -> None:
        """Until cancelled."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(PERIOD)
            now = time.monotonic()
            self.lived += min(now - before, 2 * PERIOD)
            before = now
            for pulse in list(self._all):
                with recorded("heartbeat"):
                    pulse.look(self.lived)
