# SPDX-License-Identifier: Apache-2.0
"""What operators do to services and nodes of a real swarm, under steady load at every node: no request fails."""

from __future__ import annotations

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster, failures
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]

LONG = ("-n", "0", "-c", "4", "-r", "1", "-u", "/slow?seconds=3")
GRACE = "--stop-grace-period=15s"


def on(cluster: Cluster, node: int, service: str = "web") -> set[str]:
    """The tasks of a service on one node."""
    identity = cluster.swarm.manager.inspect("node", cluster.swarm.nodes[node].hostname)["ID"]
    return {task["ID"] for task in cluster.swarm.tasks(service) if task["NodeID"] == identity}


@pytest.mark.later("proxy")  # tests/swarm/test_stack.py has one
def test_a_rolling_update_loses_nothing(cluster5: Cluster) -> None:
    """New connections and transfers under way when their tasks are told to stop, and tasks that do not listen yet."""
    cluster5.swarm.create(
        "web", GRACE, "--update-parallelism=4", "--update-order=stop-first", "--update-delay=0s",
        "--update-monitor=500ms", replicas=8, publish=[f"{WEB}:8080"],
    )  # fmt: skip
    before = cluster5.agree("web", 8)
    with cluster5.load() as fresh, cluster5.load(*LONG) as long:
        cluster5.swarm.update("web", "--image=mesh-lab/server:2")
        after = cluster5.agree("web", 8)
        new, transfers = fresh.stop(), long.stop()
    assert not before & after
    assert (failures(new), failures(transfers)) == ({}, {})
    for report in new.values():
        assert before | after >= set(report.identities)
    for node in cluster5.swarm.nodes:
        report = peers.load(cluster5.client, node.address, WEB, "-n", "200", "-c", "16")
        assert (report.ok, set(report.identities)) == (200, after)


@pytest.mark.later("proxy")
def test_nodes_are_drained_and_paused_and_services_scaled(cluster5: Cluster) -> None:
    swarm = cluster5.swarm
    swarm.create("web", GRACE, replicas=8, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 8)
    worker = swarm.nodes[4].hostname
    with cluster5.load() as fresh, cluster5.load(*LONG) as long:
        assert on(cluster5, 4)
        swarm.docker("node", "update", "--availability", "drain", worker)
        wait_for(lambda: not on(cluster5, 4), "the drained node has no task")
        cluster5.agree("web", 8)
        swarm.docker("node", "update", "--availability", "pause", worker)
        swarm.docker("service", "scale", "--detach", "web=3")
        cluster5.agree("web", 3)
        swarm.docker("service", "scale", "--detach", "web=8")
        cluster5.agree("web", 8)
        assert not on(cluster5, 4)
        swarm.docker("node", "update", "--availability", "active", worker)
        swarm.docker("service", "scale", "--detach", "web=10")
        tasks = cluster5.agree("web", 10)
        assert on(cluster5, 4)
        new, transfers = fresh.stop(), long.stop()
    assert (failures(new), failures(transfers)) == ({}, {})
    for node in swarm.nodes:
        report = peers.load(cluster5.client, node.address, WEB, "-n", "200", "-c", "16")
        assert (report.ok, set(report.identities)) == (200, tasks)


def test_services_come_and_go(cluster5: Cluster) -> None:
    """One is removed and made again, scaled to zero and back; another stands beside it and never notices."""
    swarm = cluster5.swarm
    swarm.create("stands", replicas=5, publish=["8001:8080"])
    swarm.create("web", GRACE, replicas=5, publish=[f"{WEB}:8080"])
    cluster5.agree("stands", 5)
    first = cluster5.agree("web", 5)

    def serve(tasks: set[str]) -> None:
        for node in swarm.nodes:
            report = peers.load(cluster5.client, node.address, WEB, "-n", "100", "-c", "8")
            assert (report.ok, report.failures, set(report.identities)) == (100, (), tasks)

    def refused() -> bool:
        found = [peers.load(cluster5.client, node.address, WEB, "-n", "1", "-T", "2") for node in swarm.nodes]
        return all(report.failures for report in found)

    with cluster5.load(port=8001) as stands:
        serve(first)
        swarm.remove("web")
        wait_for(refused, "the removed port refuses on every node")
        swarm.create("web", GRACE, replicas=5, publish=[f"{WEB}:8080"])
        second = cluster5.agree("web", 5)
        serve(second)
        swarm.docker("service", "scale", "--detach", "web=0")
        wait_for(lambda: not any(cluster5.sees(d, "web") for d in cluster5.daemons), "nobody serves")
        assert refused()
        swarm.docker("service", "scale", "--detach", "web=5")
        third = cluster5.agree("web", 5)
        serve(third)
        reports = stands.stop()
    assert failures(reports) == {}
    assert not (first & second or second & third)
