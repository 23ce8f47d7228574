# SPDX-License-Identifier: Apache-2.0
"""Three nodes of a real swarm, an agent on each: any node answers for any task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster
from tests.support.lab.dockerd import AT_ONCE
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm, pytest.mark.only("proxy")]


def test_any_node_answers_for_any_task(cluster: Cluster) -> None:
    cluster.swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 6)
    for node in cluster.swarm.nodes:
        report = peers.load(cluster.client, node.address, WEB, "-n", "3000", "-c", "32")
        assert (report.ok, report.failures) == (3000, ())
        assert set(report.identities) == tasks
        assert all(350 <= answers <= 650 for answers in report.identities.values()), report.identities


def test_a_service_that_is_on_one_node_only(cluster: Cluster) -> None:
    """Also on the node that has it, on a worker that has not, and to the node itself."""
    worker = cluster.swarm.nodes[1]
    constraint = f"node.hostname=={worker.hostname}"
    cluster.swarm.create("one", "--constraint", constraint, publish=["8001:8080"])
    (task,) = cluster.agree("one", 1)
    for node in cluster.swarm.nodes:
        report = peers.load(cluster.client, node.address, 8001, "-n", "100", "-c", "8")
        assert (report.ok, set(report.identities)) == (100, {task})
        local = peers.load(node.namespace, "127.0.0.1", 8001, "-n", "50", "-c", "4")
        assert (local.ok, set(local.identities)) == (50, {task})


def test_nodes_are_compared(cluster: Cluster) -> None:
    cluster.swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)

    def compared() -> dict[str, Any]:
        return dict(json.loads(cluster.daemons[0].get("/cluster")[1]))

    wait_for(lambda: not compared()["differences"], "nodes without a difference")
    nodes = {node["name"]: node for node in compared()["nodes"]}
    assert set(nodes) == {node.hostname for node in cluster.swarm.nodes}
    assert {node["engine"] for node in nodes.values()} == {"proxy"}
    assert all(len(node["digests"]) == 1 and node["age"] < 10 for node in nodes.values())
    status, answer = cluster.daemons[1].get("/cluster")
    assert status == 400 and cluster.swarm.manager.address in answer


def test_killed_on_a_worker_is_out_everywhere(cluster: Cluster) -> None:
    cluster.swarm.create("web", AT_ONCE, replicas=3, publish=[f"{WEB}:8080"])
    before = cluster.agree("web", 3)
    worker = cluster.swarm.nodes[2]
    for container in cluster.swarm.containers("web", worker):
        worker.docker("kill", container)
    after = cluster.agree("web", 3)
    assert before != after
    report = peers.load(cluster.client, cluster.swarm.manager.address, WEB, "-n", "600", "-c", "16")
    assert (report.ok, report.failures, set(report.identities)) == (600, (), after)


def test_a_node_that_loses_power_is_out_and_comes_back(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    """Only what was under way to it fails; the others take no connection to it once it is known to be silent."""
    cluster.swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    cluster.agree("web", 6)
    gone = cluster.swarm.nodes[2]
    identity = cluster.swarm.manager.inspect("node", gone.hostname)["ID"]
    lost = {task["ID"] for task in cluster.swarm.tasks("web") if task["NodeID"] == identity}
    assert lost
    loads = [
        peers.Load(cluster.client, node.address, WEB, "-n", "0", "-c", "16", "-r", "50", "-T", "20")
        for node in cluster.swarm.nodes[:2]
    ]
    with loads[0] as one, loads[1] as two:
        port = f"p{gone.address.rpartition('.')[2]}"  # of the switch
        cluster.swarm.lab.switch.ip("link", "set", port, "down")
        begun = time.monotonic()
        try:
            left = cluster.daemons[:2]
            wait_for(lambda: not any(cluster.sees(d, "web") & lost for d in left), "the lost node is out")
            record_property("seconds until a silent node is out", round(time.monotonic() - begun, 2))
            one.wait_more()
            two.wait_more()
            quiet = [
                peers.load(cluster.client, n.address, WEB, "-n", "300", "-c", "8") for n in cluster.swarm.nodes[:2]
            ]
        finally:
            cluster.swarm.lab.switch.ip("link", "set", port, "up")
        reports = [one.stop(), two.stop()]
    for report in quiet:
        assert (report.ok, report.failures, set(report.identities) & lost) == (300, (), set())
    for report in reports:
        assert report.failures_but_of(*lost, "") == []
        assert report.failed <= 32
    cluster.agree("web", 6)
    report = peers.load(cluster.client, gone.address, WEB, "-n", "300", "-c", "8")
    assert (report.ok, report.failures) == (300, ())


def test_the_only_manager_goes_silent_and_comes_back(cluster: Cluster) -> None:
    """No manager is left to tell the workers, who see it for themselves."""
    swarm, left = cluster.swarm, cluster.daemons[1:]
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 6)
    identity = swarm.manager.inspect("node", swarm.manager.hostname)["ID"]
    lost = {task["ID"] for task in swarm.tasks("web") if task["NodeID"] == identity}
    assert lost and tasks - lost
    port = f"p{swarm.manager.address.rpartition('.')[2]}"
    swarm.lab.switch.ip("link", "set", port, "down")
    try:
        wait_for(lambda: all(cluster.sees(d, "web") == tasks - lost for d in left), "the manager's tasks are out")
        for node in swarm.nodes[1:]:
            report = peers.load(cluster.client, node.address, WEB, "-n", "300", "-c", "8")
            assert (report.ok, report.failures, set(report.identities)) == (300, (), tasks - lost)
    finally:
        swarm.lab.switch.ip("link", "set", port, "up")
    cluster.agree("web", 6)


def test_a_node_with_the_kernel_engine_takes_what_others_hand_over(cluster: Cluster) -> None:
    """Its tasks answer to clients of nodes with the proxy engine."""
    swarm = cluster.swarm
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 3)
    cluster.daemons[2].close()
    mixed = cluster.daemon(swarm.nodes[2], "kernel")
    try:
        mixed.wait_ready()
        for daemon in cluster.daemons[:2]:  # the path to the node has to be proven anew
            wait_for(lambda daemon=daemon: cluster.sees(daemon, "web") == tasks, "all tasks are in reach again")
        for node in swarm.nodes[:2]:
            report = peers.load(cluster.client, node.address, WEB, "-n", "300", "-c", "8")
            assert (report.ok, report.failures, set(report.identities)) == (300, (), tasks)
        assert mixed.total("mesh_peer_connections_total") > 0
    finally:
        mixed.release()
        cluster.daemons[2].start()
