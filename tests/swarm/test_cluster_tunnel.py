# SPDX-License-Identifier: Apache-2.0
"""Three nodes of a real swarm with the kernel engine: any node answers for any task; it sees the client's address."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections import Counter

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster
from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm, pytest.mark.bpf, pytest.mark.only("kernel")]


def peers_seen(client: Namespace, address: str, count: int) -> Counter[str]:
    """Whom the tasks that answer take for their client."""
    seen: Counter[str] = Counter()
    for _ in range(count):
        with client.entered():
            connection = http.client.HTTPConnection(address, WEB, timeout=PATIENCE)
            connection.connect()
        connection.request("GET", "/")
        seen[json.loads(connection.getresponse().read())["peer"].rpartition(":")[0]] += 1
        connection.close()
    return seen


def ways(cluster: Cluster, node: int) -> dict[str, str]:
    """How a node gets to each task of `web`."""
    (service,) = (s for s in cluster.daemons[node].state()["services"] if s["name"] == "web")
    return {target["backend"]: target["path"] for f in service["frontends"] for target in f["targets"]}


@pytest.mark.parametrize("back", ["tunnel", "direct"])
def test_any_node_answers_for_any_task(cluster: Cluster, back: str) -> None:
    with cluster.configured(return_path=back) if back == "direct" else contextlib.nullcontext():
        any_node_answers(cluster, back)


def any_node_answers(cluster: Cluster, back: str) -> None:
    swarm = cluster.swarm
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 6)
    for node in swarm.nodes:
        report = peers.load(cluster.client, node.address, WEB, "-n", "3000", "-c", "32")
        assert (report.ok, report.failures) == (3000, ())
        assert set(report.identities) == tasks
        assert all(405 <= answers <= 600 for answers in report.identities.values()), report.identities
        assert set(peers_seen(cluster.client, node.address, 30)) == {cluster.client.address}
    verdict = "tunnel_reply_rx" if back == "tunnel" else "tunnel_direct"
    for number, daemon in enumerate(cluster.daemons):
        assert daemon.total("mesh_verdicts_total", verdict="tunnel_tx") > 3000
        assert daemon.total("mesh_verdicts_total", verdict=verdict) > 3000
        assert daemon.state()["problems"] == []
        assert set(ways(cluster, number).values()) == {"here", "tunnel"}


def test_callers_on_the_nodes(cluster: Cluster) -> None:
    """Processes of a node that has no task, and IPv6 clients, are served by way of the peer port."""
    worker = cluster.swarm.nodes[1]
    cluster.swarm.create("web", "--constraint", f"node.hostname=={worker.hostname}", publish=[f"{WEB}:8080"])
    (task,) = cluster.agree("web", 1)
    for node in cluster.swarm.nodes:
        for caller, address in (
            (node.namespace, "127.0.0.1"),
            (node.namespace, node.address),
            (cluster.client, node.namespace.address6),
        ):
            report = peers.load(caller, address, WEB, "-n", "100", "-c", "8")
            assert (report.ok, report.failures, set(report.identities)) == (100, (), {task})


def test_nodes_with_either_engine_reach_each_others_tasks(cluster: Cluster) -> None:
    swarm = cluster.swarm
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 6)
    cluster.daemons[2].release()
    cluster.daemons[2] = cluster.daemon(swarm.nodes[2], "proxy")
    try:
        cluster.wait_ready()
        cluster.agree("web", 6)
        for node in swarm.nodes:
            report = peers.load(cluster.client, node.address, WEB, "-n", "1000", "-c", "16")
            assert (report.ok, report.failures, set(report.identities)) == (1000, (), tasks)
        # A probe that a busy machine delays takes a path back until the next one.
        wait_for(lambda: set(ways(cluster, 0).values()) == {"here", "tunnel", "peer"}, "each node is on its best path")
        wait_for(lambda: set(ways(cluster, 2).values()) == {"here", "peer"}, "no tunnel to a proxy engine")
    finally:
        cluster.daemons[2].close()
        cluster.daemons[2] = cluster.daemon(swarm.nodes[2], "kernel")
        cluster.wait_ready()  # whoever ends it next finds its control socket
