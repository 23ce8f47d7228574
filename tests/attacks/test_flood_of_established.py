# SPDX-License-Identifier: Apache-2.0
"""A flood from invented addresses pushes the entries of established, silent connections out of the tables (item 7).

Bare ACKs did, at 48-94 kpps for 20 s with the default sizes. Here the tables are small, so that a short flood turns
them over ten times.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP
from scapy.packet import Packet

from tests.engines.kernel_plane import PORT, TARGET, Plane
from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SOURCE = Path(__file__).parents[2] / "bench" / "load" / "flood.c"
KINDS = ("syn", "ack", "fin", "rst", "pair", "acks", "udp")
TABLE, CONNECTIONS = 1024, 20
NETWORK = "198.18.0.0"
LISTENER = 9000
SO_RCVBUFFORCE = 33  # socket(7); not in the socket module


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("flood") / "flood"
    subprocess.run(["gcc", "-O2", "-std=gnu11", "-o", built, SOURCE], check=True)
    return built


def flood(program: Path, attacker: Namespace, target: str, kind: str, packets: int) -> None:
    """At least so many packets of a kind, at 40,000 a second."""
    seconds, sent = max(0.05, packets / 40_000), 0
    while sent < packets:  # a busy machine sends fewer in that time
        done = attacker.run(str(program), NETWORK, target, str(PORT), "40000", str(seconds), kind)
        sent = json.loads(done.stdout)["sent"]
        seconds *= 2


@pytest.fixture
def connections(plane: Plane) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Both ends of established connections: (client, task)."""
    task = plane.namespaces["b1"]
    with task.entered():
        listener = socket.create_server(("0.0.0.0", LISTENER), backlog=128)
    engine = plane.driver(max_replies=TABLE, flow_cache=TABLE)
    engine.open()
    web = {"name": "web", "published": PORT, "backends": {"b1": [task.address, LISTENER, 1]}}
    dns = plane.web("b2", protocol="udp") | {"name": "dns"}
    engine.serve(services=[web, dns])
    ends = []
    with listener, plane.client.entered():
        for _ in range(CONNECTIONS):
            client = socket.create_connection((plane.node.address, PORT), timeout=PATIENCE)
            ends.append((client, listener.accept()[0]))
        yield ends
        for pair in ends:
            for end in pair:
                end.close()
    engine.close(release=True)
    engine.end()


def lost(ends: list[tuple[socket.socket, socket.socket]]) -> int:
    """How many of the clients do not get what their task says first."""
    for _, task in ends:
        task.send(b"x")
    found = 0
    for client, _ in ends:
        client.settimeout(1)
        try:
            found += client.recv(1) != b"x"
        except OSError:
            found += 1
    return found


def test_silent_connections_outlive_every_flood(
    plane: Plane, program: Path, connections: list[tuple[socket.socket, socket.socket]]
) -> None:
    attacker = plane.lab.host("attacker")
    assert lost(connections) == 0
    for kind in KINDS:
        flood(program, attacker, plane.node.address, kind, 12 * TABLE)
        assert (kind, lost(connections)) == (kind, 0)


def sniffed(node: Namespace) -> socket.socket:
    with node.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL: before the programs
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)  # it sees every packet several times
    sock.settimeout(PATIENCE)
    return sock


def captured(sock: socket.socket, count: int, target: str) -> list[bytes]:
    """The flood's first packets, as they arrive: on their way to the task, some are seen again."""
    called = socket.inet_aton(target)
    found: list[bytes] = []
    end = time.monotonic() + PATIENCE
    while len(found) < count:
        assert time.monotonic() < end, f"{len(found)} packets"
        data = sock.recv(100)
        if data[0] == 0x45 and data[12:14] == bytes([198, 18]) and data[16:20] == called:
            found.append(data)
    return found


def summed_anew(raw: bytes) -> Packet:
    packet = IP(raw)
    for layer in (packet, packet.payload):
        del layer.chksum
    return IP(bytes(packet))


def test_the_flood_is_one(plane: Plane, program: Path) -> None:
    """Its checksums are right, so that it reaches a listen queue; those of two packets have one source."""
    attacker = plane.lab.host("attacker")
    task = plane.namespaces["b1"]
    engine = plane.driver()
    engine.open()
    engine.serve(services=[plane.web("b1"), plane.web("b1", protocol="udp") | {"name": "dns"}])
    for kind in KINDS:
        with sniffed(plane.node) as sock:
            flood(program, attacker, plane.node.address, kind, 64)
            found = captured(sock, 64, plane.node.address)
        for raw in found:
            assert bytes(summed_anew(raw))[:40] == raw[:40], kind
        sources = [raw[12:16] + raw[20:22] for raw in found]
        assert (sources[0] == sources[1]) == (kind in ("pair", "acks", "udp"))
    flood(program, attacker, plane.node.address, "syn", 64)
    query = ("ss", "-Htn", "state", "syn-recv", "sport", f":{TARGET}")
    wait_for(lambda: task.run(*query).stdout.strip() != "")
    errors = [row.split() for row in task.run("cat", "/proc/net/snmp").stdout.splitlines() if row.startswith("Tcp:")]
    assert dict(zip(*errors, strict=True))["InCsumErrors"] == "0"
    engine.close(release=True)
    engine.end()
