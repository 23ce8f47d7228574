# SPDX-License-Identifier: Apache-2.0
"""UDP datagrams in fragments that come in any order are served as those that come whole."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import pytest

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import Plane
from tests.engines.topology import UDP as TOPOLOGY_UDP
from tests.engines.topology import Topology
from tests.engines.tunnel_pair import Pair
from tests.support.fragments import ORDERS, PIECE, Order, caller, cut, echoing, in_order, put, queued, shuffled
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import wait_for

pytestmark = pytest.mark.root

COUNT = 400
UDP, TARGET = 8001, 9053
ORDER = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
ADDRESSES = {4: "172.31.0.11", 6: "2001:db8:1::11"}


@ORDER
def test_each_engine_serves_every_order(topology: Topology, order: Order) -> None:
    client = topology.client
    with caller(client, client.address, (topology.node.address, TOPOLOGY_UDP)) as sender:
        for number in range(COUNT):
            data = os.urandom(3000 + number)
            sender.send(data, order)
            _, _, answer = sender.sock.recv(65536).partition(b" ")
            assert answer == data
    assert queued(topology.node) == {"4": 0, "6": 0}


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Plane, Driver]]:
    """A node whose one task has addresses of both versions; what netfilter tracks, the kernel puts together itself."""
    with Lab() as lab:
        plane = Plane(lab, 1)
        task = plane.namespaces["b1"]
        plane.node.add_address("docker_gwbridge", "2001:db8:1::1/64")
        task.add_address("eth0", f"{ADDRESSES[6]}/64")
        task.ip("-6", "route", "add", "default", "via", "2001:db8:1::1")
        plane.node.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        plane.node.run("nft", "add table inet t; add chain inet t c { type filter hook prerouting priority 0; }")
        plane.node.run("nft", "add rule inet t c ct state invalid counter")
        driver = plane.driver()
        driver.open()
        driver.serve(services=services(4))
        yield plane, driver
        if driver.process.poll() is None:
            driver.close(release=True)
            driver.end()


def services(version: int, **options: object) -> list[dict[str, object]]:
    backends = {"b1": [ADDRESSES[version], TARGET, 1]}
    return [{"name": "udp", "published": UDP, "protocol": "udp", "backends": backends, "options": options}]


def address(namespace: Namespace, version: int) -> str:
    return namespace.address if version == 4 else namespace.address6


def verdicts(driver: Driver) -> dict[str, int]:
    return {name: count for name, count in driver.stats()["verdicts"].items() if count}


@pytest.mark.bpf
@ORDER
@pytest.mark.parametrize("version", [4, 6])
def test_questions_and_answers_in_any_order(shared: tuple[Plane, Driver], version: int, order: Order) -> None:
    """The task sees the client; nothing is left in the queues of the node's own kernel, nor in the task's."""
    plane, driver = shared
    driver.serve(services=services(version))
    client, task = address(plane.client, version), plane.namespaces["b1"]
    called = address(plane.node, version), UDP
    with echoing(task, ADDRESSES[version], TARGET, order), caller(plane.client, client, called) as sender:
        for number in range(COUNT):
            assert sender.ask(os.urandom(3000 + number), order) == client
    assert queued(plane.node) == queued(task) == {"4": 0, "6": 0}


@pytest.mark.bpf
def test_a_load_of_fragments_in_mixed_order(shared: tuple[Plane, Driver]) -> None:
    """2,000 datagrams of two clients by the same ids, ten at a time in one heap."""
    plane, driver = shared
    driver.serve(services=services(4))
    plane.client.ip("addr", "replace", "192.0.2.77/24", "dev", "eth0")
    chance, called = random.Random(1), (plane.node.address, UDP)
    with contextlib.ExitStack() as stack:
        stack.enter_context(echoing(plane.namespaces["b1"], ADDRESSES[4], TARGET, shuffled))
        senders = [
            stack.enter_context(caller(plane.client, source, called)) for source in (plane.client.address, "192.0.2.77")
        ]
        for heap in range(100):
            data = {(s, n): os.urandom(2000 + n) for s in range(2) for n in range(10)}
            pieces = []
            for (s, n), payload in data.items():
                pieces += cut(senders[s].source, called, payload, heap * 10 + n)
            chance.shuffle(pieces)
            put(senders[0].raw, called[0], pieces)
            for s, sender in enumerate(senders):
                got = {sender.sock.recvfrom(65536)[0].partition(b" ")[2] for _ in range(10)}
                assert got == {payload for (of, _), payload in data.items() if of == s}
    assert queued(plane.node) == queued(plane.namespaces["b1"]) == {"4": 0, "6": 0}


@pytest.mark.bpf
@pytest.mark.parametrize("version", [4, 6])
def test_strays_are_dropped_and_hold_nobody_up(shared: tuple[Plane, Driver], version: int) -> None:
    """A first fragment that never comes; more of them than are kept."""
    plane, driver = shared
    driver.serve(services=services(version))
    client, called = address(plane.client, version), (address(plane.node, version), UDP)
    task = plane.namespaces["b1"]
    before = verdicts(driver).get("early", 0)
    with echoing(task, ADDRESSES[version], TARGET), caller(plane.client, client, called) as sender:
        for number in range(1500):
            put(sender.raw, called[0], cut(sender.source, called, bytes(3000), 60000 - number)[1:])
        wait_for(lambda: verdicts(driver).get("early", 0) >= before + 3000, "strays taken")
        assert queued(plane.node) == queued(task) == {"4": 0, "6": 0}
        for _ in range(20):
            assert sender.ask(os.urandom(4000), ORDERS["last-first"]) == client


@pytest.mark.bpf
@ORDER
@pytest.mark.parametrize("version", [4, 6])
def test_source_rules_hold(shared: tuple[Plane, Driver], version: int, order: Order) -> None:
    """A denied client gets nothing to the task by fragments, an admitted one everything."""
    plane, driver = shared
    client, called = address(plane.client, version), (address(plane.node, version), UDP)
    task = plane.namespaces["b1"]
    with echoing(task, ADDRESSES[version], TARGET, order), caller(plane.client, client, called) as sender:
        driver.serve(services=services(version, deny=[client]))
        before = verdicts(driver).get("denied", 0)
        pieces = len(cut(sender.source, called, bytes(3000), 1))
        for _ in range(50):
            sender.send(bytes(3000), order)
        wait_for(lambda: verdicts(driver).get("denied", 0) == before + 50 * pieces, "all denied")
        driver.serve(services=services(version, allow=[client]))
        for _ in range(50):
            assert sender.ask(os.urandom(3000), order) == client


@pytest.mark.bpf
@ORDER
def test_through_the_xdp_stage(order: Order) -> None:
    with Lab() as lab:
        plane = Plane(lab, 1)
        driver = plane.driver(xdp="on")
        driver.pretend_cards()
        driver.open()
        driver.serve(services=services(4, allow=[plane.client.address]))
        called = plane.node.address, UDP
        with echoing(plane.namespaces["b1"], ADDRESSES[4], TARGET, order):
            with caller(plane.client, plane.client.address, called) as sender:
                for _ in range(50):
                    assert sender.ask(os.urandom(3000), order) == plane.client.address
        driver.close(release=True)
        driver.end()


@pytest.mark.bpf
@pytest.mark.parametrize("back", ["tunnel", "direct"])
def test_through_the_tunnel(back: str) -> None:
    """A task of another node: it sees the client, in both directions and in any order."""
    with Lab() as lab:
        pair = Pair(lab)
        pair.ensure(back)
        task = pair.tasks["there"][0]
        for driver, where in ((pair.drivers[pair.a], "10.99.0.2"), (pair.drivers[pair.b], task.address)):
            backends = {"there": [where, TARGET, 1]}
            udp = {"name": "udp", "published": UDP, "protocol": "udp", "backends": backends}
            driver.serve(services=[udp], nodes=["10.99.0.1", "10.99.0.2"])
        pair.wait_ways(1500)
        client, called = pair.client.address, (pair.a.address, UDP)
        for order in ORDERS.values():
            with echoing(task, task.address, TARGET, order), caller(pair.client, client, called) as sender:
                for number in range(100):
                    assert sender.ask(os.urandom(3000 + number), order) == client
        for namespace in (pair.a, pair.b, task):
            assert queued(namespace) == {"4": 0, "6": 0}
        pair.close()


@pytest.mark.bpf
def test_an_agent_that_is_replaced_in_between(shared: tuple[Plane, Driver]) -> None:
    """The programs are replaced while fragments are kept: they are lost, and the next datagram is served."""
    plane, driver = shared
    driver.serve(services=services(4))
    client, called = plane.client.address, (plane.node.address, UDP)
    with echoing(plane.namespaces["b1"], ADDRESSES[4], TARGET), caller(plane.client, client, called) as sender:
        pieces = cut(sender.source, called, bytes(3 * PIECE), 5)
        put(sender.raw, called[0], pieces[1:])
        driver.again()
        driver.serve(services=services(4))
        put(sender.raw, called[0], pieces[:1])
        for order in (in_order, shuffled):
            assert sender.ask(os.urandom(3000), order) == client
