# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's TCP: what a direct connection does, a forwarded one does too."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
import time
from ipaddress import ip_address, ip_network

import pytest

from mesh.datapath.counters import Failure
from mesh.model import Affinity, Flow, Protocol, ProxyProtocol, ServiceOptions
from tests.support.fastpath_bench import TcpServer, call, echo, engine, read_all, reset, tcp
from tests.support.polling import PATIENCE, wait_for

MEGABYTE = 1 << 20


def three(handler=echo):  # type: ignore[no-untyped-def]
    return {name: TcpServer(handler) for name in ("a", "b", "c")}


def where(servers):  # type: ignore[no-untyped-def]
    return {name: server.where for name, server in servers.items()}


def test_every_backend_answers_both_families_and_counters_are_exact() -> None:
    servers, front = three(), tcp()
    with engine() as mesh:
        mesh.serve({front: where(servers)})
        for i in range(300):
            with call(front, "::1" if i % 2 else "127.0.0.1") as sock:
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
        now = mesh.quiet(front)
        assert (now.opened, now.bytes_in, now.bytes_out, now.failed) == (300, 1500, 1500, {})
        assert sum(now.connect_seconds) == 300
        assert now.connect_seconds_sum > 0
        assert all(server.accepted > 50 for server in servers.values())
        told = {s.backend: s.count for s in mesh.datapath.signals() if s.ok}
        assert sum(told.values()) == 300
        assert not mesh.datapath.signals()


def test_the_choice_is_the_one_that_lookup_names() -> None:
    servers, front = three(), tcp()
    with engine() as mesh:
        mesh.serve({front: where(servers)})
        for host in ("127.0.0.1", "127.0.0.77", "::1"):
            for _ in range(20):
                before = {n: mesh.of_backend(front, n).opened for n in servers}
                with call(front, host) as sock:
                    source = sock.getsockname()
                    sock.sendall(b"x")
                    sock.recv(1)
                    flow = Flow(ip_address(source[0]), source[1], ip_address(host), front.port, Protocol.TCP)
                    choice = mesh.datapath.lookup(flow)
                assert choice is not None
                assert choice.backend is not None
                after = {n: mesh.of_backend(front, n).opened for n in servers}
                assert [n for n in servers if after[n] != before[n]] == [choice.backend.key.backend]
        assert mesh.datapath.lookup(Flow(ip_address("::1"), 1, ip_address("::1"), 1, Protocol.TCP)) is None


def test_affinity_keeps_a_client_on_one_backend() -> None:
    servers, front = three(), tcp()
    with engine() as mesh:
        mesh.serve({front: where(servers)}, ServiceOptions(affinity=Affinity.CLIENT_IP, table_size=1021))
        for _ in range(30):
            with call(front) as sock:
                sock.sendall(b"x")
                sock.recv(1)
        assert sorted(server.accepted for server in servers.values()) == [0, 0, 30]


def test_server_first_protocols() -> None:
    server, front = TcpServer(lambda sock: sock.sendall(b"220 ready\r\n")), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            assert read_all(sock) == b"220 ready\r\n"
        mesh.quiet(front)


def test_half_close_by_the_client() -> None:
    def answer(sock: socket.socket) -> None:
        data = read_all(sock)
        sock.sendall(hashlib.sha256(data).digest() * 10000)

    server, front = TcpServer(answer), tcp()
    data = os.urandom(3 * MEGABYTE)
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == hashlib.sha256(data).digest() * 10000
        now = mesh.quiet(front)
        assert (now.bytes_in, now.bytes_out, now.failed) == (len(data), 320000, {})


def test_half_close_by_the_backend() -> None:
    got: list[bytes] = []

    def speak_then_listen(sock: socket.socket) -> None:
        sock.sendall(b"last word")
        sock.shutdown(socket.SHUT_WR)
        got.append(read_all(sock))

    server, front = TcpServer(speak_then_listen), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            assert read_all(sock) == b"last word"
            sock.sendall(b"x" * MEGABYTE)
        wait_for(lambda: got)
        assert got == [b"x" * MEGABYTE]
        mesh.quiet(front)


def test_a_client_that_ends_before_it_speaks() -> None:
    server, front = TcpServer(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b""
        assert mesh.quiet(front).failed == {}


def test_a_reset_by_the_client_reaches_the_backend() -> None:
    server, front = TcpServer(), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        sock = call(front)
        sock.sendall(b"x")
        sock.recv(1)
        reset(sock)
        wait_for(lambda: server.errors)
        assert isinstance(server.errors[0], ConnectionResetError)
        assert mesh.quiet(front).failed == {Failure.RESET: 1}


def test_a_reset_by_the_backend_reaches_the_client() -> None:
    def refuse(sock: socket.socket) -> None:
        sock.recv(1)
        reset(sock)

    server, front = TcpServer(refuse), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sock.sendall(b"x")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert mesh.quiet(front).failed == {Failure.RESET: 1}


def test_a_reset_after_the_client_has_ended_its_side() -> None:
    held = threading.Event()

    def stall(sock: socket.socket) -> None:
        read_all(sock)
        held.wait(PATIENCE)
        sock.sendall(b"y")
        while sock.send(b"y" * 65536):
            pass

    server, front = TcpServer(stall), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        sock = call(front)
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        wait_for(lambda: server.open)
        reset(sock)
        held.set()
        wait_for(lambda: server.errors)
        assert mesh.quiet(front).failed == {Failure.RESET: 1}


def test_an_answer_that_cuts_the_request_short_arrives() -> None:
    """A server that answers and closes without reading all of the request (as HTTP servers do with 413)."""

    def cut(sock: socket.socket) -> None:
        sock.recv(10)
        sock.sendall(b"too large")

    server, front = TcpServer(cut), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        for _ in range(20):
            with call(front) as sock:
                sock.sendall(b"x" * 1000)
                got = sock.recv(100)
                assert got == b"too large"
        mesh.quiet(front)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_proxy_protocol_v2(host: str) -> None:
    got: list[bytes] = []

    def keep(sock: socket.socket) -> None:
        got.append(read_all(sock))

    server, front = TcpServer(keep), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}}, ServiceOptions(proxy_protocol=ProxyProtocol.V2, table_size=1021))
        with call(front, host) as sock:
            port = sock.getsockname()[1]
            sock.sendall(b"payload")
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        with call(front, host) as silent:  # announced although it never speaks
            silent.shutdown(socket.SHUT_WR)
            read_all(silent)
        now = mesh.quiet(front)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    body = packed + packed + struct.pack(">HH", port, front.port)
    head = b"\r\n\r\n\0\r\nQUIT\n\x21" + (b"\x21" if ":" in host else b"\x11") + struct.pack(">H", len(body))
    assert got[0] == head + body + b"payload"
    assert len(got[1]) == len(head + body)
    assert now.bytes_in == 7


def answered(front, source: str) -> bool:  # type: ignore[no-untyped-def]
    try:
        with socket.create_connection(("127.0.0.1", front.port), timeout=PATIENCE, source_address=(source, 0)) as sock:
            sock.sendall(b"x")
            return sock.recv(1) == b"x"
    except (ConnectionResetError, BrokenPipeError):
        return False


def test_who_may_call() -> None:
    server, front = TcpServer(), tcp()
    options = ServiceOptions(
        table_size=1021,
        allow=(ip_network("127.0.0.0/30"), ip_network("::1/128")),
        deny=(ip_network("127.0.0.2/32"),),
    )
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}}, options)
        for source, allowed in (("127.0.0.1", True), ("127.0.0.2", False), ("127.0.0.3", True), ("127.0.0.4", False)):
            assert answered(front, source) is allowed
        with call(front, "::1") as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        assert mesh.quiet(front).failed == {Failure.DENIED: 2}


def test_specific_addresses_beside_the_wildcard() -> None:
    everywhere, special = TcpServer(lambda s: s.sendall(b"any")), TcpServer(lambda s: s.sendall(b"one"))
    front = tcp()
    one = tcp(front.port, "127.0.0.9")
    with engine() as mesh:
        mesh.serve({front: {"a": everywhere.where}, one: {"b": special.where}})
        with call(one) as sock:
            assert read_all(sock) == b"one"
        with call(front) as sock:
            assert read_all(sock) == b"any"


def test_ipv6_backends() -> None:
    server, front = TcpServer(host="::1"), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


def test_idle_timeout_cuts_only_the_silent() -> None:
    """Whoever speaks goes on, in either direction, for longer than the silent ones last."""
    server, front = TcpServer(), tcp()
    with engine(idle_timeout=2.0) as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as silent, call(front) as busy:
            for sock in (silent, busy):
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
            silent.setblocking(False)
            cut = False
            for _ in range(30):  # 6 s
                busy.sendall(b"x")
                assert busy.recv(1) == b"x"
                try:
                    silent.recv(1)
                except BlockingIOError:
                    pass
                except ConnectionResetError:
                    cut = True
                time.sleep(0.2)
            assert cut
        assert mesh.quiet(front).failed == {Failure.TIMEOUT: 1}
