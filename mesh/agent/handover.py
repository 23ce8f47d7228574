# SPDX-License-Identifier: Apache-2.0
"""The running daemon's side of a take-over: it waits on its socket for a process that wants its place."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from mesh.agent.lock import Lock
from mesh.agent.takeover import SOCKET, Predecessor, TakeoverError
from mesh.errors import MeshError
from mesh.model import Frontend

log = structlog.get_logger("mesh")


class Host(Protocol):
    """What the agent does for a hand-over."""

    engine: str

    async def pause(self) -> None:
        """Change nothing from now on."""

    async def resume(self) -> None:
        """Nobody took over: go on."""

    async def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """Descriptors of the engine's listening sockets; empty for an engine without."""

    async def let_go(self, successor: str) -> None:
        """The new process, with that engine, serves: stop accepting, close what it will open."""


class HandOver:
    """Listens on `takeover.sock`; one hand-over at a time."""

    def __init__(self, state_dir: Path, lock: Lock, host: Host, done: Callable[[], Awaitable[None]]) -> None:
        self._path = state_dir / SOCKET
        self._lock = lock
        self._host = host
        self._done = done

    async def run(self) -> None:
        """Until cancelled, or until somebody took over; then `done` is called."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as server:
            new = self._path.with_suffix(".new")
            new.unlink(missing_ok=True)
            server.bind(str(new))
            new.chmod(0o600)
            server.listen(1)
            new.rename(self._path)  # in place of the process before us, if there was one
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(server)
                if await self._hand_over(Predecessor(connection)):
                    await self._done()
                    return

    async def _hand_over(self, asking: Predecessor) -> bool:
        """Whether the new process has our place now."""
        try:
            await asyncio.to_thread(asking.hello)
            log.info("hand-over begins", engine=asking.engine)
            await self._host.pause()
            try:
                listeners = await self._host.listeners()
                await asyncio.to_thread(asking.offer, self._host.engine, self._lock, listeners)
            except BaseException:
                await self._host.resume()
                raise
            await self._host.let_go(asking.engine)
            await asyncio.to_thread(asking.yours)
        except (MeshError, OSError) as error:
            log.error("hand-over failed; this process serves on", error=str(error))
            if not isinstance(error, TakeoverError):
                asking.refuse(str(error))
            return False
        finally:
            asking.close()
        log.info("handed over")
        return True

    def remove(self) -> None:
        """Take the socket away, unless it is a successor's."""
        with contextlib.suppress(OSError):
            self._path.unlink()
