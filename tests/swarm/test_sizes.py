# SPDX-License-Identifier: Apache-2.0
"""Datagrams of all sizes from and to senders that never set DF, whatever the links take."""

from __future__ import annotations

import pytest

from tests.support.cluster import Cluster
from tests.support.lab.images import UDP_PORT
from tests.support.sockets import assert_echo, omitting

pytestmark = [pytest.mark.root, pytest.mark.swarm]

UDP = 8002
SIZES = (1000, 1300, 1350, 1372, 1400, 1472, 4000, 9000)


def assert_served(cluster: Cluster) -> None:
    """A task on the last node, called at each node."""
    for node in cluster.swarm.nodes:
        with cluster.client.entered(), omitting() as client:
            client.connect((node.address, UDP))
            for size in SIZES:
                assert_echo(client, size)


def test_large_datagrams_through_the_tunnel_and_over_small_links(cluster: Cluster) -> None:
    swarm = cluster.swarm
    here = f"--constraint=node.hostname=={swarm.nodes[-1].hostname}"
    swarm.create("udp", here, publish=[f"{UDP}:{UDP_PORT}/udp"])
    cluster.agree("udp", 1)
    assert_served(cluster)
    links = [cluster.client, *(node.namespace for node in swarm.nodes)]
    try:
        for end in links:
            end.ip("link", "set", "eth0", "mtu", "1400")
        assert_served(cluster)
    finally:
        for end in links:
            end.ip("link", "set", "eth0", "mtu", "1500")
    if cluster.engine == "kernel":
        cut = [daemon.total("mesh_verdicts_total", verdict="fragmented") for daemon in cluster.daemons]
        assert all(cut), cut
