# SPDX-License-Identifier: Apache-2.0
"""UDP senders that never pause, with a fixed port: they reach a service that begins after them, and whoever has the
port when it is released. Connection tracking remembers them meanwhile."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mesh.datapath.conntrack import Conntrack
from tests.engines.kernel_plane import TARGET, Plane
from tests.engines.proxied import open_engine
from tests.support.callers import Sender
from tests.support.fastpath_bench import Served, UdpServer, udp
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import wait_for

pytestmark = pytest.mark.root

PORT = 5353
TRACK = "table ip t { chain c { type filter hook input priority 0; ct state new counter; }; }\n"
TRACK += "table ip6 t { chain c { type filter hook input priority 0; ct state new counter; }; }"


@pytest.fixture
def node(lab: Lab) -> Namespace:
    made = lab.host("node")
    made.run("nft", "-f", "-", input=TRACK)  # as every Docker host: flows are tracked
    return made


@pytest.fixture
def outside(lab: Lab, node: Namespace) -> Namespace:
    return lab.host("client")


@contextlib.contextmanager
def senders(node: Namespace, outside: Namespace) -> Iterator[list[Sender]]:
    """Over IPv4 and IPv6, from outside and from the node itself."""
    made = [Sender(outside, node.address, PORT), Sender(outside, node.address6, PORT)]
    try:
        yield made
    finally:
        for sender in made:
            sender.close()


def forgotten(mesh: Served) -> int:
    return mesh.datapath.stats().totals["udp_forgotten"]


def answered(made: list[Sender], by: bytes) -> None:
    for sender in made:
        sender.last = b""
    started = time.monotonic()
    wait_for(lambda: all(sender.last.startswith(by) for sender in made), f"answered by {by.decode()}")
    assert time.monotonic() - started < 5 + 5  # five are promised, and the machine may be busy


def test_a_sender_from_before_the_service_is_served(node: Namespace, outside: Namespace) -> None:
    front = udp(PORT)
    with senders(node, outside) as made, open_engine(node, intercept="nft") as mesh:
        conntrack = Conntrack()
        wait_for(lambda: len(conntrack.of(front)) >= 2, "tracked")
        mesh.serve({front: {"a": UdpServer("mesh").where}})
        answered(made, b"mesh")
        assert forgotten(mesh) >= 2
        count = forgotten(mesh)
        mesh.serve({})  # and again
        assert forgotten(mesh) > count  # those that were led to us
        assert not [entry for entry in conntrack.of(front) if entry.answered]
        mesh.serve({front: {"b": UdpServer("anew").where}})
        answered(made, b"anew")
        conntrack.close()


def test_a_released_port_is_its_next_owners(node: Namespace, outside: Namespace) -> None:
    front = udp(PORT)
    with node.entered():
        other = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        other.bind(("::", PORT))
    other.settimeout(0.2)
    with senders(node, outside) as made:
        with open_engine(node, intercept="nft") as mesh:
            mesh.serve({front: {"a": UdpServer("mesh").where}})
            answered(made, b"mesh")
            assert mesh.datapath.problems() == ()
        with other:
            heard: set[str] = set()

            def both() -> bool:
                with contextlib.suppress(TimeoutError):
                    heard.add(other.recvfrom(100)[1][0])
                return len(heard) == 2

            for _ in range(1000):  # what was queued before
                with contextlib.suppress(BlockingIOError):
                    other.recv(100, socket.MSG_DONTWAIT)
            wait_for(both, "datagrams of both senders")


def test_a_flow_that_is_answered_stays_where_it_is(node: Namespace, outside: Namespace) -> None:
    """Whoever had the port before goes on with the flows that it has."""
    with node.entered():
        rival = UdpServer("rival", "0.0.0.0")
    rules = "table inet rival {\n chain p {\n type nat hook prerouting priority -100;\n"
    rules += f" udp dport {PORT} dnat ip to {node.address}:{rival.where[1]}\n }}\n}}\n"
    node.run("nft", "-f", "-", input=rules)
    sender = Sender(outside, node.address, PORT)
    try:
        wait_for(lambda: sender.last.startswith(b"rival"), "answered by the rival")
        with open_engine(node, intercept="nft") as mesh:
            mesh.serve({udp(PORT): {"a": UdpServer("mesh").where}})
            time.sleep(2.5)  # longer than unanswered flows are waited for
            sender.last = b""
            wait_for(lambda: sender.last)
            assert sender.last.startswith(b"rival")
            assert forgotten(mesh) == 0
    finally:
        sender.close()


@pytest.mark.bpf
def test_the_kernel_engine_takes_over_what_nobody_answers(plane: Plane) -> None:
    """A socket of the node has the port, as dockerd's has, so that senders may be served and keep their place: one
    whose flow is answered does, the other is taken over."""
    plane.node.run("nft", "-f", "-", input=TRACK)
    with plane.node.entered():
        holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        holder.bind(("0.0.0.0", PORT))
    silent, answered_ = (Sender(plane.client, plane.node.address, PORT, source) for source in (40000, 40007))
    ended = threading.Event()

    def answer() -> None:
        holder.settimeout(0.1)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, source = holder.recvfrom(100)
                if source[1] == 40007:
                    holder.sendto(b"holder:" + data, source)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        wait_for(lambda: answered_.last.startswith(b"holder"), "answered by the holder")
        engine = plane.driver()
        engine.open()
        backends = {"b1": [plane.namespaces["b1"].address, TARGET, 1]}
        engine.serve(services=[{"name": "dns", "published": PORT, "protocol": "udp", "backends": backends}])
        answered([silent], b"b1")
        answered_.last = b""
        wait_for(lambda: answered_.last)
        assert answered_.last.startswith(b"holder")
        engine.close(release=True)
    finally:
        ended.set()
        thread.join()
        silent.close()
        answered_.close()
        holder.close()


def test_other_peoples_flows_are_left_alone(node: Namespace) -> None:
    """To other addresses, which this host only forwards to, and to other ports."""
    conntrack = Conntrack()
    front = udp(PORT, "192.0.2.222")
    assert conntrack.of(front) == []
    assert ipaddress.ip_address("192.0.2.222") == front.address
    conntrack.close()
