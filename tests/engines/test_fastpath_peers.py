# SPDX-License-Identifier: Apache-2.0
"""The proxy engine between nodes: two engines on loopback, one hands over to the other."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.config.keys import Config
from mesh.datapath.base import BackendKey
from mesh.datapath.paths.peer_probe import PathMtu, ask_stream, path_mtu
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.datapath.proxy.peers import tag_of
from mesh.model import Frontend, Protocol, ProxyProtocol, ServiceOptions
from tests.support.fastpath_bench import (
    Served,
    TcpServer,
    UdpServer,
    Where,
    call,
    echo,
    engine,
    free_port,
    read_all,
    tcp,
    udp,
)
from tests.support.polling import PATIENCE, wait_for

HERE, THERE = "127.0.0.1", "127.0.0.2"


@dataclass
class Pair:
    """`front` calls `ingress`, which reaches the backends only through `owner`."""

    ingress: Served
    owner: Served
    front: Frontend
    port: int

    def serve(
        self,
        known: Mapping[str, Where],
        there: Mapping[str, Where] | None = None,
        options: ServiceOptions | None = None,
        nodes: tuple[str, ...] = (HERE, THERE),
    ) -> None:
        """The ingress knows of `known`; on the owner's node are `there`, by default the same."""
        self.owner.serve({tcp(): known if there is None else there}, options, nodes=nodes)
        self.ingress.serve({self.front: known}, options, via=THERE)

    def total(self, name: str) -> int:
        return self.owner.datapath.stats().totals[name]


@contextlib.contextmanager
def pair(**keys: object) -> Iterator[Pair]:
    port = free_port()
    with engine(peer_port=port, **keys) as ingress, engine(peer_port=port, **keys) as owner:
        yield Pair(ingress, owner, tcp(), port)


def header(tag: bytes, flags: int = 0, source: bytes = b"\x0a\0\0\x01") -> bytes:
    value = tag + bytes([flags])
    body = source + b"\x0a\0\0\x02" + struct.pack(">HH", 1234, 80) + b"\x04\0\x01x" + b"\xe0\0\x0b" + value
    return b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11" + struct.pack(">H", len(body)) + body


def test_connections_reach_backends_of_the_other_node() -> None:
    servers = {name: TcpServer() for name in "abc"}
    with pair() as nodes:
        nodes.serve({name: server.where for name, server in servers.items()})
        for i in range(100):
            with call(nodes.front, "::1" if i % 2 else "127.0.0.1") as sock:
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
        now = nodes.ingress.quiet(nodes.front)
        assert (now.opened, now.bytes_in, now.bytes_out, now.retried, now.failed) == (100, 500, 500, 0, {})
        assert [s.accepted for s in servers.values()] == [
            nodes.ingress.of_backend(nodes.front, name).opened for name in servers
        ]
        wait_for(lambda: nodes.owner.datapath.stats().gauges["connections"] == 0)
        assert (nodes.total("peer_connections"), nodes.total("peer_opened")) == (100, 100)
        assert nodes.total("peer_received_bytes") == 500


def test_an_agent_that_leaves_answers_no_trial_and_serves_on() -> None:
    server = TcpServer()
    with pair() as nodes:
        nodes.serve({"a": server.where})
        there = ipaddress.ip_address(THERE)
        assert asyncio.run(ask_stream(there, nodes.port)) == "" and path_mtu(there, nodes.port, 1500).mtu
        nodes.owner.datapath.leave(release=True)
        assert asyncio.run(ask_stream(there, nodes.port)) == "cut off"
        assert path_mtu(there, nodes.port, 1500).obstacle == "no answer"
        with call(nodes.front) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"


def test_streams_are_whole_and_halves_close_alone() -> None:
    data = os.urandom(1 << 20) * 16

    def digest_back(sock: socket.socket) -> None:
        got = read_all(sock)
        sock.sendall(hashlib.sha256(got).digest() + got)

    server = TcpServer(digest_back)
    with pair() as nodes:
        nodes.serve({"a": server.where})
        with call(nodes.front) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            back = read_all(sock)
        assert back[:32] == hashlib.sha256(data).digest()
        assert back[32:] == data
        nodes.ingress.quiet(nodes.front)


def test_the_backend_hears_of_the_client_and_not_of_the_node() -> None:
    heard: list[bytes] = []

    def listen(sock: socket.socket) -> None:
        said = b""
        while not said.endswith(b"hello"):
            said += sock.recv(1000)
        heard.append(said)
        sock.sendall(b"ok")

    server = TcpServer(listen)
    with pair() as nodes:
        options = ServiceOptions(table_size=1021, proxy_protocol=ProxyProtocol.V2)
        nodes.serve({"a": server.where}, options=options)
        with call(nodes.front, "127.0.0.7") as sock:
            source = sock.getsockname()
            sock.sendall(b"hello")
            assert sock.recv(10) == b"ok"
    expected = b"\x21\x11\0\x0c" + socket.inet_aton(source[0]) + socket.inet_aton("127.0.0.7")
    assert heard == [b"\r\n\r\n\0\r\nQUIT\n" + expected + struct.pack(">HH", source[1], nodes.front.port) + b"hello"]


def _gone(server: TcpServer) -> dict[str, Where]:
    return {}


def _dead(server: TcpServer) -> dict[str, Where]:
    return {"ghost": (HERE, server.where[1])}


@pytest.mark.parametrize("ghost", [_gone, _dead])
def test_what_the_other_node_cannot_reach_is_tried_elsewhere(ghost: Callable[[TcpServer], dict[str, Where]]) -> None:
    """The client's first bytes are not lost with the first choice."""
    live, dead = TcpServer(), TcpServer()
    dead.close()
    with pair() as nodes:
        nodes.serve({"a": live.where, "ghost": dead.where}, {"a": live.where, **ghost(dead)})
        for _ in range(40):
            with call(nodes.front) as sock:
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
        now = nodes.ingress.quiet(nodes.front)
        assert now.opened == 40
        assert now.failed == {}
        assert now.retried > 0
        assert nodes.total("peer_unknown") == (now.retried if ghost is _gone else 0)


def test_a_node_without_an_agent_is_a_failed_choice() -> None:
    with engine(peer_port=free_port()) as ingress:
        front = tcp()
        ingress.serve({front: {"a": (HERE, 9)}}, via=THERE)
        with contextlib.suppress(ConnectionResetError), call(front) as sock:
            assert sock.recv(10) == b""
        assert sum(ingress.counters(front).failed.values()) == 1


def test_only_nodes_may_hand_over() -> None:
    server = TcpServer()
    with pair() as nodes:
        nodes.serve({"a": server.where}, nodes=(THERE, "127.0.0.3"))
        tag = tag_of(BackendKey("a", server.where[1], 6))
        with contextlib.suppress(ConnectionError), socket.create_connection((HERE, nodes.port), PATIENCE) as sock:
            sock.sendall(header(tag))
            assert sock.recv(10) == b""
        wait_for(lambda: nodes.total("peer_foreign") == 1)
        with socket.create_connection((HERE, nodes.port), PATIENCE, source_address=(THERE, 0)) as sock:
            whole = header(tag)
            for i in range(len(whole)):
                sock.sendall(whole[i : i + 1])
            assert sock.recv(1) == b"\x06"
            sock.sendall(b"hello")
            assert sock.recv(10) == b"hello"


def test_what_is_no_header_is_cut_off() -> None:
    server = TcpServer()
    with pair(connect_timeout=0.3) as nodes:
        nodes.serve({"a": server.where})
        good = header(tag_of(BackendKey("a", server.where[1], 6)))
        no_tag = good.replace(b"\xe0", b"\xe1")
        too_long = good[:14] + b"\xff\xff" + good[16:]
        short_tag = good.replace(b"\xe0\0\x0b", b"\xe0\0\x40")
        wrong = (
            b"GET / HTTP/1.1\r\n\r\n",
            no_tag,
            too_long,
            short_tag,
            good[:13] + b"\x31" + good[14:],
            good[:20],
            b"",
        )
        for data in wrong:
            with contextlib.suppress(ConnectionError), socket.create_connection((HERE, nodes.port), PATIENCE) as sock:
                sock.sendall(data)
                assert sock.recv(10) == b""
        wait_for(lambda: nodes.total("peer_malformed") == len(wrong))
        assert server.accepted == 0
        wait_for(lambda: nodes.owner.datapath.stats().gauges["connections"] == 0)


def test_echo_is_exact_for_many_at_once() -> None:
    server = TcpServer(echo)
    with pair() as nodes, contextlib.ExitStack() as stack:
        nodes.serve({"a": server.where})
        socks = [stack.enter_context(call(nodes.front)) for _ in range(100)]
        for i, sock in enumerate(socks):
            sock.sendall(struct.pack(">Q", i) * 100)
        for i, sock in enumerate(socks):
            want, got = struct.pack(">Q", i) * 100, b""
            while len(got) < len(want):
                got += sock.recv(4096)
            assert got == want


def asked(nodes: Pair, data: bytes, sock: socket.socket) -> bytes:
    """What is answered to a datagram."""
    sock.sendto(data, ("127.0.0.1", nodes.front.port))
    return sock.recvfrom(65536)[0]


@pytest.fixture
def datagrams() -> Iterator[Pair]:
    port = free_port()
    with engine(peer_port=port) as ingress, engine(peer_port=port) as owner:
        yield Pair(ingress, owner, udp(), port)


def test_datagrams_reach_backends_of_the_other_node(datagrams: Pair) -> None:
    servers = {name: UdpServer(name) for name in "ab"}
    datagrams.owner.serve({udp(): {n: s.where for n, s in servers.items()}}, nodes=(HERE, THERE))
    datagrams.ingress.serve({datagrams.front: {n: s.where for n, s in servers.items()}}, via=THERE)
    answered = []
    with contextlib.ExitStack() as stack:  # all open to the end: a port that is used again is the same session
        for i in range(30):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.settimeout(PATIENCE)
            first = asked(datagrams, b"x%d" % i, sock)
            answered.append(first[:1])
            assert first[1:] == b":x%d" % i
            for size in (0, 1, 1400, 9000, 60000):
                assert asked(datagrams, b"y" * size, sock) == first[:1] + b":" + b"y" * size
    assert set(answered) == {b"a", b"b"}
    wait_for(lambda: datagrams.ingress.counters(datagrams.front).packets_out == 180)
    now = datagrams.ingress.counters(datagrams.front)
    assert now.packets_in == 180
    assert now.bytes_in == now.bytes_out - 2 * 180
    for name, server in servers.items():
        assert len(server.sources) == answered.count(name.encode())


def test_datagrams_for_what_is_not_there_are_counted(datagrams: Pair) -> None:
    server = UdpServer("a")
    datagrams.owner.serve({udp(): {"a": server.where}}, nodes=(THERE, "127.0.0.3"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
        foreign.bind((HERE, 0))
        foreign.sendto(b"MUD1" + tag_of(BackendKey("a", server.where[1], 17)) + bytes(38), (HERE, datagrams.port))
        wait_for(lambda: datagrams.total("peer_foreign") == 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as node:
        node.bind((THERE, 0))
        node.settimeout(PATIENCE)
        for data in (b"", b"MUD1", b"x" * 100):
            node.sendto(data, (HERE, datagrams.port))
        wait_for(lambda: datagrams.total("peer_malformed") == 3)
        node.sendto(b"MUD1" + tag_of(BackendKey("b", 9, 17)) + bytes(38) + b"lost", (HERE, datagrams.port))
        wait_for(lambda: datagrams.total("peer_unknown") == 1)
        node.sendto(
            b"MUD1" + tag_of(BackendKey("a", server.where[1], 17)) + bytes(38) + b"hello", (HERE, datagrams.port)
        )
        assert node.recv(100) == b"a:hello"  # the same port, but now for a backend that is here


def test_who_only_asks_whether_somebody_is_there_is_answered(datagrams: Pair) -> None:
    """By TCP and UDP, uncounted; an answer that comes back as a question, and a stranger, get nothing."""
    datagrams.owner.serve({udp(): {}}, nodes=(HERE, "127.0.0.3"))
    here = ipaddress.ip_address(HERE)
    wait_for(lambda: asyncio.run(ask_stream(here, datagrams.port)) == "")
    wait_for(lambda: path_mtu(here, datagrams.port, 9000) == PathMtu(9000, 9000))
    assert path_mtu(here, free_port(), 9000) == PathMtu(0, 9000, refused=True)
    assert asyncio.run(ask_stream(here, free_port())) == "nobody listens"
    totals = datagrams.owner.datapath.stats().totals
    assert {name: totals[name] for name in totals if name.startswith("peer_")} == {
        name: 0 for name in totals if name.startswith("peer_")
    }
    assert totals["udp_dropped"] == 0
    question = b"MUD1" + bytes(48)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HERE, 0))
        sock.settimeout(PATIENCE)
        sock.sendto(question + b"more", (HERE, datagrams.port))
        answer = sock.recv(1000)
        assert len(answer) == 52 and answer != question
        sock.sendto(answer, (HERE, datagrams.port))
        wait_for(lambda: datagrams.total("peer_unknown") == 1)
    datagrams.owner.serve({udp(): {}}, nodes=(THERE, "127.0.0.3"))
    wait_for(lambda: asyncio.run(ask_stream(here, datagrams.port)) == "cut off")
    assert path_mtu(here, datagrams.port, 9000).mtu == 0


@pytest.mark.parametrize("threads_after", [1, 3])
def test_a_take_over_refuses_no_other_node(threads_after: int) -> None:
    """The node of the backends changes its process while another node hands connections over to it."""
    server, stop = TcpServer(), threading.Event()
    results: list[bytes] = []

    def client() -> None:
        while not stop.is_set():
            try:
                with call(nodes.front) as sock:
                    sock.sendall(b"x")
                    results.append(sock.recv(1))
            except OSError as error:
                results.append(repr(error).encode())

    with pair(retries=0) as nodes:
        nodes.serve({"a": server.where})
        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        try:
            for _ in range(5):
                old, count = nodes.owner.datapath, len(results)
                # In life the descriptors cross a Unix socket; dup() has the same effect.
                passed = {f: [os.dup(fd) for fd in fds] for f, fds in old.listeners().items()}
                config = Config(threads=threads_after, intercept="bind", peer_port=nodes.port)
                nodes.owner = Served(ProxyDatapath(config, inherited=passed))
                nodes.owner.datapath.open()
                nodes.owner.serve({tcp(): {"a": server.where}}, nodes=(HERE, THERE))
                queues = open_sockets(old.listeners(), nodes.port)
                assert queues
                assert queues <= open_sockets(nodes.owner.datapath.listeners(), nodes.port)
                old.stop_accepting()
                assert old.drain(PATIENCE) == 0
                old.close(release=False)
                wait_for(lambda count=count: len(results) > count + 200)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in clients:
                thread.join()
            nodes.owner.datapath.close(release=True)
        assert set(results) == {b"x"}


def open_sockets(descriptors: Mapping[Frontend, Sequence[int]], port: int) -> Counter[str]:
    """How often this process has each of the sockets of a port open."""
    links = {
        str(Path(f"/proc/self/fd/{fd}").readlink()) for f, fds in descriptors.items() for fd in fds if f.port == port
    }
    every: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            every[str(entry.readlink())] += 1
    return Counter({link: every[link] for link in links})


def test_sockets_of_the_peer_port_that_nobody_needs_are_closed() -> None:
    with pair() as nodes:
        nodes.serve({"a": TcpServer().where})
        held = nodes.owner.datapath.listeners()
        assert {f.protocol for f in held if f.port == nodes.port} == set(Protocol)
        before = open_sockets(held, nodes.port)
        passed = {f: [os.dup(fd) for fd in fds] for f, fds in held.items() if f.port == nodes.port}
        assert open_sockets(held, nodes.port) == before + before
        fresh = ProxyDatapath(Config(threads=1, intercept="bind", peer_port=nodes.port), inherited=passed)
        fresh.open()
        try:
            Served(fresh).serve({tcp(): {}}, nodes=(HERE,))
            assert all(f.port != nodes.port for f in fresh.listeners())
            assert open_sockets(held, nodes.port) == before
        finally:
            fresh.close(release=True)
