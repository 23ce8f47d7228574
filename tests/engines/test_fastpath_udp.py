# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's UDP: sessions, replies from the called address, bounds, dead backends."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from mesh.datapath.counters import Failure
from mesh.model import Affinity, Frontend, ServiceOptions
from tests.support.fastpath_bench import Served, UdpServer, engine, udp
from tests.support.polling import PATIENCE, wait_for
from tests.support.ports import free_port


@contextlib.contextmanager
def client(front: Frontend, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A connected socket: the kernel drops replies that come from another address than the called one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((host, front.port))
        sock.settimeout(PATIENCE)
        yield sock


def ask(sock: socket.socket, data: bytes = b"x") -> str:
    sock.send(data)
    name, _, rest = sock.recv(65536).partition(b":")
    assert rest == data
    return name.decode()


def test_replies_leave_from_the_address_that_was_called() -> None:
    servers, front = {n: UdpServer(n) for n in "abc"}, udp()
    with engine() as mesh:
        mesh.serve({front: {n: s.where for n, s in servers.items()}})
        for host in ("127.0.0.1", "127.0.0.5", "127.8.8.8", "::1"):
            with client(front, host) as sock:
                first = ask(sock)
                assert all(ask(sock, bytes([i])) == first for i in range(50))
        now = wait_for(lambda: (c := mesh.counters(front)).packets_out == 204 and c)  # counted once they are out
        assert (now.opened, now.packets_in, now.failed) == (4, 204, {})
        assert (now.bytes_in, now.bytes_out) == (204, 204 * 3)


def test_a_specific_address_and_ipv6_backends() -> None:
    server, front = UdpServer("six", "::1"), udp(address="127.0.0.7")
    with engine() as mesh:
        mesh.serve({front: {"six": server.where}})
        with client(front, "127.0.0.7") as sock:
            assert ask(sock) == "six"


def test_flows_spread_and_large_datagrams_pass() -> None:
    servers, front = {n: UdpServer(n) for n in "abc"}, udp()
    with engine() as mesh:
        mesh.serve({front: {n: s.where for n, s in servers.items()}})
        seen, sources = [], set()
        for _ in range(60):
            with client(front) as sock:
                seen.append(ask(sock, b"z" * 60000))
                sources.add(sock.getsockname())  # the kernel may give a closed socket's port again
        assert set(seen) == set("abc")
        assert mesh.datapath.stats().gauges["udp_sessions"] == len(sources)


def test_bursts_of_many_flows() -> None:
    server, front = UdpServer("a"), udp()
    with engine() as mesh, contextlib.ExitStack() as stack:
        mesh.serve({front: {"a": server.where}})
        socks = [stack.enter_context(client(front)) for _ in range(20)]
        for i in range(5):
            for sock in socks:
                sock.send(b"%d" % i)
        for sock in socks:
            assert sorted(sock.recv(100) for _ in range(5)) == [b"a:%d" % i for i in range(5)]
        assert mesh.counters(front).opened == 20


def test_affinity_is_by_client() -> None:
    servers, front = {n: UdpServer(n) for n in "abc"}, udp()
    with engine() as mesh:
        mesh.serve(
            {front: {n: s.where for n, s in servers.items()}},
            ServiceOptions(affinity=Affinity.CLIENT_IP, table_size=1021),
        )
        seen = set()
        for _ in range(20):
            with client(front) as sock:
                seen.add(ask(sock))
        assert len(seen) == 1


def test_silent_sessions_end() -> None:
    server, front = UdpServer("a"), udp()
    with engine(udp_idle_timeout=0.3) as mesh:
        mesh.serve({front: {"a": server.where}})
        with client(front) as sock:
            ask(sock)
            assert mesh.counters(front).opened == 1
            wait_for(lambda: mesh.counters(front).active == 0)
            ask(sock)
        wait_for(lambda: mesh.counters(front).packets_out == 2)
        assert mesh.counters(front).opened == 2


def test_the_table_is_bounded() -> None:
    server, front = UdpServer("a"), udp()
    with engine(udp_max_sessions=10, threads=1) as mesh, contextlib.ExitStack() as stack:
        mesh.serve({front: {"a": server.where}})
        socks = [stack.enter_context(client(front)) for _ in range(25)]
        for sock in socks:
            ask(sock)
        stats = mesh.datapath.stats()
        assert stats.gauges["udp_sessions"] == 10
        assert stats.totals["udp_evictions"] == 15
        ask(socks[0])  # an evicted flow begins a new session
        assert mesh.counters(front).active == 10


def refused(mesh: Served, front: Frontend) -> int:
    return mesh.of_backend(front, "gone").failed.get(Failure.REFUSED, 0)


def answered(sock: socket.socket) -> bytes:
    """What has come by now."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return sock.recv(100)
    return b""


def test_off_a_backend_that_is_not_there() -> None:
    server, front = UdpServer("here"), udp()
    gone = ("127.0.0.1", free_port(socket.SOCK_DGRAM))
    with engine() as mesh:
        mesh.serve({front: {"here": server.where, "gone": gone}})
        for _ in range(40):
            with client(front) as sock:
                before = refused(mesh, front)
                sock.send(b"x")
                # The first datagram brings the news; the second is the next choice's.
                if wait_for(lambda s=sock, n=before: answered(s) or refused(mesh, front) > n) is True:
                    sock.settimeout(PATIENCE)
                    assert ask(sock) == "here"
        gone_now = mesh.of_backend(front, "gone")
        assert gone_now.failed[Failure.REFUSED] > 0
        assert gone_now.active == 0
        bad = [s for s in mesh.datapath.signals() if not s.ok]
        assert [(s.backend, s.cause, s.count) for s in bad] == [
            ("gone", Failure.REFUSED, gone_now.failed[Failure.REFUSED])
        ]


def test_off_a_backend_that_was_dropped_or_moved() -> None:
    servers, front = {n: UdpServer(n) for n in "ab"}, udp()
    with engine() as mesh, client(front) as sock:
        mesh.serve({front: {n: s.where for n, s in servers.items()}})
        first = ask(sock)
        other = "b" if first == "a" else "a"
        mesh.serve({front: {other: servers[other].where}})
        assert ask(sock) == other
        assert mesh.of_backend(front, first).active == 0
        moved = UdpServer("moved", "127.0.0.3")
        mesh.serve({front: {other: ("127.0.0.3", moved.where[1])}})
        assert ask(sock) == "moved"
        assert mesh.counters(front).active == 1


def test_same_port_another_address_ends_sessions() -> None:
    """A backend whose address changes while its key (id, port) stays."""
    one, front = UdpServer("one", "127.0.0.1"), udp()
    two = UdpServer.__new__(UdpServer)
    with engine() as mesh, client(front) as sock:
        mesh.serve({front: {"a": one.where}})
        assert ask(sock) == "one"
        UdpServer.__init__(two, "two", "127.0.0.1")
        again = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        again.bind(("127.0.0.4", one.where[1]))
        mesh.serve({front: {"a": ("127.0.0.4", one.where[1])}})
        sock.send(b"q")
        again.settimeout(PATIENCE)
        assert again.recvfrom(10)[0] == b"q"
        again.close()


def test_a_removed_frontend_is_free_again() -> None:
    server, front = UdpServer("a"), udp()
    with engine() as mesh, client(front) as sock:
        mesh.serve({front: {"a": server.where}})
        ask(sock)
        mesh.serve({})
        assert mesh.counters(front).active == 0
        with pytest.raises(ConnectionRefusedError):
            for _ in range(3):
                sock.send(b"x")
                sock.recv(1)


def test_nobody_and_denied() -> None:
    server, front, denied = UdpServer("a"), udp(), udp()
    with engine() as mesh, client(front) as sock, client(denied) as other:
        options = ServiceOptions(table_size=1021, deny=(ip_network("127.0.0.0/8"),))
        mesh.serve({front: {}})
        sock.send(b"x")
        wait_for(lambda: mesh.counters(front).failed == {Failure.NO_BACKEND: 1})
        mesh.serve({front: {}, denied: {"a": server.where}}, options)
        other.send(b"x")
        wait_for(lambda: mesh.counters(denied).failed == {Failure.DENIED: 1})
        assert not server.sources
