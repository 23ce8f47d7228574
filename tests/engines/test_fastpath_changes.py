# SPDX-License-Identifier: Apache-2.0
"""The proxy engine while things change or fail: backends that refuse, new tables, take-over, drain."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from mesh.config.keys import Config
from mesh.datapath.counters import Failure
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.model import Flow, Protocol, ServiceOptions
from tests.support.fastpath_bench import (
    Served,
    TcpServer,
    UdpServer,
    ask,
    call,
    engine,
    read_all,
    reset,
    tcp,
    udp,
)
from tests.support.polling import PATIENCE, wait_for
from tests.support.ports import free_port


def refusing() -> tuple[str, int]:
    return ("127.0.0.1", free_port())


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address that answers no SYN: a listener whose queue is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    for _ in range(4):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
        waiting.append(sock)
    time.sleep(0.05)
    yield listener.getsockname()
    for sock in (*waiting, listener):
        sock.close()


def test_a_backend_that_refuses_costs_no_connection() -> None:
    server, front = TcpServer(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"gone": refusing(), "gone2": refusing(), "here": server.where}})
        assert all(ask(front) for _ in range(200))
        now = mesh.quiet(front)
        gone = [mesh.of_backend(front, name) for name in ("gone", "gone2")]
        assert (now.opened, now.failed) == (200, {})
        assert now.retried == sum(c.failed[Failure.REFUSED] for c in gone) > 100
        assert all(c.opened == 0 and c.retried == c.failed[Failure.REFUSED] for c in gone)
        bad = {s.backend: s.count for s in mesh.datapath.signals() if not s.ok and s.cause is Failure.REFUSED}
        assert bad == {n: mesh.of_backend(front, n).failed[Failure.REFUSED] for n in ("gone", "gone2")}


def test_a_backend_of_hardly_any_slots_is_found_when_the_others_refuse() -> None:
    """The draws meet it once in 30 connections; the walk after them finds it every time, also for datagrams."""
    server, front = TcpServer(), tcp()
    datagrams, fronts = UdpServer("here"), udp()
    with engine() as mesh:
        members = {"gone": refusing(), "gone2": refusing()}
        mesh.serve(
            {front: {**members, "here": server.where}, fronts: {**members, "here": datagrams.where}},
            weights={"gone": 300, "gone2": 300},
        )
        assert all(ask(front) for _ in range(100))
        now = mesh.quiet(front)
        assert (now.opened, now.failed) == (100, {})
        for _ in range(5):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("127.0.0.1", fronts.port))
                sock.settimeout(0.1)
                wait_for(lambda s=sock: answer(s) == b"here:x")


def test_a_backend_that_moves_takes_what_is_being_connected_along(silent: tuple[str, int]) -> None:
    """Docker gives a running task another address, and nobody answers at the former one any more."""
    server, front = TcpServer(host="127.0.0.2", port=silent[1]), tcp()
    with engine(connect_timeout=600) as mesh:
        mesh.serve({front: {"it": silent}})
        with socket.create_connection(("127.0.0.1", front.port), PATIENCE) as sock:
            sock.sendall(b"hello")
            wait_for(lambda: mesh.datapath.stats().gauges["connections_connecting"] == 1)
            mesh.serve({front: {"it": server.where}})
            assert sock.recv(100) == b"hello"
        assert mesh.quiet(front).failed == {}


def test_a_backend_that_moves_keeps_what_its_former_address_still_answers() -> None:
    server, front = TcpServer(), tcp()
    moved = TcpServer(host="127.0.0.2", port=server.where[1])
    with engine() as mesh:
        mesh.serve({front: {"it": server.where}})
        with socket.create_connection(("127.0.0.1", front.port), PATIENCE) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
            mesh.serve({front: {"it": moved.where}})
            probes = ["ss", "-Hton", "dst", f"127.0.0.1:{server.where[1]}"]
            wait_for(lambda: "keepalive," in subprocess.run(probes, capture_output=True, text=True, check=True).stdout)
            sock.sendall(b"still there")
            assert sock.recv(100) == b"still there"
            assert ask(front)
        assert (server.accepted, moved.accepted) == (1, 1)


def test_lookup_names_the_choices_that_are_tried() -> None:
    front = tcp()
    with engine() as mesh:
        mesh.serve({front: {name: refusing() for name in "abc"}}, weights={"a": 300, "b": 300})
        for _ in range(10):
            with socket.socket() as sock, contextlib.suppress(ConnectionError):
                sock.bind(("127.0.0.1", 0))
                source = sock.getsockname()
                sock.connect(("127.0.0.1", front.port))
                sock.recv(1)
            flow = Flow(ip_address(source[0]), source[1], ip_address("127.0.0.1"), front.port, Protocol.TCP)
            choice = mesh.datapath.lookup(flow)
            assert choice is not None
            assert choice.backend is not None
            assert {b.key.backend for b in (choice.backend, *choice.next)} == {"a", "b", "c"}
        mesh.quiet(front)
        assert [mesh.of_backend(front, name).failed for name in "abc"] == [{Failure.REFUSED: 10}] * 3


def answer(sock: socket.socket) -> bytes:
    """What comes back for a datagram, b"" for nothing: one that is refused costs the sender an answer."""
    try:
        sock.send(b"x")
        return sock.recv(100)
    except OSError:
        return b""


def test_what_the_client_said_early_reaches_the_next_choice() -> None:
    server, front = TcpServer(), tcp()
    data = os.urandom(200_000)
    with engine() as mesh:
        mesh.serve({front: {"gone": refusing(), "here": server.where}})
        for _ in range(30):
            with call(front) as sock:
                threading.Thread(target=lambda s=sock: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
                assert read_all(sock) == data
        assert mesh.quiet(front).bytes_in == 30 * len(data)


def test_all_refuse() -> None:
    front = tcp()
    with engine(retries=1) as mesh:
        mesh.serve({front: {"a": refusing(), "b": refusing(), "c": refusing()}})
        assert not any(ask(front) for _ in range(20))
        now = mesh.quiet(front)
        assert now.failed == {Failure.REFUSED: 20}
        assert now.retried == 20


def test_a_backend_that_does_not_answer(silent: tuple[str, int]) -> None:
    server, front = TcpServer(), tcp()
    with engine(connect_timeout=1.0) as mesh:
        mesh.serve({front: {"silent": silent, "here": server.where}})
        while not mesh.of_backend(front, "silent").failed:
            assert ask(front)
        now = mesh.quiet(front)
        assert now.failed == {}
        assert mesh.of_backend(front, "silent").failed.get(Failure.TIMEOUT, 0) == now.retried
        mesh.serve({front: {"silent": silent}})
        assert not ask(front)
        assert mesh.quiet(front).failed == {Failure.TIMEOUT: 1}


def test_a_client_that_leaves_while_its_backend_does_not_answer(silent: tuple[str, int]) -> None:
    front = tcp()
    with engine(connect_timeout=30) as mesh:
        mesh.serve({front: {"silent": silent}})
        sock = call(front)
        wait_for(lambda: mesh.datapath.stats().gauges["connections_connecting"])
        reset(sock)
        assert mesh.quiet(front).failed == {Failure.OTHER: 1}


def test_nobody_to_choose() -> None:
    front = tcp()
    with engine() as mesh:
        mesh.serve({front: {}})
        assert not ask(front)
        assert mesh.quiet(front).failed == {Failure.NO_BACKEND: 1}


def test_new_tables_under_traffic() -> None:
    """Each connection is answered while backends come and go, and what is established stays where it is."""
    servers = {f"b{i}": TcpServer() for i in range(6)}
    front, stop = tcp(), threading.Event()
    results: list[bool] = []

    def client() -> None:
        while not stop.is_set():
            results.append(ask(front))

    with engine() as mesh:
        mesh.serve({front: {n: s.where for n, s in servers.items()}})
        old = [call(front) for _ in range(30)]
        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        for i in itertools.count():
            if i > 60 and len(results) > 200:
                break
            mesh.serve({front: {n: s.where for j, (n, s) in enumerate(servers.items()) if (j + i) % 3}})
        stop.set()
        for thread in clients:
            thread.join()
        assert all(results), mesh.counters(front)
        for sock in old:
            sock.sendall(b"still here")
            assert sock.recv(100) == b"still here"
            sock.close()
        now = mesh.quiet(front)
        assert now.opened == len(results) + 30
        assert now.failed == {}


def test_weight_zero_keeps_connections_and_gets_none() -> None:
    servers, front = {"a": TcpServer(), "b": TcpServer()}, tcp()
    backends = {n: s.where for n, s in servers.items()}
    with engine() as mesh:
        mesh.serve({front: backends})
        with call(front) as old:
            wait_for(lambda: any(s.accepted for s in servers.values()))
            name = next(n for n, s in servers.items() if s.accepted)
            mesh.serve({front: backends}, weights={name: 0})
            assert all(ask(front) for _ in range(20))
            assert servers[name].accepted == 1
            old.sendall(b"x")
            assert old.recv(1) == b"x"


def test_a_removed_frontend_refuses_at_once_and_keeps_its_connections() -> None:
    server, front, other = TcpServer(), tcp(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}, other: {"a": server.where}})
        old = call(front)
        old.sendall(b"x")
        assert old.recv(1) == b"x"
        queued = [call(front) for _ in range(20)]
        mesh.serve({other: {"a": server.where}})
        with pytest.raises(ConnectionRefusedError):
            call(front)
        for sock in (old, *queued):  # what the kernel had accepted is served
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"
            sock.close()
        mesh.quiet(front)
        mesh.serve({other: {"a": server.where}, front: {"a": server.where}})
        assert ask(front)
        assert mesh.quiet(front).opened == 22


def test_a_port_that_is_taken() -> None:
    server = TcpServer()
    with (
        socket.create_server(("::", free_port()), family=socket.AF_INET6, dualstack_ipv6=True) as taken,
        engine() as mesh,
    ):
        front, other = tcp(taken.getsockname()[1]), tcp()
        applied = mesh.serve({front: {"a": server.where}, other: {"a": server.where}})
        assert list(applied.frontends) == [other]
        assert mesh.datapath.problems() == (
            f"frontend *:{front.port}/tcp: another process listens on this port "
            '(stop it (ss -lntup names it), or set intercept = "nft")',
        )
        mesh.serve({other: {"a": server.where}})
        assert mesh.datapath.problems() == ()
        mesh.serve({front: {"a": server.where}, other: {"a": server.where}})
        assert len(mesh.datapath.problems()) == 1
        taken.close()
        applied = mesh.serve({front: {"a": server.where}, other: {"a": server.where}})
        assert set(applied.frontends) == {front, other}
        assert mesh.datapath.problems() == ()
        assert ask(front)


@pytest.mark.parametrize(("threads_before", "threads_after"), [(2, 1), (1, 3), (2, 2)])
def test_take_over_refuses_nobody(threads_before: int, threads_after: int) -> None:
    server, front, stop = TcpServer(), tcp(), threading.Event()
    results: list[bool] = []

    def client() -> None:
        while not stop.is_set():
            results.append(ask(front))

    with engine(threads=threads_before) as old:
        old.serve({front: {"a": server.where}})
        kept = call(front)
        kept.sendall(b"x")
        assert kept.recv(1) == b"x"
        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        # In life the descriptors cross a Unix socket; dup() has the same effect.
        passed = {f: [os.dup(fd) for fd in fds] for f, fds in old.datapath.listeners().items()}
        fresh = ProxyDatapath(Config(threads=threads_after, intercept="bind"), inherited=passed)
        fresh.open()
        new = Served(fresh)
        try:
            new.serve({front: {"a": server.where}})
            old.datapath.stop_accepting()
            assert old.datapath.listeners() == {}
            count = len(results)
            wait_for(lambda: len(results) > count + 100)  # what it had accepted by then is open
            already = old.counters(front).opened
            wait_for(lambda: len(results) > count + 300)
            kept.sendall(b"y")
            assert kept.recv(1) == b"y"
            kept.close()
            assert old.datapath.drain(PATIENCE) == 0
            assert old.counters(front).opened == already
            old.datapath.close(release=False)
            count = len(results)
            wait_for(lambda: len(results) > count + 100)
            stop.set()
            for thread in clients:
                thread.join()
            assert all(results)
            assert new.quiet(front).opened + already == len(results) + 1
        finally:
            stop.set()
            fresh.close(release=True)


def test_drain_serves_what_is_open() -> None:
    server, front = TcpServer(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        sock = call(front)
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        left: list[int] = []
        drainer = threading.Thread(target=lambda: left.append(mesh.datapath.drain(PATIENCE)))
        drainer.start()
        wait_for(lambda: not ask(front))
        sock.sendall(b"y")
        assert sock.recv(1) == b"y"
        sock.close()
        drainer.join()
        assert left == [0]


def test_drain_is_bounded_and_close_resets() -> None:
    server, front = TcpServer(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            assert mesh.datapath.drain(0.1) == 1
            mesh.datapath.close(release=True)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


def test_counters_of_what_is_gone_are_kept_for_a_while_and_then_released(monkeypatch: pytest.MonkeyPatch) -> None:
    server, front, other = TcpServer(), tcp(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where, "b": server.where}, other: {"a": server.where}})
        assert all(ask(front) for _ in range(20))
        mesh.quiet(front)
        opened = mesh.counters(front).opened
        mesh.serve({front: {"a": server.where}, other: {"a": server.where}})
        assert mesh.of_backend(front, "b").opened > 0
        monkeypatch.setattr("mesh.datapath.proxy.accounting.KEEP_COUNTERS", 0.0)
        mesh.serve({front: {"a": server.where}, other: {"a": server.where}})
        assert {k.backend for (f, k) in mesh.datapath.stats().backends if f == front} == {"a"}
        assert mesh.counters(front).opened == opened  # a frontend forgets nothing
        for _ in range(3):
            mesh.serve({other: {"a": server.where}})
        assert set(mesh.datapath.stats().frontends) == {other}


def test_an_unknown_owner_is_refused() -> None:
    front = tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": refusing()}}, ServiceOptions(table_size=4093))
        assert not ask(front)
