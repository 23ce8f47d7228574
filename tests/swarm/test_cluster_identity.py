# SPDX-License-Identifier: Apache-2.0
"""Who a node is changes under its running agent: it leaves the swarm and joins anew, or the root is rotated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster
from tests.support.lab.dockerd import Node, Swarm
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]


def identity(node: Node) -> str:
    """The node's id by its own word."""
    return str(node.api("GET", "/info")["Swarm"]["NodeID"])


def connected(cluster: Cluster) -> dict[str, str]:
    """Versions of the agents that the manager's agent knows of, by node."""
    rows = json.loads(cluster.daemons[0].get("/cluster")[1])["nodes"]
    return {row["id"]: row["mesh"] for row in rows if row["mesh"]}


def join_anew(swarm: Swarm, node: Node) -> tuple[str, str]:
    """Leave the swarm and join it again, as the same host. Returns the former id, which is down, and the new one."""
    before = identity(node)
    node.docker("swarm", "leave")
    swarm._join(node, "worker")
    now = identity(node)
    assert now != before
    return before, now


@pytest.mark.only("kernel")
def test_a_node_that_joins_anew_is_known_by_its_new_name(cluster: Cluster) -> None:
    """It was refused as one that reports others' tasks until its agent was started again."""
    swarm, node = cluster.swarm, cluster.swarm.nodes[2]
    spread = "--replicas-max-per-node=1"
    swarm.create("web", "--stop-grace-period=1s", spread, replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    wait_for(lambda: len(connected(cluster)) == 3, "all agents are known")
    logged = len(cluster.daemons[0].tail(1 << 30))
    before, now = join_anew(swarm, node)
    try:
        wait_for(lambda: now in connected(cluster), "the manager knows it by its new name", timeout=15)  # seen: 2 s
        assert before not in connected(cluster)
    finally:
        swarm.docker("node", "rm", "--force", before)
    tasks = cluster.agree("web", 3)
    for each in swarm.nodes:
        report = peers.load(cluster.client, each.address, WEB, "-n", "60", "-c", "4")
        assert (report.ok, set(report.identities)) == (60, tasks)
    said = cluster.daemons[0].tail(1 << 30)[logged:]
    assert "are not its own" not in said.partition(f"node={now}")[2], said
    # What it reports of its own tasks is believed: one that hangs gets no connections from other nodes.
    (task,) = {t["ID"] for t in swarm.tasks("web") if t["NodeID"] == now}
    (container,) = swarm.containers("web", node)
    node.docker("pause", container)
    try:
        wait_for(lambda: task not in cluster.sees(cluster.daemons[1], "web"), "the others know that it hangs")
    finally:
        node.docker("unpause", container)


def certificates(node: Node) -> int:
    """How many there are in the file of the node's certificate: behind a renewed one follows the CA's."""
    return (Path(node.data_root) / "swarm" / "certificates" / "swarm-node.crt").read_text().count("BEGIN CERT")


def is_served(cluster: Cluster, node: Node) -> bool:
    return peers.load(cluster.client, node.address, WEB, "-n", "1", "-c", "1").ok == 1


@pytest.mark.only("proxy")
def test_agents_start_while_a_rotation_of_the_root_is_pending(cluster: Cluster) -> None:
    """As it stays while one node is down."""
    swarm, down = cluster.swarm, cluster.swarm.nodes[1]
    here = "--constraint=node.role==manager"
    swarm.create("web", "--stop-grace-period=1s", here, replicas=2, publish=[f"{WEB}:8080"])
    cluster.agree("web", 2)
    down.stop()
    up = [(node, daemon) for node, daemon in zip(swarm.nodes, cluster.daemons, strict=True) if node is not down]
    swarm.docker("swarm", "ca", "--rotate", "--detach")
    wait_for(lambda: all(certificates(node) > 1 for node, _ in up), "renewed certificates")
    assert swarm.api("GET", "/swarm")["RootRotationInProgress"]
    for _, daemon in up:
        daemon.close()
    for _, daemon in up:
        daemon.start(wait=False)
    for node, daemon in up:
        daemon.wait_ready()
        # All agents were away: until the paths between them are proven again, ports are left to Docker's own mesh.
        wait_for(lambda there=node: is_served(cluster, there), "the paths are proven")
        assert peers.load(cluster.client, node.address, WEB, "-n", "30", "-c", "4").ok == 30
    down.start()
    wait_for(lambda: not swarm.api("GET", "/swarm")["RootRotationInProgress"], "the rotation has ended")
    worker = cluster.daemons[2]
    worker.close()
    worker.start()
    cluster.agree("web", 2)
