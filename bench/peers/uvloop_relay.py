# SPDX-License-Identifier: Apache-2.0
"""A proxy as one would write it in an afternoon with asyncio protocols on uvloop.

uvloop_relay.py LISTEN_ADDRESS PORT,PORT... BACKEND,BACKEND...

Protocols, not streams (streams cost a task and a copy more), pause and resume for back-pressure, half-close both ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Iterator

import uvloop


class Relay(asyncio.Protocol):
    """One direction's end: what arrives here leaves through `peer`."""

    transport: asyncio.Transport
    peer: Relay | None = None

    def __init__(self) -> None:
        self.early: list[bytes] = []  # what arrived before there was a peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's do not derive from it

    def data_received(self, data: bytes) -> None:
        if self.peer:
            self.peer.transport.write(data)
        else:
            self.early.append(data)

    def eof_received(self) -> bool:
        if self.peer and self.peer.transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self.peer.transport.write_eof()
        return True  # stay half-open; connection_lost follows when both directions have ended

    def pause_writing(self) -> None:
        if self.peer:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.peer:
            self.peer.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer:
            self.peer.transport.close()
            self.peer.peer = None
            self.peer = None


class Upstream(Relay):
    """The end towards the backend. Once both directions have ended, both ends close."""

    def eof_received(self) -> bool:
        super().eof_received()
        return self.peer is not None and not self.peer.ended  # type: ignore[attr-defined]


class Downstream(Relay):
    """The end towards the client."""

    ended = False

    def __init__(self, port: int, backends: Iterator[str]) -> None:
        super().__init__()
        self.port = port
        self.backends = backends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.task = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, upstream = await loop.create_connection(Upstream, next(self.backends), self.port)
        except OSError:
            self.transport.abort()
            return
        if self.transport.is_closing():  # the client has left meanwhile
            upstream.transport.abort()
            return
        self.peer, upstream.peer = upstream, self
        upstream.transport.writelines(self.early)
        self.early.clear()
        if self.ended:
            upstream.transport.write_eof()

    def eof_received(self) -> bool:
        self.ended = True
        return super().eof_received()


async def main(address: str, ports: list[int], backends: list[str]) -> None:
    loop = asyncio.get_running_loop()
    turn = itertools.cycle(backends)
    for port in ports:
        await loop.create_server(
            lambda port=port: Downstream(port, turn), address, port, reuse_port=True, backlog=65535
        )
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], [int(port) for port in sys.argv[2].split(",")], sys.argv[3].split(",")))
