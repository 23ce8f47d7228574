# SPDX-License-Identifier: Apache-2.0
"""Who is silent: a host that acknowledges nothing, or a process that says nothing for long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mesh.cluster.heartbeat import DEAD, HUNG, QUIET, Heartbeats, acknowledged
from tests.support.polling import until


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            yield near, far


class Watched:
    """A connection that is looked at, and what became of it."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.asked, self.silent, self._sock = 0, 0, sock
        self.pulses = Heartbeats()
        self.pulse = self.pulses.watch(sock, self._ask, self._end)

    async def _ask(self) -> None:
        self.asked += 1
        if self._sock is not None:
            self._sock.send(b"?")

    def _end(self) -> None:
        self.silent += 1

    async def at(self, lived: float) -> tuple[int, int]:
        """Look; how often it was asked, and found silent."""
        self.pulses.lived = lived
        self.pulse.look(lived)
        await asyncio.sleep(0)
        return self.asked, self.silent


async def test_who_acknowledges_nothing_is_dead_soon() -> None:
    watched = Watched(None)
    assert await watched.at(QUIET / 2) == (0, 0)
    assert await watched.at(QUIET) == (1, 0)
    assert await watched.at(QUIET + DEAD / 2) == (1, 0)
    assert await watched.at(QUIET + DEAD) == (1, 1)


async def test_who_speaks_lives() -> None:
    watched = Watched(None)
    for lived in (QUIET, 2 * QUIET, 3 * QUIET):
        assert (await watched.at(lived))[1] == 0
        watched.pulse.heard()
    assert watched.asked == 3


async def test_a_busy_process_has_time_while_its_kernel_acknowledges(pair: tuple[socket.socket, ...]) -> None:
    near, _ = pair
    watched = Watched(near)
    lived = QUIET
    while lived < HUNG:
        asked, silent = await watched.at(lived)
        assert silent == 0
        near.send(b"?")  # delayed acknowledgements come with the second segment
        await until(lambda: near.send(b"?") and acknowledged(near) <= 0.02, "an acknowledgement", interval=0.001)
        lived += DEAD
    assert asked > 3
    assert (await watched.at(HUNG + DEAD))[1] == 1


async def test_own_delays_are_nobodys_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped for long wakes up: it has lived for a moment only."""
    pulses = Heartbeats()
    silent: list[bool] = []
    pulses.watch(None, lambda: asyncio.sleep(0), lambda: silent.append(True))
    now = 0.0
    monkeypatch.setattr("mesh.cluster.heartbeat.time", SimpleNamespace(monotonic=lambda: now))
    running = asyncio.create_task(pulses.run())
    await asyncio.sleep(0)
    now = 3600.0
    await until(lambda: pulses.lived, "it lives on")
    assert pulses.lived < QUIET
    assert not silent
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def test_a_socket_that_cannot_be_asked_has_acknowledged_nothing() -> None:
    assert acknowledged(None) == float("inf")
    with socket.socket(socket.AF_UNIX) as other:
        assert acknowledged(other) == float("inf")
