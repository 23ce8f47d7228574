# SPDX-License-Identifier: Apache-2.0
"""Keep a connection or a UDP session open while the service is closed to you: the proxy engine goes on serving it
(issue 12, item 13).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest

from mesh.datapath.counters import Failure
from mesh.model import Frontend, ServiceOptions
from tests.support.fastpath_bench import Served, TcpServer, UdpServer, call, engine, tcp, udp
from tests.support.polling import PATIENCE, wait_for

OPEN = ServiceOptions(table_size=1021)
RULES: dict[str, dict[str, Any]] = {
    "deny one": {"deny": (ip_network("127.0.0.2/32"),)},
    "allow others": {"allow": (ip_network("127.0.0.1/32"), ip_network("127.0.0.3/32"), ip_network("::1/128"))},
    "deny wide, but for IPv6": {"deny": (ip_network("127.0.0.2/31"),), "allow": (ip_network("127.0.0.1/32"),)},
    "nobody of IPv6": {"deny": (ip_network("::/0"),)},
}
ENDS = {
    "deny one": {"127.0.0.2"},
    "allow others": {"127.0.0.2"},
    "deny wide, but for IPv6": {"127.0.0.2", "127.0.0.3", "::1"},
    "nobody of IPv6": {"::1"},
}
SOURCES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "::1")


@pytest.fixture
def mesh() -> Iterator[Served]:
    with engine() as made:
        yield made


def lives(sock: socket.socket) -> bool:
    """Whether the connection still carries bytes both ways."""
    try:
        sock.sendall(b"x")
        return sock.recv(1) == b"x"
    except (ConnectionResetError, BrokenPipeError):
        return False


@pytest.mark.parametrize("rules", RULES)
def test_connections_of_clients_that_are_denied_now_end(mesh: Served, rules: str) -> None:
    server, front = TcpServer(), tcp()
    mesh.serve({front: {"a": server.where}}, OPEN)
    connections = {source: _connect(front, source) for source in SOURCES}
    assert all(lives(sock) for sock in connections.values())
    mesh.serve({front: {"a": server.where}}, ServiceOptions(table_size=1021, **RULES[rules]))
    assert {source for source, sock in connections.items() if not lives(sock)} == ENDS[rules]
    wait_for(lambda: len(server.open) == len(SOURCES) - len(ENDS[rules]), "the task's side ends too")
    assert mesh.counters(front).failed == {Failure.DENIED: len(ENDS[rules])}
    mesh.serve({front: {"a": server.where}}, OPEN)  # rules that are taken back end nothing
    assert all(lives(sock) for source, sock in connections.items() if source not in ENDS[rules])
    for sock in connections.values():
        sock.close()
    server.close()


def _connect(front: Frontend, source: str) -> socket.socket:
    if ":" in source:
        return call(front, source)
    return socket.create_connection(("127.0.0.1", front.port), timeout=PATIENCE, source_address=(source, 0))


def test_sessions_of_clients_that_are_denied_now_end(mesh: Served) -> None:
    server, front = UdpServer("a"), udp()
    mesh.serve({front: {"a": server.where}}, OPEN)
    sockets = {}
    for source in ("127.0.0.1", "127.0.0.2"):
        sock = sockets[source] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", front.port))
        sock.settimeout(PATIENCE)
        sock.send(b"x")
        assert sock.recv(10) == b"a:x"
    assert mesh.counters(front).active == 2
    mesh.serve({front: {"a": server.where}}, ServiceOptions(table_size=1021, **RULES["deny one"]))
    assert mesh.counters(front).active == 1
    sockets["127.0.0.2"].send(b"y")
    wait_for(lambda: mesh.counters(front).failed == {Failure.DENIED: 2}, "the session, and the datagram after it")
    sockets["127.0.0.1"].send(b"z")
    assert sockets["127.0.0.1"].recv(10) == b"a:z"
    for sock in sockets.values():
        sock.close()
    server.close()
