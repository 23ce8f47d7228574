# SPDX-License-Identifier: Apache-2.0
"""Runs inside the guest: one node with the kernel engine, met by untagged and by tagged frames, over veths and over
network cards. test_stock_kernel starts it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines import kernel_proofs
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, Connection, Plane, refused
from tests.guest import cards
from tests.guest.cards import Way
from tests.support.lab.netns import Lab
from tests.support.polling import wait_for

LARGE = 1 << 20
NAMES = ("b1", "b2", "b3")


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    """Client and node are joined by veths and, as `card0`, by network cards with native XDP; the node's `old0` has a
    driver without it."""
    with Lab() as lab:
        plane = Plane(lab)
        for namespace in (plane.client, plane.node):
            cards.take_card(namespace, "virtio_net", "card0")
        cards.take_card(plane.node, "e1000", "old0")
        for number in range(1, 4):
            plane.node.run("ethtool", "-K", f"veth{number}", "tx", "off")  # receivers verify each checksum
        plane.node.run("ethtool", "-K", "eth0", "tx", "off")
        yield plane


@pytest.fixture(scope="module")
def started(plane: Plane) -> Iterator[Driver]:
    driver = plane.driver()
    assert driver.preflight() is None
    driver.open()
    yield driver
    driver.close(release=True)
    driver.end()


@pytest.fixture
def engine(plane: Plane, started: Driver) -> Driver:
    started.serve(services=[plane.web(*NAMES)])
    return started


@pytest.fixture
def served(plane: Plane, started: Driver) -> Driver:
    """With TCP and UDP."""
    started.serve(services=[plane.web(*NAMES), plane.web(*NAMES, protocol="udp")])
    return started


def test_every_backend_answers_and_sees_the_clients_address(plane: Plane, engine: Driver) -> None:
    kernel_proofs.every_backend_answers_and_sees_the_clients_address(plane, engine)


def test_udp(plane: Plane, engine: Driver) -> None:
    kernel_proofs.datagrams_are_spread(plane, engine)


def test_processes_of_the_node_are_connected_straight(plane: Plane, engine: Driver) -> None:
    kernel_proofs.processes_of_the_node_are_connected_straight(plane, engine)


def counted(engine: Driver, what: str = "opened") -> dict[str, int]:
    """A counter by protocol."""
    return {name.rpartition("/")[2]: front[what] for name, front in engine.stats()["frontends"].items()}


def meets(plane: Plane, engine: Driver, way: Way) -> float:
    """All that a client has of a service over this way: much data in both directions, datagrams, refusals; each flow is
    counted once, so no packet is served twice. Returns the mean length of the client's TCP packets, in bytes."""
    for address in (way.node, way.node6):  # by the programs, and by the fallback proxy: each learns of addresses itself
        wait_for(lambda there=address: not refused(plane.client, there), f"{address} is served")
    before, all_before = counted(engine), engine.stats()
    length, packets = (counted(engine, what)["tcp"] for what in ("bytes_in", "packets_in"))
    for _ in range(4):
        connection = Connection(plane.client, way.node)
        assert connection.seen == way.client
        cards.transfer(connection, LARGE // 4)
        connection.close()
        assert cards.datagram(plane.client, way.node, PORT, 1400).split()[1] == way.client
    length, packets = (
        counted(engine, what)["tcp"] - was for what, was in (("bytes_in", length), ("packets_in", packets))
    )
    connection = Connection(plane.client, way.node6)  # of an IPv4-only task: through the fallback proxy
    connection.echo()
    connection.close()
    engine.serve(services=[plane.web(), plane.web(*NAMES, protocol="udp")])
    with pytest.raises(ConnectionRefusedError):
        Connection(plane.client, way.node)
    found = {name: count - before[name] for name, count in counted(engine).items()}
    assert found == {"tcp": 5, "udp": 4}, (all_before, engine.stats())
    assert engine.stats()["verdicts"]["error"] == 0
    return length / packets


# ---- tagged frames ----


@pytest.mark.parametrize("where", ["beside", "within"])
def test_a_vlan_over_veths(plane: Plane, served: Driver, where: str) -> None:
    """The tag lies beside the packet, as cards leave it that take it off, or within the frame."""
    devices = [cards.vlan(namespace, "eth0", 5) for namespace in (plane.client, plane.node)]
    try:
        for namespace, lower in ((plane.client, "eth0"), (plane.lab.switch, "p12")):
            namespace.run("ethtool", "-K", lower, "txvlan", "on" if where == "beside" else "off")
        mean = meets(plane, served, cards.address(plane.client, devices[0], plane.node, devices[1]))
        assert mean > 1500  # bare acknowledgements among them: data came in segments larger than the wire's frames
    finally:
        plane.client.ip("link", "del", devices[0])
        plane.node.ip("link", "del", devices[1])


def test_a_vlan_in_a_vlan(plane: Plane, served: Driver) -> None:
    devices = []
    for namespace in (plane.client, plane.node):
        outer = cards.vlan(namespace, "eth0", 6, "802.1ad")
        devices.append(cards.vlan(namespace, outer, 7))
    meets(plane, served, cards.address(plane.client, devices[0], plane.node, devices[1]))


def test_a_vlan_that_is_a_port_of_a_bridge(plane: Plane, served: Driver) -> None:
    device, port = (cards.vlan(namespace, "eth0", 8) for namespace in (plane.client, plane.node))
    plane.node.bridge("lan8")
    plane.node.ip("link", "set", port, "master", "lan8")
    meets(plane, served, cards.address(plane.client, device, plane.node, "lan8"))


def test_a_bridge_that_knows_vlans(plane: Plane, served: Driver) -> None:
    """Its port is a card, which takes no tags off."""
    device = cards.vlan(plane.client, "card0", 9)
    plane.node.ip("link", "add", "lan9", "type", "bridge", "forward_delay", "0", "vlan_filtering", "1")
    plane.node.ip("link", "set", "lan9", "up")
    plane.node.ip("link", "set", "card0", "master", "lan9")
    for port, own in (("card0", "master"), ("lan9", "self")):
        plane.node.run("bridge", "vlan", "add", "vid", "9", "dev", port, own)
    upper = cards.vlan(plane.node, "lan9", 9)
    try:
        meets(plane, served, cards.address(plane.client, device, plane.node, upper))
    finally:
        plane.node.ip("link", "del", "lan9")
        plane.client.ip("link", "del", device)


def test_priority_tags_are_no_tags(plane: Plane, served: Driver) -> None:
    plane.client.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    tag = ["matchall", "action", "vlan", "push", "id", "0", "priority", "5"]
    plane.client.run("tc", "filter", "add", "dev", "eth0", "egress", "protocol", "all", *tag)
    try:
        meets(plane, served, cards.address(plane.client, "eth0", plane.node, "eth0"))
    finally:
        plane.client.run("tc", "qdisc", "del", "dev", "eth0", "clsact")


def test_frames_of_a_vlan_that_the_node_has_not_are_left_alone(plane: Plane, served: Driver) -> None:
    """The engine is on the interface below, which is not where they belong."""
    device = cards.vlan(plane.client, "eth0", 10)
    plane.client.ip("addr", "add", "198.51.100.9/28", "dev", device)
    plane.client.ip("neigh", "add", "198.51.100.1", "lladdr", cards.mac(plane.node, "eth0"), "dev", device)
    plane.node.ip("addr", "add", "198.51.100.1/32", "dev", "lo")
    before = served.stats()["verdicts"]
    assert refused(plane.client, "198.51.100.1")
    assert served.stats()["verdicts"] == before
    plane.client.ip("link", "del", device)


def test_a_vlan_that_leaves_its_tags_in_frames_is_named(plane: Plane, served: Driver) -> None:
    device, odd = (cards.vlan(namespace, "eth0", 12) for namespace in (plane.client, plane.node))
    way = cards.address(plane.client, device, plane.node, odd)
    wait_for(lambda: not refused(plane.client, way.node), "the new address is served")
    plane.node.ip("link", "set", odd, "type", "vlan", "reorder_hdr", "off")
    (line,) = wait_for(served.problems, "a problem")
    assert line.startswith(f"interface {odd} is not served: ")
    assert refused(plane.client, way.node)
    plane.node.ip("link", "set", odd, "type", "vlan", "reorder_hdr", "on")
    wait_for(lambda: not served.problems(), "no problem")
    Connection(plane.client, way.node).close()
    plane.node.ip("link", "del", odd)


# ---- XDP on a card ----


@pytest.fixture(scope="module")
def staged(plane: Plane, started: Driver) -> Driver:
    """The next process' engine, with the XDP stage."""
    started.again(xdp="on")
    return started


@pytest.fixture(scope="module")
def wire(plane: Plane) -> Way:
    return cards.address(plane.client, "card0", plane.node, "card0")


def deny(plane: Plane, engine: Driver, *sources: str) -> None:
    options = {"deny": [f"{source}/{128 if ':' in source else 32}" for source in sources]}
    engine.serve(
        services=[plane.web(*NAMES, options=options), plane.web(*NAMES, protocol="udp", options=options)],
    )


def test_native_or_not_at_all(plane: Plane, staged: Driver, wire: Way) -> None:
    """By a driver that can: native. By one that cannot, and on veths: nothing, and one line says why."""
    deny(plane, staged)
    assert {device: cards.xdp(plane.node, device) for device in ("card0", "old0", "eth0")} == {
        "card0": "xdp",
        "old0": "",
        "eth0": "",
    }
    shown = plane.node.run("bpftool", "net").stdout.partition("tc:")[0]
    assert "card0" in shown and "driver" in shown and "generic" not in shown
    lines = {line.split()[1]: line for line in staged.problems()}
    assert set(lines) == {"old0", "eth0"}
    assert "its driver has no native XDP, and generic mode is refused" in lines["old0"]
    assert "it is a veth" in lines["eth0"]
    meets(plane, staged, wire)
    assert cards.dropped_by_driver(plane.node, "card0") == 0


def test_denied_sources_are_dropped_by_the_driver(plane: Plane, staged: Driver, wire: Way) -> None:
    deny(plane, staged)
    kept = Connection(plane.client, wire.node)
    deny(plane, staged, "198.51.100.77", wire.client6)
    kept.echo(LARGE // 16)
    before, verdicts = cards.dropped_by_driver(plane.node, "card0"), staged.stats()["verdicts"]
    assert refused(plane.client, wire.node6)
    dropped = cards.dropped_by_driver(plane.node, "card0") - before
    assert dropped > 0
    now = staged.stats()["verdicts"]
    assert now["denied"] - verdicts["denied"] == dropped
    kept.echo()
    deny(plane, staged, wire.client)
    kept.socket.settimeout(1)
    with pytest.raises(TimeoutError):
        kept.echo()
    deny(plane, staged)
    Connection(plane.client, wire.node).close()


def test_hostile_frames_do_no_harm(plane: Plane, staged: Driver, wire: Way) -> None:
    """Of denied sources: what is whole is dropped, what is not is left to the stages behind."""
    from tests.guest.hostile import broken, whole

    macs = cards.mac(plane.client, "card0"), cards.mac(plane.node, "card0")
    source = "198.51.100.77"
    deny(plane, staged, source, "2001:db8:77::1")
    good, bad = whole(*macs, source, wire.node, wire.node6, PORT), broken(*macs, source, wire.node, wire.node6, PORT)
    before = cards.dropped_by_driver(plane.node, "card0")
    cards.send_frames(plane.client, "card0", good)
    wait_for(lambda: cards.dropped_by_driver(plane.node, "card0") == before + len(good), "all whole ones dropped")
    cards.send_frames(plane.client, "card0", bad)
    connection = Connection(plane.client, wire.node)  # behind them on the wire
    cards.transfer(connection, LARGE // 4)
    connection.close()
    assert cards.dropped_by_driver(plane.node, "card0") == before + len(good)


def test_tagged_frames_pass_the_stage(plane: Plane, staged: Driver) -> None:
    """They are served, and denied, at the VLAN's interface."""
    devices = [cards.vlan(namespace, "card0", 11) for namespace in (plane.client, plane.node)]
    way = cards.address(plane.client, devices[0], plane.node, devices[1])
    deny(plane, staged)
    meets(plane, staged, way)
    deny(plane, staged, way.client)
    before, verdicts = cards.dropped_by_driver(plane.node, "card0"), staged.stats()["verdicts"]["denied"]
    assert refused(plane.client, way.node)
    assert staged.stats()["verdicts"]["denied"] > verdicts
    assert cards.dropped_by_driver(plane.node, "card0") == before


def test_taken_off_as_it_was_put_on(plane: Plane, staged: Driver, wire: Way) -> None:
    deny(plane, staged)
    connection = Connection(plane.client, wire.node)
    staged.again(xdp="off")
    deny(plane, staged)
    assert cards.xdp(plane.node, "card0") == ""
    assert staged.problems() == []
    cards.transfer(connection, LARGE // 4)
    deny(plane, staged, wire.client)
    before = staged.stats()["verdicts"]["denied"]
    assert refused(plane.client, wire.node)
    assert staged.stats()["verdicts"]["denied"] > before
