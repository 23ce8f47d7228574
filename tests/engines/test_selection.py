# SPDX-License-Identifier: Apache-2.0
"""Each connection reaches the very backend that the oracle names, and every backend gets its share."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter

import pytest

from tests.engines.topology import UDP, WEB, Topology
from tests.support import peers
from tests.support.polling import PATIENCE, wait_for

pytestmark = pytest.mark.root

FIRST_PORT, COUNT = 20000, 2000


def destination(topology: Topology, family: int) -> tuple[str, str]:
    """The client's and the node's address."""
    hosts = topology.client, topology.node
    return tuple(host.address if family == 4 else host.address6 for host in hosts)  # type: ignore[return-value]


@pytest.mark.parametrize("family", [4, 6])
def test_every_port_reaches_the_predicted_backend(topology: Topology, family: int) -> None:
    source, node = destination(topology, family)
    options = ("-n", str(COUNT), "-c", "32", "-p", str(FIRST_PORT), "-b", source, "-v")
    report = peers.load(topology.client, node, WEB, *options)
    assert (report.ok, report.failures) == (COUNT, ())
    web = topology.default()[0]
    wrong = [
        (port, name, expected)
        for port, name in report.seen
        if name != (expected := topology.predict(web, source, port, node, WEB)[0])
    ]
    assert not wrong, f"{len(wrong)} of {COUNT} elsewhere, first {wrong[:3]}"
    assert set(report.identities) == set(topology.hosts)
    assert all(abs(n - COUNT / 4) < COUNT / 16 for n in report.identities.values()), report.identities


def test_weights_are_shares_and_zero_is_none(topology: Topology) -> None:
    specs = topology.default(weights={"b1": 3, "b4": 0})
    topology.change(*specs)
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "2000", "-c", "32", "-p", "23000", "-v")
    assert report.ok == 2000
    for port, name in report.seen:
        assert name == topology.predict(specs[0], topology.client.address, port, topology.node.address, WEB)[0]
    assert report.identities["b1"] == pytest.approx(1200, rel=0.15)
    assert "b4" not in report.identities


def test_client_affinity(topology: Topology) -> None:
    web, *others = topology.default()
    web.options["affinity"] = "client-ip"
    topology.change(web, *others)
    for number in range(200, 206):
        source = f"192.0.2.{number}"
        topology.client.add_address("eth0", f"{source}/24")
        report = peers.load(topology.client, topology.node.address, WEB, "-n", "60", "-c", "8", "-b", source)
        assert report.identities == {topology.predict(web, source, 0, topology.node.address, WEB)[0]: 60}


@pytest.mark.parametrize("family", [4, 6])
def test_udp_reaches_the_predicted_backend_and_answers_from_the_called_address(topology: Topology, family: int) -> None:
    source, node = destination(topology, family)
    udp = topology.default()[2]
    answers: Counter[str] = Counter()
    for port in range(30000, 30200):
        with topology.client.entered():
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(PATIENCE)
            sock.bind((source, port))
            for n in range(3):
                sock.sendto(b"payload %d" % n, (node, UDP))
                data, sender = sock.recvfrom(2048)
                name, _, payload = data.partition(b" ")
                assert sender[:2] == (node, UDP)
                assert payload == b"payload %d" % n
                assert name.decode() == topology.predict(udp, source, port, node, UDP, 17)[0]
                answers[name.decode()] += 1
    assert set(answers) == set(topology.hosts)


def test_second_address_of_the_node(topology: Topology) -> None:
    """A UDP reply leaves from the address that was called, not from the node's first one; TCP hashes it."""
    topology.node.add_address("eth0", "192.0.2.250/24")
    with topology.client.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(0.2)

        def answered() -> bool:  # the kernel engine hears of a new address a moment after the node has it
            sock.sendto(b"x", ("192.0.2.250", UDP))
            with contextlib.suppress(TimeoutError):
                return bool(sock.recvfrom(2048)[1] == ("192.0.2.250", UDP))
            return False

        wait_for(answered, "a datagram back from the second address")
    report = peers.load(topology.client, "192.0.2.250", WEB, "-n", "100", "-c", "8", "-p", "26000", "-v")
    web = topology.default()[0]
    for port, name in report.seen:
        assert name == topology.predict(web, topology.client.address, port, "192.0.2.250", WEB)[0]
