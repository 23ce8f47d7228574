# SPDX-License-Identifier: Apache-2.0
"""One daemon for one state directory, and how its place is handed from a running process to a new one.

The lock is a flock on `<state_dir>/lock`, whose text is the holder's pid. It belongs to the open file, so a process
that sends its descriptor away shares the lock with the receiver: there is no moment without a holder.

Hand-over, over `<state_dir>/takeover.sock` (a stream of JSON lines, descriptors beside them):

    new   {"hello": 1, "engine": "proxy"}      old  stops changing anything
    old   {"pid", "engine", "frontends": [...]} and the lock's descriptor, then the listening sockets
    new   opens its engine, serves what it knows
    new   {"serving": true}                     old  stops accepting, closes its HTTP and control sockets
    old   {"yours": true}                       new  opens its own; old drains what it has and ends

A new process that goes away before `serving` leaves the old one as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import socket
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from mesh.agent.lock import Lock, check_owner
from mesh.errors import MeshError
from mesh.model import EngineKind, Frontend, Protocol

VERSION: Final = 1
SOCKET: Final = "takeover.sock"
ANSWER_TIMEOUT: Final = 10.0  # seconds for an answer that needs no work
SERVING_TIMEOUT: Final = 60.0  # seconds that the new process has until it serves
_BATCH: Final = 200  # descriptors a message; the kernel takes 253
_LINE_MOST: Final = 8 << 20

log = structlog.get_logger("mesh")


class TakeoverError(MeshError):
    """The ports could not be handed over; the daemon that had them keeps them."""


def _send(sock: socket.socket, message: Mapping[str, Any]) -> None:
    sock.sendall(json.dumps(message).encode() + b"\n")


def _receive(sock: socket.socket) -> dict[str, Any]:
    """One line; byte by byte, since descriptors may lie behind it."""
    line = bytearray()
    try:
        while not line.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte or len(line) > _LINE_MOST:
                raise TakeoverError("the other process went away")
            line += byte
        message = json.loads(line)
    except TimeoutError:
        raise TakeoverError("the other process does not answer in time") from None
    except (OSError, ValueError) as error:
        raise TakeoverError(f"the other process cannot be understood: {error}") from error
    if not isinstance(message, dict):
        raise TakeoverError("the other process cannot be understood")
    if "error" in message:
        raise TakeoverError(str(message["error"]))
    return message


def _send_descriptors(sock: socket.socket, descriptors: Sequence[int]) -> None:
    for start in range(0, len(descriptors), _BATCH):
        socket.send_fds(sock, [b"."], descriptors[start : start + _BATCH])


def _receive_descriptors(sock: socket.socket, count: int) -> list[int]:
    received: list[int] = []
    try:
        while len(received) < count:
            data, descriptors, flags, _ = socket.recv_fds(sock, 1, _BATCH)
            received += descriptors
            if not data or not descriptors or flags & socket.MSG_CTRUNC:
                raise TakeoverError("not all sockets arrived", remedy="raise the limit of file descriptors")
    except OSError as error:
        close_all(received)
        raise TakeoverError(f"the sockets did not arrive: {error}") from error
    except TakeoverError:
        close_all(received)
        raise
    for descriptor in received:
        os.set_inheritable(descriptor, False)
    return received


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Successor:
    """The new process's side. Blocking; call it from a thread."""

    def __init__(
        self, sock: socket.socket, header: Mapping[str, Any], lock: Lock, listeners: Mapping[Frontend, Sequence[int]]
    ) -> None:
        self._sock = sock
        self.pid = int(header["pid"])
        self.engine = EngineKind.told(str(header["engine"]))  # of the old process
        self.lock = lock
        self.listeners = listeners

    @classmethod
    def connect(cls, state_dir: Path, engine: EngineKind) -> Successor | None:
        """Ask the running daemon for its place and receive its sockets; None: there is no daemon running.

        Raises:
            TakeoverError: it does not hand over, with its reason.
            MeshError: the state directory is not safe (mesh.agent.lock.check_owner).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(ANSWER_TIMEOUT)
        try:
            try:
                check_owner(state_dir)
                sock.connect(str(state_dir / SOCKET))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                return None
            _send(sock, {"hello": VERSION, "engine": engine})
            header = _receive(sock)
            (lock,) = _receive_descriptors(sock, 1)
            counts = [(_frontend(f), int(f["descriptors"])) for f in header["frontends"]]
            descriptors = iter(_receive_descriptors(sock, sum(count for _, count in counts)))
            listeners = {frontend: [next(descriptors) for _ in range(count)] for frontend, count in counts}
        except OSError as error:
            sock.close()
            raise TakeoverError(f"cannot talk to the running daemon: {error}", where=str(state_dir)) from error
        except BaseException:
            sock.close()
            raise
        return cls(sock, header, Lock(lock), listeners)

    def serving(self) -> None:
        """Tell that this process serves, and wait until the other has let go.

        Raises:
            TakeoverError: it has not.
        """
        _send(self._sock, {"serving": True})
        self._sock.settimeout(ANSWER_TIMEOUT)
        _receive(self._sock)
        self.lock.sign()
        self._sock.close()

    def abandon(self) -> None:
        """Leave everything to the old process."""
        self._sock.close()
        self.lock.close()


def _frontend(text: Mapping[str, Any]) -> Frontend:
    return Frontend(ipaddress.ip_address(text["address"]), int(text["port"]), Protocol(text["protocol"]))


class Predecessor:
    """The old process's side of one hand-over. Blocking; call it from a thread.

    Args:
        sock: a connection that was accepted on `takeover.sock`.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(ANSWER_TIMEOUT)
        self._sock = sock
        self.engine = EngineKind.UNKNOWN  # of the new process

    def hello(self) -> None:
        """Hear who asks.

        Raises:
            TakeoverError: nobody that can be handed over to.
        """
        hello = _receive(self._sock)
        if hello.get("hello") != VERSION:
            self.refuse("this daemon has another hand-over protocol: stop it and start the new one")
            raise TakeoverError("a process of another version asked for the ports")
        self.engine = EngineKind.told(str(hello.get("engine", "")))

    def refuse(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            _send(self._sock, {"error": reason})

    def offer(self, engine: EngineKind, lock: Lock, listeners: Mapping[Frontend, Sequence[int]]) -> None:
        """Send all there is, and wait until the new process serves.

        Raises:
            TakeoverError: it never did; this process keeps everything.
        """
        frontends = [
            {"address": str(f.address), "port": f.port, "protocol": int(f.protocol), "descriptors": len(descriptors)}
            for f, descriptors in listeners.items()
        ]
        try:
            _send(self._sock, {"pid": os.getpid(), "engine": engine, "frontends": frontends})
            _send_descriptors(self._sock, [lock.descriptor])
            _send_descriptors(self._sock, [d for descriptors in listeners.values() for d in descriptors])
        except OSError as error:
            raise TakeoverError(f"the new process went away: {error}") from error
        self._sock.settimeout(SERVING_TIMEOUT)
        _receive(self._sock)

    def yours(self) -> None:
        """Tell that this process has let go."""
        with contextlib.suppress(OSError):
            _send(self._sock, {"yours": True})

    def close(self) -> None:
        self._sock.close()


class Host(typing.Protocol):
    """What the agent does for a hand-over."""

    @property
    def engine(self) -> EngineKind:
        """How this daemon forwards."""

    async def pause(self) -> None:
        """Change nothing from now on."""

    async def resume(self) -> None:
        """Nobody took over: go on."""

    async def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """Descriptors of the engine's listening sockets; empty for an engine without."""

    async def let_go(self, successor: EngineKind) -> None:
        """The new process, with that engine, serves: stop accepting, close what it will open."""


class HandOver:
    """The running daemon's side: listens on `takeover.sock`; one hand-over at a time."""

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
            log.info("handing over", engine=asking.engine)
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
            log.error("hand-over failed; this process keeps serving", error=str(error))
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
