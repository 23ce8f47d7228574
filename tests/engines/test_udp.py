# SPDX-License-Identifier: Apache-2.0
"""UDP flows: they stay on their backend, leave a dead one at once, end when idle, and are bounded in number."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.engines.topology import UDP, Topology
from tests.support.lab.images import UDP_PORT
from tests.support.polling import PATIENCE, wait_for
from tests.support.sockets import assert_echo, omitting

pytestmark = pytest.mark.root


@contextlib.contextmanager
def flows(topology: Topology, first: int, count: int) -> Iterator[list[socket.socket]]:
    """Sockets of the client on consecutive ports, connected to the published port."""
    with contextlib.ExitStack() as stack:
        with topology.client.entered():
            made = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]
        for number, sock in enumerate(made):
            sock.bind((topology.client.address, first + number))
            sock.connect((topology.node.address, UDP))
            sock.settimeout(PATIENCE)
        yield made


def ask(sock: socket.socket, payload: bytes = b"x") -> str:
    """Send and return the name of who answered."""
    sock.send(payload)
    name, _, answer = sock.recv(65536).partition(b" ")
    assert answer == payload
    return name.decode()


def asked_again(sock: socket.socket, timeout: float = 0.5, rounds: int = 200) -> str:
    """As a UDP client that repeats its question does it: an error or silence costs one round."""
    sock.settimeout(timeout)
    for _ in range(rounds):
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            return ask(sock)
    raise TimeoutError


@pytest.mark.parametrize("size", [0, 1, 1400, 9000, 60000])
def test_datagrams_of_all_sizes(topology: Topology, size: int) -> None:
    with flows(topology, 21000, 3) as socks:
        for sock in socks:
            ask(sock, bytes(range(256)) * (size // 256) + bytes(size % 256))


def test_datagrams_without_df_larger_than_the_link_to_the_client(topology: Topology) -> None:
    """The tasks' own links take 1,500 bytes, that of the node to the client less. Fragments, too."""
    links = topology.client, topology.node
    for end in links:
        end.ip("link", "set", "eth0", "mtu", "1400")
    try:
        with topology.client.entered(), omitting() as client:
            client.connect((topology.node.address, UDP))
            for size in (1300, 1371, 1372, 1472, 4000, 9000):
                assert_echo(client, size)
    finally:
        for end in links:
            end.ip("link", "set", "eth0", "mtu", "1500")
    if topology.engine == "kernel":
        assert topology.daemon.total("mesh_verdicts_total", verdict="fragmented") > 0


def test_flows_stay_where_they_are_while_others_come(topology: Topology) -> None:
    """A draining backend keeps its flows."""
    with flows(topology, 22000, 100) as socks:
        before = [ask(sock) for sock in socks]
        topology.change(*topology.default(weights={"b1": 0}))
        assert [ask(sock) for sock in socks] == before
    with flows(topology, 23000, 100) as socks:
        assert "b1" not in {ask(sock) for sock in socks}


def test_flows_leave_a_removed_backend_at_once(topology: Topology) -> None:
    with flows(topology, 24000, 100) as socks:
        before = [ask(sock) for sock in socks]
        topology.change(*topology.default("b1", "b2", "b3"))
        after = [asked_again(sock) for sock in socks]
    assert all(a == b for a, b in zip(after, before, strict=True) if b != "b4")
    assert "b4" not in after


@pytest.mark.only("proxy")  # the kernel engine passes a refusal on: probes find such a backend
def test_flows_leave_a_backend_that_refuses(topology: Topology) -> None:
    host = topology.hosts["b2"]
    with flows(topology, 25000, 60) as socks:
        before = [ask(sock) for sock in socks]
        host.server.send_signal(signal.SIGTERM)
        host.server.wait(PATIENCE)
        try:
            after = [asked_again(sock) for sock in socks]
        finally:
            host.server = topology.run_server("b2", host.namespace)
            wait_for(lambda: f":{UDP_PORT} " in host.namespace.run("ss", "-Hlun").stdout, "b2 back")
    assert "b2" in before
    assert "b2" not in after
    assert all(a == b for a, b in zip(after, before, strict=True) if b != "b2")


@pytest.mark.only("proxy")  # the kernel engine has no sessions: UDP flows have no end there
def test_idle_sessions_end(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=2)
    daemon = topology.serve(udp_idle_timeout=1)
    with flows(topology, 26000, 50) as socks:
        before = [ask(sock) for sock in socks]
        assert daemon.total("mesh_connections_opened_total", service="udp") == 50
        wait_for(lambda: daemon.total("mesh_connections_active", service="udp") == 0, "sessions over")
        assert [ask(sock) for sock in socks] == before, "hashing finds the same backend again"


@pytest.mark.only("proxy")  # the kernel engine has no sessions: UDP flows have no end there
def test_sessions_are_bounded(make_topology: Callable[..., Topology]) -> None:
    """The oldest make room for new ones; what was evicted is counted and goes on with its next datagram."""
    topology = make_topology(backends=2)
    daemon = topology.serve(udp_max_sessions=64)
    with flows(topology, 27000, 300) as socks:
        for _ in range(2):
            assert {ask(sock) for sock in socks} == {"b1", "b2"}
        assert daemon.total("mesh_connections_active", service="udp") <= 64
        assert daemon.total("mesh_udp_evictions_total") >= 300 - 64
