# SPDX-License-Identifier: Apache-2.0
"""A node of a real swarm goes to an earlier build, which knows no proofs, and back. The old one is built from git."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.cluster import WEB, Cluster, failures
from tests.support.daemon import Daemon
from tests.support.old_build import old_build
from tests.support.polling import wait_for
from tests.support.proofs import agreed

pytestmark = [pytest.mark.root, pytest.mark.swarm, pytest.mark.later("proxy", "kernel")]


def named(daemon: Daemon) -> bool:
    """Whether a daemon names a node that does not prove that it is one."""
    return any("does not prove" in str(problem) for problem in daemon.state()["problems"])


def are_right(daemons: list[Daemon], wanted: bool) -> Callable[[], bool]:
    """Whether each of them names such a node, or none does."""
    return lambda: all(named(daemon) == wanted for daemon in daemons)


def test_nodes_of_two_builds(cluster: Cluster) -> None:
    """Load at the two others all the time, and at this one while its agent is there; nothing is lost."""
    wait_for(lambda: agreed(cluster), "all agents have one key and demand proofs")
    cluster.swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    cluster.agree("web", 6)
    old = old_build()
    node, changing = cluster.swarm.nodes[2], cluster.daemons[2]
    new = changing.program
    with cluster.load(nodes=cluster.swarm.nodes[:2]) as loads:
        for program in (old, new):
            changing.stop()
            changing.program = program
            changing.start()
            cluster.agree("web", 6)
            wait_for(are_right(cluster.daemons[:2], program is old), "named, or not any more")
            with cluster.load(nodes=[node]) as own:
                own.wait_more(200)
                assert failures(own.stop()) == {}
        wait_for(lambda: agreed(cluster), "proofs are demanded again")
        loads.wait_more(50)
        assert failures(loads.stop()) == {}
