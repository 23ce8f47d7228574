# SPDX-License-Identifier: Apache-2.0
"""Backends at addresses of the node itself: the programs leave them to the proxy beside, all else stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.kernel_plane import PORT, Connection, Plane, datagram, serve
from tests.support.lab.netns import Lab

pytestmark = [pytest.mark.root, pytest.mark.bpf]

OWN = 8099


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Lab() as lab:
        plane = Plane(lab, backends=1)
        serve(plane.node, "own", OWN)
        yield plane


@pytest.mark.parametrize("address", ["node", "127.0.0.1"])
def test_backends_of_the_node_itself(plane: Plane, address: str) -> None:
    engine = plane.driver()
    engine.open()
    web = plane.web("b1")
    web["backends"]["own"] = [plane.node.address if address == "node" else address, OWN, 1]
    engine.serve(services=[web])
    assert engine.problems() == []
    connections = [Connection(plane.client, plane.node.address) for _ in range(30)]
    seen = {c.backend: c.seen for c in connections}
    assert set(seen) == {"b1", "own"}
    assert seen["b1"] == plane.client.address
    for where in (plane.node, plane.namespaces["b1"]):
        assert set(plane.calls(30, where)) == {"b1", "own"}
    assert set(plane.calls(30, address=plane.node.address6)) == {"b1", "own"}
    verdicts = engine.stats()["verdicts"]
    assert verdicts["host_backend"] > 0 < verdicts["started"]
    engine.serve(services=[plane.web("b1") | {"backends": web["backends"] | {"own": [*web["backends"]["own"][:2], 0]}}])
    assert set(plane.calls(20)) == {"b1"}
    for connection in connections:  # in the kernel and in the proxy
        connection.echo(20000)
        connection.close()
    engine.close(release=True)


def test_datagrams_for_the_node_itself(plane: Plane) -> None:
    engine = plane.driver()
    engine.open()
    web = plane.web("b1", protocol="udp")
    web["backends"]["own"] = [plane.node.address, OWN, 1]
    engine.serve(services=[web])
    assert {datagram(plane.client, plane.node.address, PORT).split()[0] for _ in range(30)} == {"b1", "own"}
    assert {datagram(plane.node, "127.0.0.1", PORT).split()[0] for _ in range(30)} == {"b1", "own"}
    engine.close(release=True)
