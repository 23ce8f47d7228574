# SPDX-License-Identifier: Apache-2.0
"""What the tests of the proxy engine share: real servers on loopback, and an engine that serves them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from mesh._maglev import SlotTable, backend_seed
from mesh.config.keys import Config
from mesh.datapath.base import Applied, BackendEntry, BackendKey, FrontendEntry, Plan
from mesh.datapath.counters import Counters
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.model import ANY_ADDRESS, Frontend, FrontendState, Protocol, ServiceOptions, Target
from tests.support.polling import PATIENCE, wait_for
from tests.support.ports import free_port

Handler = Callable[[socket.socket], None]
Where = tuple[str, int]


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


def reset(sock: socket.socket) -> None:
    """Close by a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


class TcpServer:
    """A thread per connection; `seen` has what handlers left, `errors` what they raised."""

    def __init__(self, handler: Handler = echo, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=host == "::")
        self.where: Where = (host, self.listener.getsockname()[1])
        self.handler = handler
        self.accepted = 0
        self.errors: list[OSError] = []
        self.open: set[socket.socket] = set()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (sock := wait_for(self._accept, "a descriptor", interval=0.01)) is not self.listener:
            self.accepted += 1
            self.open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _accept(self) -> socket.socket | None:
        """The next connection; the listener when it is closed, None when the process has no descriptor left."""
        try:
            return self.listener.accept()[0]
        except OSError as error:
            return None if error.errno == errno.EMFILE else self.listener

    def _serve(self, sock: socket.socket) -> None:
        try:
            self.handler(sock)
        except OSError as error:
            self.errors.append(error)
        self.open.discard(sock)
        sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class UdpServer:
    """Answers every datagram with its own name, a colon and the datagram."""

    def __init__(self, name: str, host: str = "127.0.0.1") -> None:
        self.name = name
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((host, 0))
        self.where: Where = (host, self.sock.getsockname()[1])
        self.sources: set[Where] = set()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                data, source = self.sock.recvfrom(65536)
            except OSError:
                return
            if not source:
                return
            self.sources.add(source[:2])
            self.sock.sendto(self.name.encode() + b":" + data, source)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Served:
    """An engine with the plans that lead from one set of frontends to the next."""

    def __init__(self, datapath: ProxyDatapath) -> None:
        self.datapath = datapath
        self.applied = Applied()
        self._ids: dict[BackendKey, int] = {}

    def serve(
        self,
        frontends: Mapping[Frontend, Mapping[str, Where]],
        options: ServiceOptions | None = None,
        weights: Mapping[str, int] | None = None,
        via: str = "",
        nodes: Sequence[str] = (),
    ) -> Applied:
        """Serve exactly these: backends by name; those without a weight have 1; with `via` all are on that node."""
        options = options or ServiceOptions(table_size=1021)
        backends: dict[BackendKey, BackendEntry] = {}
        entries: dict[Frontend, FrontendEntry] = {}
        for frontend, members in frontends.items():
            mine = []
            for name, (host, port) in sorted(members.items()):
                key = BackendKey(name, port, int(frontend.protocol))
                owner = self._ids.setdefault(key, len(self._ids) + 2)
                away = ip_address(via) if via else None
                target = Target(name, away or ip_address(host), port, (weights or {}).get(name, 1), via=away)
                backends[key] = BackendEntry(owner, key, target)
                mine.append(backends[key])
            table = SlotTable.build(
                options.table_size, [(backend_seed(b.key.backend), b.id, b.target.weight) for b in mine]
            )
            state = FrontendState(frontend, "s", "s", options, tuple(b.target for b in mine))
            entries[frontend] = FrontendEntry(state, table, tuple(b.id for b in mine))
        before = self.applied
        plan = Plan(
            generation=before.generation + 1,
            put_backends=tuple(b for k, b in backends.items() if before.backends.get(k) != b),
            put_frontends=tuple(entries.values()),
            drop_frontends=tuple(f for f in before.frontends if f not in entries),
            drop_backends=tuple(b for k, b in before.backends.items() if k not in backends),
            result=Applied(before.generation + 1, entries, backends, tuple(map(ip_address, nodes))),
        )
        self.applied = self.datapath.apply(plan)
        return self.applied

    def counters(self, frontend: Frontend) -> Counters:
        return self.datapath.stats().frontends[frontend]

    def of_backend(self, frontend: Frontend, name: str) -> Counters:
        return next(c for (f, k), c in self.datapath.stats().backends.items() if f == frontend and k.backend == name)

    def quiet(self, frontend: Frontend) -> Counters:
        """The counters once nothing is open any more; checks that they add up."""
        wait_for(lambda: not self.datapath.stats().gauges["connections"])
        now = self.counters(frontend)
        assert now.opened == now.closed
        assert now.active == 0
        mine = [c for (f, _), c in self.datapath.stats().backends.items() if f == frontend]
        assert sum(c.opened for c in mine) == now.opened
        assert sum(c.bytes_in for c in mine) == now.bytes_in
        gauges = self.datapath.stats().gauges
        assert gauges["buffers_used"] == gauges["pipes_used"] == gauges["connections_connecting"] == 0
        return now


@contextlib.contextmanager
def engine(**keys: Any) -> Iterator[Served]:
    """An open engine on two threads that binds its ports itself, closed at the end."""
    config = Config(**{"threads": 2, "intercept": "bind", "state_dir": f"/nonexistent/{os.getpid()}", **keys})
    datapath = ProxyDatapath(config)
    datapath.open()
    try:
        yield Served(datapath)
    finally:
        datapath.close(release=True)


def tcp(port: int | None = None, address: str = "::") -> Frontend:
    return Frontend(ip_address(address), port or free_port(), Protocol.TCP)


def udp(port: int | None = None, address: str = "::") -> Frontend:
    return Frontend(ip_address(address), port or free_port(socket.SOCK_DGRAM), Protocol.UDP)


def call(frontend: Frontend, host: str = "127.0.0.1", timeout: float = PATIENCE) -> socket.socket:
    """A connection of a client."""
    if frontend.address != ANY_ADDRESS:
        host = str(frontend.address)
    return socket.create_connection((host, frontend.port), timeout=timeout)


def ask(front, host: str = "127.0.0.1") -> bool:  # type: ignore[no-untyped-def]
    """Whether a new connection is answered."""
    try:
        with call(front, host) as sock:
            sock.sendall(b"x")
            return sock.recv(1) == b"x"
    except ConnectionError:
        return False
