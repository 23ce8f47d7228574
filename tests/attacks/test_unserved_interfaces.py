# SPDX-License-Identifier: Apache-2.0
"""A denied client comes by a tun device (as WireGuard, PPP), or by an interface that `interfaces` leaves out (item 5).

Neither was filtered, and nothing said so: Docker's own mesh answered. Here a DNAT rule stands for Docker's mesh.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.kernel_plane import PORT, TARGET, Connection, Plane, datagram, refused
from tests.support.lab.netns import Namespace
from tests.support.lab.tun import tun, wire

pytestmark = [pytest.mark.root, pytest.mark.bpf]

HERE, ROAD, OTHER = "10.8.0.1", "10.8.0.2", "10.8.0.3"


@pytest.fixture
def road(plane: Plane) -> Iterator[Namespace]:
    """A client behind a tun device of the node; b2 stands for what Docker's mesh would reach."""
    namespace = plane.lab.namespace("road")
    namespace.ip("link", "set", "lo", "up")
    to = plane.namespaces["b2"].address
    for rule in (
        "add table ip docker",
        "add chain ip docker pre { type nat hook prerouting priority dstnat; }",
        f"add rule ip docker pre tcp dport {PORT} dnat to {to}:{TARGET}",
        f"add rule ip docker pre udp dport {PORT} dnat to {to}:{TARGET}",
    ):
        plane.node.run("nft", rule)
    with wire(tun(plane.node, HERE), tun(namespace, ROAD, OTHER)):
        namespace.ip("route", "add", "default", "dev", "tun0")
        yield namespace


def services(plane: Plane, **options: object) -> list[dict[str, object]]:
    return [
        plane.web("b1", options=options),
        plane.web("b1", protocol="udp", options=options) | {"name": "dns"},
    ]


def test_clients_without_ethernet_are_served_and_filtered(plane: Plane, road: Namespace) -> None:
    engine = plane.driver()
    engine.open()
    engine.serve(services=services(plane))
    for address in (HERE, plane.node.address):
        connection = Connection(road, address)
        assert (connection.backend, connection.seen) == ("b1", ROAD)
        connection.echo(200_000)
        connection.close()
        assert datagram(road, address) == f"b1 {ROAD}"
    engine.serve(services=services(plane, deny=[f"{ROAD}/32"]))
    assert refused(road, HERE)
    assert refused(road, plane.node.address)
    engine.serve(services=services(plane, deny=[f"{OTHER}/32"]))
    assert Connection(road, HERE).backend == "b1"
    engine.serve(services=[plane.web()])  # no backend: a reset, which needs a way back without Ethernet, too
    assert refused(road, HERE)
    assert engine.problems() == []
    engine.close(release=True)
    engine.end()


@pytest.mark.parametrize("left_out", ["tun0", "eth0"])
def test_source_rules_hold_where_nothing_is_served(plane: Plane, road: Namespace, left_out: str) -> None:
    """Allowed clients get what they had without mesh; denied ones get nothing."""
    client, address = {"tun0": (road, HERE), "eth0": (plane.client, plane.node.address)}[left_out]
    engine = plane.driver(interfaces={"tun0": "eth0", "eth0": "tun0"}[left_out])
    engine.open()
    engine.serve(services=services(plane))
    assert engine.problems() == []
    assert Connection(client, address).backend == "b2"
    source = ROAD if left_out == "tun0" else plane.client.address
    engine.serve(services=services(plane, deny=[f"{source}/32"]))
    assert refused(client, address)
    assert f"interface {left_out} is left out by `interfaces`" in "".join(engine.problems())
    engine.serve(services=services(plane, deny=[f"{OTHER}/32"]))
    assert Connection(client, address).backend == "b2"
    engine.close(release=True)
    engine.end()
