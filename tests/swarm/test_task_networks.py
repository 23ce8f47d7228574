# SPDX-License-Identifier: Apache-2.0
"""Tasks that are not where tasks usually are: on a bridge of their node, on macvlan, or on another network suddenly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster, failures
from tests.support.lab.dockerd import Swarm
from tests.support.polling import wait_for
from tests.support.stand_in import StandIn

pytestmark = [pytest.mark.root, pytest.mark.swarm]


@contextlib.contextmanager
def network(swarm: Swarm, name: str, driver: str, config: str = "", *options: str) -> Iterator[None]:
    """A network of each node's own by which services can be attached; services are removed before it."""
    if config:
        for node in swarm.nodes:
            node.docker("network", "create", "--config-only", *options, config)
    origin = [f"--config-from={config}"] if config else []
    swarm.docker("network", "create", "--scope=swarm", f"--driver={driver}", *origin, name)
    try:
        yield
    finally:
        swarm.reset()
        swarm.docker("network", "rm", name)
        if config:
            for node in swarm.nodes:
                wait_for(lambda node=node: not node.docker("network", "rm", config, check=False).returncode, config)


def test_tasks_on_a_bridge_of_their_node_are_served(cluster: Cluster) -> None:
    """Such a task has no place on docker_gwbridge. Local and remote ones, from clients and from the nodes."""
    swarm = cluster.swarm
    with network(swarm, "own", "bridge"):
        swarm.create("web", "--network=own", "--replicas-max-per-node=1", replicas=3, publish=[f"{WEB}:8080"])
        tasks = cluster.agree("web", 3)
        for node in swarm.nodes:
            assert swarm.containers("web", node)[0] not in node.inspect("network", "docker_gwbridge")["Containers"]
            for caller, address in ((cluster.client, node.address), (node.namespace, "127.0.0.1")):
                report = peers.load(caller, address, WEB, "-n", "200", "-c", "8")
                assert (report.ok, report.failures) == (200, ())
                assert set(report.identities) == tasks


def test_connecting_a_network_to_a_task_cuts_no_service(cluster: Cluster) -> None:
    """Docker takes the task's place on docker_gwbridge when it gets another way out, and gives one back later. Only an
    answer that is under way just then is lost, for Docker removes the interface that it takes; a proxy may say so."""
    swarm = cluster.swarm
    swarm.create("web", "--replicas-max-per-node=1", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    with cluster.load("-n", "0", "-c", "16", "-r", "50", "-T", "10") as loads:
        loads.wait_more(50)
        for command in ("connect", "disconnect"):
            for node in swarm.nodes[:2]:
                node.docker("network", command, "bridge", swarm.containers("web", node)[0])
            loads.wait_more(300)
        reports = loads.stop()
    assert sum(report.ok for report in reports.values()) > 1500
    causes = {cause for report in reports.values() for cause, *_ in report.failures}
    lost = {"read timeout", "read: ECONNRESET"} if cluster.engine == "proxy" else {"read timeout"}
    assert causes <= lost, failures(reports)
    under_way = 48 // 3  # callers, and tasks that they call
    assert sum(report.failed for report in reports.values()) <= under_way, failures(reports)


def test_tasks_on_macvlan_are_left_to_docker(cluster: Cluster) -> None:
    """A node does not reach a task that leaves by macvlan, but Docker's own mesh does; and mesh says so."""
    swarm = cluster.swarm
    lan = ("--subnet=192.0.2.0/24", "--ip-range=192.0.2.208/28", "--opt=parent=eth0")
    with network(swarm, "lan", "macvlan", "lan-here", *lan), StandIn(swarm) as docker:
        swarm.create("web", "--network=lan", publish=[f"{WEB}:8080"])
        docker.wait()

        def named() -> bool:
            states = [daemon.state() for daemon in cluster.daemons]
            return all(any("macvlan" in problem for problem in state["problems"]) for state in states)

        wait_for(named, "all nodes name the service")
        wait_for(lambda: all(not cluster.sees(d, "web") for d in cluster.daemons), "nobody serves it")
        for node in swarm.nodes:
            report = peers.load(cluster.client, node.address, WEB, "-n", "100", "-c", "4")
            assert (report.ok, report.failures) == (100, ())
