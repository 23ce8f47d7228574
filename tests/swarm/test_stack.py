# SPDX-License-Identifier: Apache-2.0
"""Docker's example voting application as a stack on three nodes: deployed from its compose file, used at every node,
updated under load. Its images are stand-ins of the same names, which talk to each other over the overlay networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.cluster import Cluster
from tests.support.lab import images
from tests.support.lab.dockerd import Swarm
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]

COMPOSE = Path(__file__).parents[2] / "deploy" / "voting-app.yml"
SERVICES = {"vote": 3, "redis": 1, "worker": 1, "db": 1, "result": 1}
VOTE, RESULT = 80, 5001


@pytest.fixture
def cluster(cluster: Cluster) -> Iterator[Cluster]:
    """Whose nodes have the application's images."""
    with ThreadPoolExecutor(len(cluster.swarm.nodes)) as pool:
        list(pool.map(lambda node: [node.load(image) for image in images.voting_images()], cluster.swarm.nodes))
    yield cluster
    cluster.swarm.docker("stack", "rm", "voting", check=False)


def deploy(swarm: Swarm, compose: Path) -> None:
    swarm.docker("stack", "deploy", "--resolve-image", "never", "-c", str(compose), "voting")


def voters(swarm: Swarm) -> set[str]:
    """How the tasks of `vote` name themselves: host names, the beginnings of their containers' ids."""
    return {container[:12] for node in swarm.nodes for container in swarm.containers("voting_vote", node)}


def results(cluster: Cluster, address: str) -> dict[str, Any]:
    said = cluster.client.run("curl", "-sS", "-m", "60", f"http://{address}:{RESULT}/", check=False).stdout
    return dict(json.loads(said)) if said.startswith("{") else {}


@pytest.mark.later("kernel")  # over five nodes: test_cluster_changes.py
def test_the_voting_application_is_updated_under_load(cluster: Cluster, tmp_path: Path) -> None:
    """At every node any of the three tasks answers; through a rolling update of `vote` no request of those who vote
    at all nodes fails, and each vote that was answered is counted."""
    swarm = cluster.swarm
    deploy(swarm, COMPOSE)
    for name, replicas in SERVICES.items():
        swarm.wait_running(f"voting_{name}", replicas)
    for name in ("vote", "result"):
        cluster.agree(f"voting_{name}", SERVICES[name])
    before = voters(swarm)
    assert len(before) == 3
    for node in swarm.nodes:
        report = peers.load(cluster.client, node.address, VOTE, "-n", "600", "-c", "16")
        assert (report.ok, report.failures, set(report.identities)) == (600, (), before)
        wait_for(lambda at=node.address: results(cluster, at), f"result at {node.hostname}")

    edited = tmp_path / "voting.yml"
    text = COMPOSE.read_text().replace("examplevotingapp_vote", "examplevotingapp_vote:next")
    soon = text.replace("order: start-first}", "order: start-first, monitor: 500ms}")  # of each task, by default 5 s
    assert soon != text
    edited.write_text(soon)
    with ExitStack() as stack:
        loads = [
            stack.enter_context(
                peers.Load(
                    cluster.client, node.address, VOTE, "-n", "0", "-c", "32", "-r", "60", "-u", f"/vote/{choice}"
                )
            )
            for node, choice in zip(swarm.nodes, "aab", strict=True)
        ]
        deploy(swarm, edited)
        wait_for(lambda: updated(swarm), "rolling update of vote")
        cluster.agree("voting_vote", 3)
        after = wait_for(lambda: found if len(found := voters(swarm)) == 3 else set(), "the old tasks have ended")
        for load in loads:
            load.wait_more(200)
        reports = [load.stop() for load in loads]
    assert not before & after
    assert [(report.failed, report.failures) for report in reports] == [(0, ())] * 3
    assert all(before | after >= set(report.identities) >= after for report in reports)
    left = {"a": reports[0].ok + reports[1].ok, "b": reports[2].ok}
    for node in swarm.nodes:
        wait_for(lambda at=node.address: left.items() <= results(cluster, at).items(), f"all votes at {node.hostname}")


def updated(swarm: Swarm) -> bool:
    state = swarm.manager.inspect("service", "voting_vote")
    image = state["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]
    return bool(image.endswith(":next") and state.get("UpdateStatus", {}).get("State") == "completed")
