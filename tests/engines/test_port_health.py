# SPDX-License-Identifier: Apache-2.0
"""A task whose second port opens late or dies gets no flows there, and all others on its other port; both engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.engines.kernel_plane import Connection, serve
from tests.engines.topology import WEB, Spec, Topology
from tests.support.lab.images import HTTP_PORT
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SECOND, TARGET = 8011, 8085  # published, and where it listens
HEALTH = {"health": "tcp", "health-interval": "100ms", "health-timeout": "500ms"}


def who(topology: Topology, count: int = 30) -> Counter[str]:
    """Who answers at the second port."""
    found: Counter[str] = Counter()
    for _ in range(count):
        connection = Connection(topology.client, topology.node.address, SECOND)
        connection.echo(10)
        connection.close()
        found[connection.backend] += 1
    return found


def takers(topology: Topology, port: int) -> set[str]:
    """Who gets flows at a published port, as the daemon shows it."""
    state = topology.daemon.state()
    (front,) = (f for s in state["services"] for f in s["frontends"] if f["frontend"] == f"*:{port}/tcp")
    return {target["name"] for target in front["targets"] if target["weight"]}


def test_flows_go_to_the_ports_that_are_open(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=3)
    served = {name: serve(topology.hosts[name].namespace, name, TARGET) for name in ("b1", "b2")}
    ports = (f"{WEB}:{HTTP_PORT}/tcp", f"{SECOND}:{TARGET}/tcp")
    topology.serve(Spec("web", ports, tuple(topology.hosts), options=dict(HEALTH)))
    wait_for(lambda: takers(topology, SECOND) == {"b1", "b2"}, "b3 left out at the second port")
    assert takers(topology, WEB) == {"b1", "b2", "b3"}
    assert set(who(topology)) == {"b1", "b2"}
    topology.lab.on_close(serve(topology.hosts["b3"].namespace, "b3", TARGET).kill)  # it opens late
    wait_for(lambda: takers(topology, SECOND) == {"b1", "b2", "b3"}, "b3 let in")
    assert set(who(topology)) == {"b1", "b2", "b3"}
    kept = Connection(topology.client, topology.node.address, SECOND)
    while kept.backend != "b2":
        kept = Connection(topology.client, topology.node.address, SECOND)
    served["b1"].kill()  # it dies alone
    wait_for(lambda: takers(topology, SECOND) == {"b2", "b3"}, "b1 left out at the second port")
    assert takers(topology, WEB) == {"b1", "b2", "b3"}
    assert set(who(topology)) == {"b2", "b3"}
    kept.echo()
    kept.close()
    served["b2"].kill()
