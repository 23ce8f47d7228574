# SPDX-License-Identifier: Apache-2.0
"""Clients that tasks could not tell apart, or would take for neighbours: all are served (picture: kernel_plane.py)."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, Connection, Plane, datagram
from tests.engines.tunnel_pair import UDP as PAIR_UDP
from tests.engines.tunnel_pair import Pair
from tests.support.lab.nat import Router
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

UDP = 8001
MORE = ("192.0.2.101", "192.0.2.102")
KEPT = 600


@pytest.fixture(scope="module")
def shared() -> Iterator[Plane]:
    """The node has three addresses."""
    with Lab() as lab:
        plane = Plane(lab)
        for address in MORE:
            plane.node.add_address("eth0", f"{address}/24")
        yield plane


def services(plane: Plane, *names: str) -> list[dict[str, object]]:
    backends = {name: [plane.namespaces[name].address, TARGET, 1] for name in names}
    udp = {"name": "udp", "published": UDP, "protocol": "udp", "backends": backends}
    return [plane.web(*names), udp]


@pytest.fixture
def engine(shared: Plane) -> Iterator[Driver]:
    driver = shared.driver()
    driver.open()
    driver.serve(services=services(shared, "b1"))
    yield driver
    if driver.process.poll() is None:
        driver.close(release=False)  # the next one restores what it finds
        driver.end()


def bound(namespace: Namespace, source: str, port: int, address: str, *, called: int = PORT) -> Connection:
    """A connection from this address and port."""
    connection = Connection.__new__(Connection)
    with namespace.entered():
        sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((source, port))
    sock.connect((address, called))
    connection.socket = sock
    text = b""
    while not text.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, "closed before it said who it is"
        text += byte
    connection.backend, connection.seen = text.decode().split()
    return connection


def seen(plane: Plane, driver: Driver) -> dict[str, list[str]]:
    """The networks of tasks, which are looked at when the node's own network changes."""
    for step in ("add", "del"):
        plane.node.ip("addr", step, "192.0.2.103/32", "dev", "lo")
    found: dict[str, list[str]] = driver.networks()
    return found


def verdicts(driver: Driver) -> dict[str, int]:
    found: dict[str, int] = driver.stats()["verdicts"]
    return found


def test_one_port_to_all_addresses_of_the_node(shared: Plane, engine: Driver) -> None:
    """One task: the second and the third connection get a port of their own, and outlive the agent."""
    client = shared.client
    with contextlib.ExitStack() as stack:
        connections = []
        for address in (shared.node.address, *MORE):
            connections.append(bound(client, client.address, 40000, address))
            stack.callback(connections[-1].close)
        assert [(each.backend, each.seen) for each in connections] == [("b1", client.address)] * 3
        for each in connections:
            each.echo(200_000)
        assert verdicts(engine)["translated"] > 0
        assert verdicts(engine)["collision"] == 0
        engine.kill()
        for each in connections:
            each.echo()
        second = shared.driver()
        second.open()
        second.serve(services=services(shared, "b1"))
        connections[0].close()
        for each in connections[1:]:
            each.echo(200_000)
        second.close(release=False)
        second.end()


def test_one_port_to_all_addresses_by_datagrams(shared: Plane, engine: Driver) -> None:
    client = shared.client
    with contextlib.ExitStack() as stack:
        sockets = []
        for address in (shared.node.address, *MORE):
            with client.entered():
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((client.address, 41000))
            sock.connect((address, UDP))
            sockets.append(sock)
        for _ in range(3):
            for sock in sockets:
                sock.send(b"hello")
                assert sock.recv(100).decode() == f"b1 {client.address}"
    assert verdicts(engine)["collision"] == 0
    assert verdicts(engine)["translated"] >= 6


def test_many_kept_connections_from_few_ports(shared: Plane, engine: Driver) -> None:
    """A load balancer in front of all nodes: 0 refused."""
    engine.serve(services=services(shared, "b1", "b2", "b3"))
    client, nodes = shared.client, (shared.node.address, *MORE)
    known = client.run("sysctl", "-n", "net.ipv4.ip_local_port_range").stdout.split()
    client.run("sysctl", "-qw", f"net.ipv4.ip_local_port_range=40000 {40000 + KEPT // 2}")
    try:
        with contextlib.ExitStack() as stack:
            held = []
            for number in range(KEPT):
                held.append(Connection(client, nodes[number % 3]))
                stack.callback(held[-1].close)
            assert Counter(each.seen for each in held) == {client.address: KEPT}
            for each in held:
                each.echo(10)
            assert verdicts(engine)["translated"] > KEPT // 20
            assert verdicts(engine)["collision"] == 0
    finally:
        client.run("sysctl", "-qw", f"net.ipv4.ip_local_port_range={known[0]} {known[1]}")


def test_clients_behind_a_router_with_few_ports(shared: Plane, engine: Driver) -> None:
    """Their router gives each called address the same few source ports."""
    router = Router(shared.lab, "router", 'ip protocol tcp oifname "eth0" masquerade to :40000-40049')
    inner = [router.client(name) for name in ("inner1", "inner2")]
    with contextlib.ExitStack() as stack:
        held = []
        for number in range(120):
            address = (shared.node.address, *MORE)[number % 3]
            held.append(Connection(inner[number % 2], address))
            stack.callback(held[-1].close)
        assert Counter(each.seen for each in held) == {router.address: 120}
        for each in held:
            each.echo(10)
    assert verdicts(engine)["collision"] == 0
    assert verdicts(engine)["translated"] > 60


def test_clients_whose_network_the_task_has_itself(shared: Plane, engine: Driver) -> None:
    """It sees the node instead; it gets and loses networks while it serves."""
    client, task, gateway = shared.client, shared.namespaces["b1"], "172.31.0.1"
    overlay, bridged, other = "10.0.1.77", "172.31.0.200", "10.0.2.77"
    for address in (overlay, bridged, other):
        client.ip("addr", "add", f"{address}/32", "dev", "eth0")
        shared.node.ip("route", "add", f"{address}/32", "via", client.address)
    kept = bound(client, overlay, 0, shared.node.address)
    assert kept.seen == overlay
    task.ip("link", "add", "ov0", "type", "bridge")
    task.ip("addr", "add", "10.0.1.5/24", "dev", "ov0")
    task.ip("link", "set", "ov0", "up")
    try:
        wait_for(lambda: seen(shared, engine) == {"b1": ["10.0.1.0/24", "172.31.0.0/24"]}, "networks of the task seen")
        with contextlib.ExitStack() as stack:
            for address, shown in ((overlay, gateway), (bridged, gateway), (other, other)):
                connection = bound(client, address, 40000, shared.node.address)
                stack.callback(connection.close)
                assert (connection.backend, connection.seen) == ("b1", shown)
                connection.echo(200_000)
            with client.entered():
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.settimeout(PATIENCE)
            sock.bind((overlay, 0))
            sock.sendto(b"hello", (shared.node.address, UDP))
            assert sock.recv(100).decode() == f"b1 {gateway}"
            _, said = engine.explain(source=overlay, port=40001, destination=shared.node.address, to=PORT)
            assert said["verdict"] == "translated"
    finally:
        task.ip("link", "del", "ov0")
    wait_for(lambda: seen(shared, engine) == {"b1": ["172.31.0.0/24"]}, "networks of the task seen")
    kept.echo()
    kept.close()
    again = bound(client, overlay, 0, shared.node.address)
    assert again.seen == overlay
    again.close()


def test_a_client_that_is_a_neighbour_of_a_task_that_has_just_come(shared: Plane, engine: Driver) -> None:
    """Nobody has spoken with the task before: what networks it has is known before its first flow."""
    client, gateway, overlay = shared.client, "172.31.0.1", "10.0.1.78"
    client.ip("addr", "add", f"{overlay}/32", "dev", "eth0")
    shared.node.ip("route", "add", f"{overlay}/32", "via", client.address)
    shared.add("b9", 9)
    task = shared.namespaces["b9"]
    task.ip("link", "add", "ov0", "type", "bridge")
    task.ip("addr", "add", "10.0.1.6/24", "dev", "ov0")
    task.ip("link", "set", "ov0", "up")
    with client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE / 10)
        sock.bind((overlay, 40000))
        sock.connect((shared.node.address, UDP))
        engine.serve(services=services(shared, "b9"))
        for _ in range(3):
            sock.send(b"hello")
            assert sock.recv(100).decode() == f"b9 {gateway}"
    connection = bound(client, overlay, 40001, shared.node.address)
    assert (connection.backend, connection.seen) == ("b9", gateway)
    connection.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Lab() as lab:
        yield (pair := Pair(lab))
        pair.close()


@pytest.mark.parametrize("back", ["tunnel", "direct"])
def test_calls_of_both_nodes_for_a_task_of_one(pair: Pair, back: str) -> None:
    """The node of the task sees the collision, whichever nodes the client has called."""
    pair.ensure(back)
    pair.serve("there")
    pair.wait_ways(1500)
    with contextlib.ExitStack() as stack:
        held = []
        for node in (pair.a, pair.b):
            held.append(bound(pair.client, pair.client.address, 42000 + len(back), node.address))
            stack.callback(held[-1].close)
        assert [(each.backend, each.seen) for each in held] == [("there", pair.client.address)] * 2
        for each in held:
            each.echo(200_000)
        for node in (pair.a, pair.b):
            assert datagram(pair.client, node.address, PAIR_UDP) == f"there {pair.client.address}"
