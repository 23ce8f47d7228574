# SPDX-License-Identifier: Apache-2.0
"""The roll-out drill: mesh comes to a swarm node by node, is upgraded and goes again, while ports between the nodes
close and open. No new connection fails that Docker's own mesh would have served.

Docker's mesh is a stand-in (tests/support/stand_in.py). MESH_DRILL_SEED repeats a drill.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import WEB
from tests.support.lab import images
from tests.support.lab.dockerd import Node, Swarm, unavailable
from tests.support.lab.netns import Lab
from tests.support.old_build import old_build
from tests.support.rollout import ONE, Rollout
from tests.support.stand_in import StandIn

pytestmark = [
    pytest.mark.root,
    pytest.mark.swarm,
    pytest.mark.bpf,
    pytest.mark.later("kernel", "proxy", "mixed", "upgrade"),
]

LEAST = 5000  # new connections in a drill
ENGINES = {"kernel": ("kernel",), "proxy": ("proxy",)}
SHORT = "short"
EVERYTHING = bool(os.environ.get("MESH_TEST_ALL"))
SEED = int(os.environ.get("MESH_DRILL_SEED", "0")) or (random.SystemRandom().randrange(1, 1 << 16) if EVERYTHING else 7)


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    """A manager and three workers, of this test alone: a fourth worker joins."""
    if reason := unavailable():
        pytest.skip(reason)
    with Lab() as made:
        yield Swarm(made, 1, 3)


@pytest.fixture
def stand_in(swarm: Swarm) -> Iterator[StandIn]:
    with StandIn(swarm) as made:
        yield made


def newcomer(swarm: Swarm) -> Node:
    """A node that is to join."""
    node = Node(swarm.lab, swarm.lab.host("n5"))
    for image in images.server_images():
        node.load(image)
    return node


def drill(rollout: Rollout, *, short: bool) -> None:
    """All of it, in an order that the seed gives."""
    swarm, choose, fifth = rollout.swarm, rollout.choose, newcomer(rollout.swarm)
    order = choose.sample(swarm.nodes, 4)
    for node in order[:2]:
        rollout.install(node)
    rollout.disturb()
    rollout.join(fifth, tasks=10)
    for node in [*order[2:], fifth]:
        rollout.install(node)
        if not short:
            rollout.disturb()
    rollout.passes()
    for node in choose.sample(swarm.nodes, 2 if short else 5):
        rollout.take_over(node)
    for node in choose.sample(swarm.nodes, 5):
        rollout.remove(node)
        if not short:
            rollout.disturb()


def upgrade(rollout: Rollout) -> None:
    """From the old build to this one, node by node; then a node joins, and mesh goes.

    The old build alone on some nodes loses connections, as it always did; so it is everywhere before anybody calls.
    """
    swarm, choose, fifth = rollout.swarm, rollout.choose, newcomer(rollout.swarm)
    rollout.begin_with(old_build())
    for node in choose.sample(swarm.nodes, 4):
        rollout.take_over(node, Path(sys.executable).with_name("mesh"))
    rollout.disturb()
    rollout.join(fifth, tasks=10)
    rollout.install(fifth)
    rollout.passes()
    for node in choose.sample(swarm.nodes, 5):
        rollout.remove(node)


@pytest.mark.parametrize("engine", [SHORT, "mixed", "kernel", "proxy", "upgrade"])
def test_nothing_is_lost_while_mesh_comes_is_upgraded_and_goes(
    swarm: Swarm, stand_in: StandIn, engine: str, request: pytest.FixtureRequest
) -> None:
    swarm.create("web", replicas=8, publish=[f"{WEB}:8080"])
    swarm.create("one", replicas=1, publish=[f"{ONE}:8080"])
    engines = ENGINES.get(engine, ("kernel", "proxy"))
    rollout = Rollout(swarm, stand_in, swarm.lab.host("client"), engines, random.Random(SEED))
    try:
        rollout.served_by_docker()
        if engine == "upgrade":
            upgrade(rollout)
        else:
            drill(rollout, short=engine == SHORT)
        rollout.served_by_docker()
    finally:
        request.node.add_report_section("call", "drill", f"MESH_DRILL_SEED={SEED}\n{rollout}")
        request.node.add_report_section("call", "daemons", rollout.cluster.tails())
    assert rollout.failures == [], rollout
    assert rollout.served >= LEAST
