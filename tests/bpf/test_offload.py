# SPDX-License-Identifier: Apache-2.0
"""Real interfaces: checksums left to offload and segments larger than the wire, which a test run cannot make.

client -- node -- task in namespaces. The clients' and the task's packets reach the programs as CHECKSUM_PARTIAL and
GSO; the node's sides of the wires compute checksums in software, so that the receivers verify each of them.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from mesh import _bpf
from tests.bpf.plane import TCP, UDP, Plane
from tests.bpf.wires import allow_big, bulk, inside, largest_frames, sh
from tests.support.polling import PATIENCE

pytestmark = [pytest.mark.root, pytest.mark.bpf]

CLIENT4, NODE4, GATEWAY4, TASK4 = "192.0.2.9", "192.0.2.1", "172.18.0.1", "172.18.0.3"
CLIENT6, NODE6, GATEWAY6, TASK6 = "2001:db8::9", "2001:db8::1", "fd00:18::1", "fd00:18::3"


@dataclass
class Wires:
    client: str
    node: str
    task: str
    outer: int  # the node's interface towards the client
    inner: int  # towards the task
    plane: Plane


def wire(left: str, right: str, name: str, addresses: tuple[str, str, str, str]) -> int:
    """A veth between two namespaces; returns the right end's index. The right end's checksums are in software."""
    sh(f"ip -n {right} link add {name} type veth peer name wan netns {left}")
    for ns, device, v4, v6 in ((left, "wan", *addresses[:2]), (right, name, *addresses[2:])):
        sh(f"ip -n {ns} addr add {v4}/24 dev {device}")
        sh(f"ip -n {ns} -6 addr add {v6}/64 dev {device} nodad")
        sh(f"ip -n {ns} link set {device} up")
    sh(f"ip netns exec {right} ethtool -K {name} tx off")
    return int(sh(f"ip -n {right} -o link show {name}").split(":")[0])


@pytest.fixture
def wires() -> Iterator[Wires]:
    names = [f"mesh{os.getpid()}-off-{end}" for end in ("c", "n", "t")]
    client, node, task = names
    try:
        for name in names:
            sh(f"ip netns add {name}")
            sh(f"ip -n {name} link set lo up")
        outer = wire(client, node, "outer", (CLIENT4, CLIENT6, NODE4, NODE6))
        inner = wire(task, node, "inner", (TASK4, TASK6, GATEWAY4, GATEWAY6))
        for ns, four, six in ((client, NODE4, NODE6), (task, GATEWAY4, GATEWAY6)):
            sh(f"ip -n {ns} route add default via {four}")
            sh(f"ip -n {ns} -6 route add default via {six}")
        plane = Plane.fresh()
        plane.local(NODE4, NODE6)
        with inside(node):
            assert _bpf.tc_attach(plane.programs["mesh_ingress"], outer, True, 1, 1) is not None
            assert _bpf.tc_attach(plane.programs["mesh_task"], inner, True, 1, 1) is not None
        yield Wires(client, node, task, outer, inner, plane)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


FAMILIES = [pytest.param(socket.AF_INET, NODE4, TASK4, id="v4"), pytest.param(socket.AF_INET6, NODE6, TASK6, id="v6")]


@pytest.mark.parametrize(("family", "node", "task"), FAMILIES)
@pytest.mark.parametrize(("port", "peer"), [(80, True), (8080, True), (80, False)], ids=["port", "same-port", "bridge"])
def test_bulk_both_ways(
    wires: Wires, family: socket.AddressFamily, node: str, task: str, port: int, peer: bool
) -> None:
    wires.plane.backend(2, task, 8080, ifindex=wires.inner if peer else 0, bridge=wires.inner)
    wires.plane.frontend(1, port, [(2, 2)])
    assert family
    seen = bulk(wires.client, (node, port), wires.task, size=3 << 20)
    assert seen == (CLIENT6 if ":" in node else CLIENT4)
    assert wires.plane.verdicts()["REPLY"] > 10


@pytest.mark.parametrize(("family", "node", "task"), FAMILIES)
def test_segments_of_more_than_64_kib(wires: Wires, family: socket.AddressFamily, node: str, task: str) -> None:
    assert family
    for namespace in (wires.client, wires.task):
        allow_big(namespace, "wan")
    wires.plane.backend(2, task, 8080, ifindex=wires.inner)
    wires.plane.frontend(1, 80, [(2, 2)])
    with largest_frames(wires.node) as largest:
        assert bulk(wires.client, (node, 80), wires.task, size=8 << 20) == (CLIENT6 if ":" in node else CLIENT4)
    assert min(largest["outer"], largest["inner"]) > 65549


@pytest.mark.parametrize(("family", "node", "task"), FAMILIES)
def test_udp_both_ways(wires: Wires, family: socket.AddressFamily, node: str, task: str) -> None:
    wires.plane.backend(2, task, 5353, ifindex=wires.inner)
    wires.plane.frontend(1, 53, [(2, 2)], protocol=UDP)
    with inside(wires.task):
        server = socket.socket(family, socket.SOCK_DGRAM)
        server.bind((task, 5353))
    with inside(wires.client):
        client = socket.socket(family, socket.SOCK_DGRAM)
    with server, client:
        server.settimeout(PATIENCE)
        client.settimeout(PATIENCE)
        for size in (0, 1, 100, 1400):
            client.sendto(bytes(size), (node, 53))
            data, peer = server.recvfrom(2000)
            server.sendto(data[::-1], peer)
            answer, source = client.recvfrom(2000)
            assert (len(answer), source[:2]) == (size, (node, 53))


@pytest.mark.parametrize(("family", "node", "task"), FAMILIES)
def test_refusals_are_believed(wires: Wires, family: socket.AddressFamily, node: str, task: str) -> None:
    """A reset and an ICMP error with a wrong checksum would be ignored."""
    assert task
    wires.plane.frontend(1, 80, [(0, 0)], protocol=TCP)
    wires.plane.frontend(2, 53, [(0, 0)], protocol=UDP)
    with inside(wires.client):
        stream, datagram = socket.socket(family), socket.socket(family, socket.SOCK_DGRAM)
    with stream, datagram:
        stream.settimeout(PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            stream.connect((node, 80))
        datagram.settimeout(PATIENCE)
        datagram.connect((node, 53))
        datagram.send(b"question")
        with pytest.raises(ConnectionRefusedError):
            datagram.recv(100)
    assert wires.plane.verdicts() == {"REJECTED": 2}


@pytest.mark.parametrize(("family", "node", "task"), FAMILIES)
def test_port_unreachable_of_a_task_reaches_the_client(
    wires: Wires, family: socket.AddressFamily, node: str, task: str
) -> None:
    wires.plane.backend(2, task, 5353, ifindex=wires.inner)
    wires.plane.frontend(1, 53, [(2, 2)], protocol=UDP)
    with inside(wires.client):
        client = socket.socket(family, socket.SOCK_DGRAM)
    with client:
        client.settimeout(PATIENCE)
        client.connect((node, 53))
        client.send(b"question")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)
    assert wires.plane.verdicts() == {"FORWARD": 1, "ICMP_OUT": 1}
