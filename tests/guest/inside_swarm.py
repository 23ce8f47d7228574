# SPDX-License-Identifier: Apache-2.0
"""Runs inside the guest, whose kernel has IPVS: mesh comes to a swarm of three nodes and goes again beside Docker's own
mesh. test_swarms starts it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support import peers
from tests.support.cluster import WEB
from tests.support.lab.dockerd import Swarm
from tests.support.lab.netns import Lab, run
from tests.support.polling import wait_for
from tests.support.rollout import ONE, PEER, PEER_UDP, TUNNEL, Rollout

PORTS = (WEB, ONE)
CALLS = 60


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with Lab() as made:
        yield Swarm(made, 1, 2)


def served_by_docker(rollout: Rollout) -> None:
    """All nodes serve without an agent, by IPVS in Docker's ingress sandbox."""
    for node in rollout.swarm.nodes:
        for port in PORTS:
            wait_for(lambda node=node, port=port: _calls(rollout, node.address, port), f"{node.hostname}:{port}")
        sandbox = f"--net={node.exec_root}/netns/ingress_sbox"
        shown = run(*node.inside("nsenter", sandbox, "cat", "/proc/net/ip_vs"))
        assert "FWM" in shown.stdout, shown.stdout


def _calls(rollout: Rollout, address: str, port: int) -> bool:
    return peers.load(rollout.cluster.client, address, port, "-n", str(CALLS), "-c", "4").ok == CALLS


def test_nothing_is_lost_beside_docker(swarm: Swarm) -> None:
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    swarm.create("one", replicas=1, publish=[f"{ONE}:8080"])
    for name, count in (("web", 3), ("one", 1)):
        swarm.wait_running(name, count)
    rollout = Rollout(swarm, None, swarm.lab.host("client"), ("kernel",), random.Random(7))
    try:
        print("Docker's own mesh", flush=True)
        served_by_docker(rollout)
        first, *others = rollout.choose.sample(swarm.nodes, 3)
        rollout.install(first)
        print(rollout, flush=True)
        rollout.disturb((TUNNEL, PEER, PEER_UDP))
        for node in others:
            rollout.install(node)
            print(rollout, flush=True)
        rollout.disturb((TUNNEL, PEER, PEER_UDP))
        rollout.disturb((TUNNEL,))
        rollout.take_over(first)
        print(rollout, flush=True)
        for node in rollout.choose.sample(swarm.nodes, 3):
            rollout.remove(node)
            print(rollout, flush=True)
        served_by_docker(rollout)
    finally:
        print(rollout, rollout.cluster.tails(), flush=True)
    assert rollout.failures == []
    assert rollout.served > 1000
