# SPDX-License-Identifier: Apache-2.0
"""Listening TCP sockets that outsiders cannot exhaust: what a connection may cost is bounded before it is let in.

A connection waits until its handshake is done and it is known whose it is. Those that wait are few, for seconds at
most, and few of one address; where there is no room, new ones stay in the kernel's queue until the oldest gives way.
Those that were let in are bounded for each owner. So a flood costs neither descriptors that forwarding needs nor the
loop's time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from aiohttp import web

from mesh.netaddr import unmap

HANDSHAKE: Final = 5.0  # seconds at most until a connection is let in
YIELDS: Final = 1.0  # seconds after which a connection that waits gives way to another
BURST: Final = 32  # connections taken before the loop does anything else
BACKLOG: Final = 1024
LEAST: Final = 128  # descriptors that the relay may use, at least
MOST: Final = 8192
HTTP: Final = 64  # descriptors that the HTTP port may use
_PAUSE: Final = 0.1  # seconds without a new connection while the process has no descriptor left
_PREFIX: Final = 64  # bits of an IPv6 address that tell networks apart; a client has all of the rest

log = structlog.get_logger("mesh")


class RefusedError(Exception):
    """A connection is not let in; the text says why, in one word."""


def descriptor_pool() -> int:
    """Descriptors that the relay may use: an eighth of what the process is allowed, within bounds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MOST if hard == resource.RLIM_INFINITY else max(LEAST, min(MOST, hard // 8))


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many connections there may be at once.

    Attributes:
        waiting: that wait to be let in.
        per_address: of these, of one IPv4 address or one IPv6 network of 64 bits.
        per_owner: that were let in, of one owner.
        total: of both kinds.
    """

    waiting: int = 256
    per_address: int = 128
    per_owner: int = 8
    total: int = field(default_factory=descriptor_pool)

    @property
    def most_waiting(self) -> int:
        """`waiting`, or what leaves half of `total` to those that were let in."""
        return min(self.waiting, self.total // 2)


@dataclass(slots=True, eq=False)
class _Connection:
    origin: str
    begun: float
    task: asyncio.Task[None] | None = None
    transport: asyncio.Transport | None = None
    owner: str | None = None  # once it is let in


Ended = Callable[[], None]
MakeProtocol = Callable[[Ended], asyncio.Protocol]
Admit = Callable[[asyncio.Transport], str]


def origin_of(address: str) -> str:
    """What counts as one address: an IPv4 address, an IPv6 network of 64 bits."""
    parsed = unmap(ipaddress.ip_address(address.partition("%")[0]))
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, _PREFIX), strict=False))


class _Handler(web.RequestHandler):
    """aiohttp's protocol of one connection, which also tells when that has ended."""

    __slots__ = ("_tell",)

    def __init__(self, tell: Ended, server: web.Server, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._tell = tell

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._tell()


def http_protocol(runner: web.AppRunner, *, keepalive: float) -> MakeProtocol:
    """Connections of an aiohttp application that is set up.

    Args:
        keepalive: seconds after which a connection without a request is closed.
    """
    server = runner.server
    if server is None:
        raise RuntimeError("the application is not set up")
    return lambda tell: _Handler(tell, server, access_log=None, keepalive_timeout=keepalive)


class Listener:
    """Takes connections at a TCP port.

    Args:
        make_protocol: makes the protocol of a connection, which calls what it is given when the connection has ended.
        admit: whose a connection is, once its handshake is done; raises RefusedError to end it.
        context: TLS for the next connection; None: none.
    """

    def __init__(
        self,
        make_protocol: MakeProtocol,
        admit: Admit,
        *,
        context: Callable[[], ssl.SSLContext] | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._make_protocol = make_protocol
        self._admit = admit
        self._context = context
        self.bounds = bounds or Bounds()
        self._sockets: list[socket.socket] = []
        self._waiting: dict[_Connection, None] = {}  # the oldest first
        self._origins: Counter[str] = Counter()
        self._open: set[_Connection] = set()
        self._owners: Counter[str] = Counter()
        self._paused: asyncio.TimerHandle | None = None
        self.refused: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Connections that wait to be let in."""
        return len(self._waiting)

    @property
    def open(self) -> int:
        """Connections that were let in."""
        return len(self._open)

    def start(self, host: str, port: int, *, shared: bool = False) -> int:
        """Listen. Returns the port.

        Args:
            host: an address or a name; empty: all addresses of both versions.
            port: 0: one that is free.
            shared: beside other processes that listen there too.

        Raises:
            OSError: the address is taken, or not this host's.
        """
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in sorted(found, key=lambda each: each[0]):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:  # a host without this version of IP
                continue
            self._sockets.append(sock)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address[0], port, *address[2:]))
                port = int(sock.getsockname()[1])
                sock.listen(BACKLOG)
            except OSError:
                self.stop()
                raise
        if not self._sockets:
            raise OSError(f"{host or 'any address'}: no such address here")
        self._resume()
        return port

    def stop(self) -> None:
        """Listen no more; what was let in stays."""
        self._pause(None)
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        for connection in list(self._waiting):
            if connection.task is not None:
                connection.task.cancel()

    def end(self, which: Callable[[str], bool]) -> int:
        """End the connections whose owner is one of `which`, at once. Returns how many."""
        found = [each for each in self._open if each.owner is not None and which(each.owner)]
        for connection in found:
            if connection.transport is not None:
                connection.transport.abort()
        return len(found)

    # ---- taking connections ----

    def _pause(self, seconds: float | None) -> None:
        """Take none for a while; None: until it is started again."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock.fileno())
        if self._paused is not None:
            self._paused.cancel()
        self._paused = loop.call_later(seconds, self._resume) if seconds is not None else None

    def _resume(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.add_reader(sock.fileno(), self._take, sock)

    def _room(self) -> bool:
        """Whether one more may wait; that which has waited for longest gives way, once it has waited for long."""
        if len(self._waiting) < self.bounds.most_waiting:
            return True
        oldest = next(iter(self._waiting))
        left = oldest.begun + YIELDS - time.monotonic()
        if left > 0:
            self._pause(left)
            return False
        self._give_way(oldest, "waiting")
        return True

    def _room_of(self, origin: str) -> bool:
        """The same for those of one address; there is no queue to leave it in."""
        if self._origins[origin] < self.bounds.per_address:
            return True
        oldest = next(each for each in self._waiting if each.origin == origin)
        if time.monotonic() - oldest.begun < YIELDS:
            return False
        self._give_way(oldest, "address")
        return True

    def _give_way(self, connection: _Connection, reason: str) -> None:
        self.refused[reason] += 1
        self._waits_no_more(connection)
        if connection.task is not None:
            connection.task.cancel()

    def _take(self, listening: socket.socket) -> None:
        for _ in range(BURST):
            if not self._room():
                return
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor or no memory: clients wait in the kernel's queue
                self.refused["descriptors"] += 1
                self._pause(_PAUSE)
                return
            origin = origin_of(address[0])
            if len(self._waiting) + len(self._open) >= self.bounds.total:
                self._refuse(sock, "total")
            elif not self._room_of(origin):
                self._refuse(sock, "address")
            else:
                self._begin(sock, origin)

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        self.refused[reason] += 1
        sock.close()

    def _begin(self, sock: socket.socket, origin: str) -> None:
        sock.setblocking(False)
        connection = _Connection(origin, time.monotonic())
        self._waiting[connection] = None
        self._origins[origin] += 1
        connection.task = asyncio.create_task(self._let_in(connection, sock))

    async def _let_in(self, connection: _Connection, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            context = self._context() if self._context is not None else None
            timeout = HANDSHAKE if context is not None else None
            transport, _ = await loop.connect_accepted_socket(
                lambda: self._make_protocol(lambda: self._ended(connection)),
                sock,
                ssl=context,
                ssl_handshake_timeout=timeout,
            )
            connection.transport = transport
            self._open_one(connection, self._admit(transport))
        except RefusedError as error:
            self.refused[str(error)] += 1
            if connection.transport is not None:
                connection.transport.abort()
        except OSError:  # no handshake, or none in time
            self.refused["handshake"] += 1
            sock.close()
        except asyncio.CancelledError:
            sock.close()
            raise
        except Exception:
            log.exception("internal error; a connection is refused")
            sock.close()
        finally:
            self._waits_no_more(connection)

    def _open_one(self, connection: _Connection, owner: str) -> None:
        if connection.transport is None or connection.transport.is_closing():
            return
        if self._owners[owner] >= self.bounds.per_owner:
            raise RefusedError("owner")
        connection.owner = owner
        self._owners[owner] += 1
        self._open.add(connection)

    def _waits_no_more(self, connection: _Connection) -> None:
        if connection not in self._waiting:
            return
        del self._waiting[connection]
        self._origins[connection.origin] -= 1
        if not self._origins[connection.origin]:
            del self._origins[connection.origin]
        if self._paused is not None and len(self._waiting) < self.bounds.most_waiting:
            self._resume()

    def _ended(self, connection: _Connection) -> None:
        if connection in self._open:
            self._open.discard(connection)
            owner = connection.owner or ""
            self._owners[owner] -= 1
            if not self._owners[owner]:
                del self._owners[owner]
