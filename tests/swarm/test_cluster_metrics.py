# SPDX-License-Identifier: Apache-2.0
"""What three nodes with the kernel engine tell Prometheus of one another, of what is asked for and of failures."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from tests.support.cluster import WEB, Cluster
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm, pytest.mark.bpf, pytest.mark.only("kernel")]


def total(cluster: Cluster, name: str, **labels: str) -> list[float]:
    """A sum on each node."""
    return [daemon.total(name, **labels) for daemon in cluster.daemons]


def test_nodes_certificates_and_what_is_asked_for(cluster: Cluster) -> None:
    """On workers as on managers."""
    swarm = cluster.swarm
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    names = [node.hostname for node in swarm.nodes]
    for daemon in cluster.daemons:
        assert {daemon.total("mesh_node_up", node=name) for name in names} == {1}
        assert daemon.total("mesh_certificate_expiry_timestamp_seconds") > time.time()
        assert daemon.total("mesh_service_replicas", service="web") == 3
    swarm.docker("service", "scale", "--detach", "web=0")
    wait_for(lambda: total(cluster, "mesh_service_replicas", service="web") == [0, 0, 0], "0 are asked for")


def test_failures_count_once_in_the_cluster(cluster: Cluster) -> None:
    """Tasks that refuse, called at each node: the sum over all nodes is what clients were told."""
    swarm = cluster.swarm
    swarm.create("web", "--label=mesh.health=off", replicas=3, publish=[f"{WEB}:9"])  # nobody listens
    wait_for(lambda: all(total(cluster, "mesh_frontend_backends_eligible", service="web")), "a table on all nodes")
    refused = 0
    with cluster.client.entered():
        for node in swarm.nodes:
            for _ in range(4):
                with socket.socket() as call:
                    call.settimeout(30)
                    with contextlib.suppress(ConnectionRefusedError):
                        call.connect((node.address, WEB))
                        pytest.fail("somebody listens")
                    refused += 1
    counted = total(cluster, "mesh_connections_failed_total", service="web", cause="refused")
    assert sum(counted) == refused == 12
    assert sum(total(cluster, "mesh_connections_opened_total", service="web")) == 0
