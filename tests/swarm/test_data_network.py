# SPDX-License-Identifier: Apache-2.0
"""Nodes that reach each other by another network than Swarm's own, and addresses that change while all runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster, blocked
from tests.support.lab.dockerd import Node
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]

SOON = 60.0  # seconds in which a change is followed, or named


def data_address(cluster: Cluster, node: Node, more: int = 0) -> str:
    return f"10.88.0.{cluster.swarm.nodes.index(node) + 1 + more}"


def tell(cluster: Cluster, node: Node, address: str) -> None:
    cluster.swarm.docker("node", "update", "--label-add", f"mesh.address={address}", node.hostname)


@contextlib.contextmanager
def data_network(cluster: Cluster) -> Iterator[None]:
    """Every node has an address there; between their other ones the ports of mesh are closed."""
    swarm = cluster.swarm
    closed = "ip daddr 192.0.2.0/24"
    for node in swarm.nodes:
        node.namespace.ip("address", "add", f"{data_address(cluster, node)}/24", "dev", "eth0")
    try:
        with blocked(swarm, f"{closed} udp dport {{6084, 9552}}", f"{closed} tcp dport 9552"):
            yield
    finally:
        for node in swarm.nodes:
            swarm.docker("node", "update", "--label-rm", "mesh.address", node.hostname, check=False)
            for more in (0, 10):
                address = f"{data_address(cluster, node, more)}/24"
                if has(node, address):
                    node.namespace.ip("address", "del", address, "dev", "eth0")


def has(node: Node, address: str) -> bool:
    return address in node.namespace.ip("-o", "address", "show", "dev", "eth0")


def paths(cluster: Cluster, to: str) -> set[str]:
    """How the others' paths to a node stand."""
    return {row["state"] for d in cluster.daemons for row in d.state()["paths"] if row["node_name"] == to}


def served(cluster: Cluster) -> bool:
    """Whether every node reaches the task, wherever that is."""
    reports = [
        peers.load(cluster.client, n.address, WEB, "-n", "20", "-c", "4", "-T", "3") for n in cluster.swarm.nodes
    ]
    return all(report.ok == 20 for report in reports)


def test_a_data_network_is_used_and_its_addresses_may_change(cluster: Cluster) -> None:
    swarm, away = cluster.swarm, cluster.swarm.nodes[2]
    here = f"--constraint=node.hostname=={away.hostname}"
    swarm.create("web", here, publish=[f"{WEB}:8080"])
    cluster.agree("web", 1)
    with data_network(cluster):
        wait_for(lambda: paths(cluster, away.hostname) == {"down"}, "closed ports are noticed", timeout=SOON)
        for node in swarm.nodes:
            tell(cluster, node, data_address(cluster, node))
        wait_for(lambda: served(cluster), "the data network is used", timeout=SOON)
        new = data_address(cluster, away, 10)
        away.namespace.ip("address", "del", f"{data_address(cluster, away)}/24", "dev", "eth0")
        away.namespace.ip("address", "add", f"{new}/24", "dev", "eth0")
        wait_for(lambda: paths(cluster, away.hostname) == {"down"}, "the paths end, and are named", timeout=SOON)
        assert all(any(away.hostname in each for each in d.state()["problems"]) for d in cluster.daemons[:2])
        tell(cluster, away, new)
        wait_for(lambda: served(cluster), "the node is followed", timeout=SOON)


@pytest.mark.only("kernel")
def test_a_node_that_gets_another_address_is_followed(cluster: Cluster) -> None:
    """As from DHCP. Swarm hears of it by the node's own connection, and mesh by Swarm."""
    swarm, node = cluster.swarm, cluster.swarm.nodes[2]
    swarm.create("web", "--replicas-max-per-node=1", replicas=3, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 3)
    before, after = node.address, "192.0.2.77"

    def use(address: str, former: str) -> None:
        node.namespace.ip("address", "del", f"{former}/24", "dev", "eth0")
        node.namespace.ip("address", "add", f"{address}/24", "dev", "eth0")
        node.namespace.ip("route", "replace", "default", "via", "192.0.2.1")

    def followed() -> bool:
        return paths(cluster, node.hostname) == {"up"} and all(cluster.sees(d, "web") == tasks for d in cluster.daemons)

    use(after, before)
    try:
        wait_for(lambda: paths(cluster, node.hostname) == {"down"}, "the paths end, and are named", timeout=SOON)
        wait_for(followed, "the node is followed", timeout=SOON)  # seen: 13 s
        for address in (swarm.nodes[0].address, after):
            report = peers.load(cluster.client, address, WEB, "-n", "60", "-c", "4")
            assert (report.ok, set(report.identities)) == (60, tasks)
    finally:
        use(before, after)
        wait_for(followed, "it is followed back", timeout=SOON)
