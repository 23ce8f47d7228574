# SPDX-License-Identifier: Apache-2.0
"""Runs inside the guest, whose kernel has IPVS: mesh comes to a swarm of three nodes and goes again beside Docker's own
mesh, under load. test_swarms starts it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.support.cluster import WEB
from tests.support.lab.dockerd import Node, Swarm
from tests.support.lab.netns import Lab, run
from tests.support.rollout import ONE, Rollout, log

SEED = int(os.environ.get("MESH_DRILL_SEED", "7"))
LOADS = {WEB: 10, ONE: 5}
LEAST = 1500  # new connections in a drill


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with Lab() as lab:
        yield Swarm(lab, 1, 2)


def given_by_ipvs(node: Node) -> int:
    """Connections that IPVS of a node's ingress sandbox has given to tasks so far."""
    sandbox = f"--net={node.exec_root}/netns/ingress_sbox"
    shown = run(*node.inside("nsenter", sandbox, "cat", "/proc/net/ip_vs_stats_percpu")).stdout
    processors = shown.partition("~")[0].splitlines()[2:]  # what is below is older
    return sum(int(line.split()[1], 16) for line in processors if line.strip())


def served_by_docker(rollout: Rollout) -> None:
    """All nodes serve without an agent, and IPVS gives the connections."""
    before = {node.hostname: given_by_ipvs(node) for node in rollout.swarm.nodes}
    rollout.served_by_docker()
    given = {node.hostname: given_by_ipvs(node) - before[node.hostname] for node in rollout.swarm.nodes}
    assert set(given.values()) == {200}, given
    log.info("Docker's mesh serves on all nodes")


def drill(rollout: Rollout) -> None:
    nodes, choose = rollout.swarm.nodes, rollout.choose
    for node in choose.sample(nodes, 3):
        rollout.install(node)
    rollout.passes()
    rollout.take_over(choose.choice(nodes))
    for node in choose.sample(nodes, 3):
        rollout.remove(node)


def test_nothing_is_lost_while_mesh_comes_and_goes(swarm: Swarm, request: pytest.FixtureRequest) -> None:
    log.info("the swarm is up")
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    swarm.create("one", replicas=1, publish=[f"{ONE}:8080"])
    rollout = Rollout(swarm, None, swarm.lab.host("client"), ("kernel", "proxy"), random.Random(SEED), LOADS)
    log.info("engines: %s", rollout.engines)
    try:
        rollout.wait_served()
        served_by_docker(rollout)
        drill(rollout)
        served_by_docker(rollout)
    finally:
        request.node.add_report_section("call", "drill", f"MESH_DRILL_SEED={SEED}\n{rollout}")
        request.node.add_report_section("call", "daemons", rollout.cluster.tails())
    assert rollout.failures == [], rollout
    assert rollout.served >= LEAST
