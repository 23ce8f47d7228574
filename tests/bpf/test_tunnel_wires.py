# SPDX-License-Identifier: Apache-2.0
"""The tunnel over real interfaces: client -- near node -- router -- far node -- task, each a namespace.

The client calls the near node, the task is on the far one. The client has a second wire to the far node, for replies
that go straight. The nodes prove, and demand proofs. `between` is the MTU of the router's wire to the far node, which
the nodes need not know.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from mesh import _bpf
from mesh._abi import SETTING_GUARD
from tests.bpf.plane import DIRECT, TCP, UDP, Plane, packed, u32
from tests.bpf.tunnel import KEY, SEED, identity
from tests.bpf.wires import bulk, inside, sh
from tests.support.fragments import Order, cut, last_first, put, raw_socket_here, shuffled, swapped
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

CLIENT: Final = {4: "192.0.2.9", 6: "2001:db8::9"}
NEAR: Final = {4: "192.0.2.1", 6: "2001:db8::1"}  # what the client calls
TASK: Final = {4: "172.18.0.3", 6: "fd00:18::3"}
NODE_A: Final = {4: "10.77.1.1", 6: "fd77:1::1"}  # by which the nodes know each other
NODE_B: Final = {4: "10.77.2.1", 6: "fd77:2::1"}
WIRES: Final = (
    # left end, right end: namespace, device, IPv4, IPv6
    (("c", "wan", CLIENT[4], CLIENT[6]), ("a", "outer", NEAR[4], NEAR[6])),
    (("c", "side", "198.51.100.9", "2001:db8:51::9"), ("b", "outer", "198.51.100.1", "2001:db8:51::1")),
    (("a", "between", NODE_A[4], NODE_A[6]), ("r", "left", "10.77.1.2", "fd77:1::2")),
    (("r", "right", "10.77.2.2", "fd77:2::2"), ("b", "between", NODE_B[4], NODE_B[6])),
    (("b", "inner", "172.18.0.1", "fd00:18::1"), ("t", "wan", TASK[4], TASK[6])),
)
ROUTES: Final = (
    ("a", "10.77.2.0/24", "10.77.1.2", "fd77:2::/64", "fd77:1::2"),
    ("b", "10.77.1.0/24", "10.77.2.2", "fd77:1::/64", "fd77:2::2"),
    ("b", "192.0.2.0/24", "198.51.100.9", "2001:db8::/64", "2001:db8:51::9"),
    ("t", "default", "172.18.0.1", "default", "fd00:18::1"),
)


@dataclass
class Lab:
    """Namespaces by letter, and the two nodes' data planes."""

    names: dict[str, str]
    near: Plane
    far: Plane

    def serve(self, inner: int, outer: int, *, mtu: int = 1500, settings: int = 0, known: bool = True) -> None:
        """One service on TCP and UDP port 80 of the near node, with its one task on the far node.

        Args:
            inner: IP version of the client and the task.
            outer: IP version between the nodes.
            mtu: of the way, as the nodes know it.
            known: the far node knows the task.
        """
        self.near.empty()
        self.far.empty()
        self.near.local(NEAR[inner], NODE_A[outer])
        self.far.local(NODE_B[outer])
        self.far.configure(settings=settings)
        for plane, number, node, own, end in ((self.near, 2, NODE_B, NODE_A, "a"), (self.far, 1, NODE_A, NODE_B, "b")):
            ifindex = self.index(end, "between")
            plane.tunnel(number, node[outer], own[outer], mtu=mtu, ifindex=ifindex, flags=3, keys=(KEY,))
        for owner, protocol in ((2, TCP), (3, UDP)):
            self.near.away(owner, NODE_B[outer], 8080, SEED, protocol=protocol, version=inner)
            self.near.frontend(owner, 80, [(owner, owner)], protocol=protocol)
            if known:
                self.far.backend(owner, TASK[inner], 8080, protocol=protocol, ifindex=self.index("b", "inner"))
                self.far.maps["mesh_ids"].update(identity(8080, protocol), u32(owner))

    def index(self, end: str, device: str) -> int:
        return int(sh(f"ip -n {self.names[end]} -o link show {device}").split(":")[0])

    def mtu(self, value: int) -> None:
        """The router's wire to the far node, both ends of it: IPv6 is in order down to 1280."""
        sh(f"ip -n {self.names['r']} link set right mtu {value}")
        sh(f"ip -n {self.names['b']} link set between mtu {value}")

    def offload(self, on: bool) -> None:
        """Whether the nodes' interfaces take checksums and segments as they are; else the kernel makes them."""
        state = "on" if on else "off"
        for end, device in (("a", "outer"), ("a", "between"), ("b", "between"), ("b", "inner"), ("b", "outer")):
            sh(f"ip netns exec {self.names[end]} ethtool -K {device} tx {state} tso {state} gso {state}")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    names = {end: f"mesh{os.getpid()}-tun-{end}" for end in "cabrt"}
    try:
        for name in names.values():
            sh(f"ip netns add {name}")
            sh(f"ip -n {name} link set lo up")
            for key in ("ipv4.ip_forward=1", "ipv6.conf.all.forwarding=1", "ipv4.conf.all.rp_filter=0"):
                sh(f"ip netns exec {name} sysctl -qw net.{key}")
            sh(f"ip netns exec {name} sysctl -qw net.ipv4.conf.default.rp_filter=0")
        for left, right in WIRES:
            sh(f"ip -n {names[left[0]]} link add {left[1]} type veth peer name {right[1]} netns {names[right[0]]}")
            for end, device, four, six in (left, right):
                sh(f"ip -n {names[end]} addr add {four}/24 dev {device}")
                sh(f"ip -n {names[end]} -6 addr add {six}/64 dev {device} nodad")
                sh(f"ip -n {names[end]} link set {device} up")
        for end, four, via4, six, via6 in ROUTES:
            sh(f"ip -n {names[end]} route add {four} via {via4}")
            sh(f"ip -n {names[end]} -6 route add {six} via {via6}")
        found = Lab(names, Plane(), Plane())
        for plane, end, program, device in (
            (found.near, "a", "mesh_ingress", "outer"),
            (found.near, "a", "mesh_ingress", "between"),
            (found.far, "b", "mesh_ingress", "outer"),
            (found.far, "b", "mesh_ingress", "between"),
            (found.far, "b", "mesh_task", "inner"),
        ):
            with inside(names[end]):
                assert _bpf.tc_attach(plane.programs[program], found.index(end, device), True, 1, 1) is not None
        yield found
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(autouse=True)
def ready(lab: Lab) -> None:
    lab.mtu(1500)
    lab.offload(True)
    for end in ("a", "b", "c", "t"):
        sh(f"ip -n {lab.names[end]} route flush cache")
        sh(f"ip -n {lab.names[end]} -6 route flush cache")


def family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def transfer(lab: Lab, version: int) -> None:
    """Random bytes there and back, and the client's address as the task sees it."""
    assert bulk(lab.names["c"], (NEAR[version], 80), lab.names["t"]) == CLIENT[version]


def refuses(client: socket.socket, size: int) -> bool:
    """Whether the kernel does not send a datagram of this size; it then knows of a smaller path MTU."""
    try:
        client.send(bytes(size))
    except OSError as error:
        assert error.errno == errno.EMSGSIZE
        return True
    return False


VERSIONS: Final = pytest.mark.parametrize(("inner", "outer"), [(4, 4), (6, 4), (4, 6), (6, 6)])


@VERSIONS
@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
@pytest.mark.parametrize("settings", [0, DIRECT], ids=["tunnel", "direct"])
def test_bulk_both_ways(lab: Lab, inner: int, outer: int, offload: bool, settings: int) -> None:
    lab.offload(offload)
    lab.serve(inner, outer, settings=settings)
    transfer(lab, inner)
    near, far = lab.near.verdicts(), lab.far.verdicts()
    assert near.keys() == ({"TUNNEL_TX"} if settings else {"TUNNEL_TX", "TUNNEL_REPLY_RX"}), near
    assert far.keys() == {"TUNNEL_RX", "TUNNEL_DIRECT" if settings else "TUNNEL_REPLY_TX"}, far
    assert near["TUNNEL_TX"] <= far["TUNNEL_RX"]  # segments are cut on the way without offload


@VERSIONS
@pytest.mark.parametrize("mtu", [1400, 1280])
def test_a_small_way_that_is_known(lab: Lab, inner: int, outer: int, mtu: int) -> None:
    lab.mtu(mtu)
    lab.serve(inner, outer, mtu=mtu)
    transfer(lab, inner)
    assert "TUNNEL_TOO_BIG" not in lab.near.verdicts() | lab.far.verdicts()


@VERSIONS
@pytest.mark.parametrize("settings", [0, DIRECT], ids=["tunnel", "direct"])
def test_datagrams_both_ways(lab: Lab, inner: int, outer: int, settings: int) -> None:
    lab.serve(inner, outer, settings=settings)
    with inside(lab.names["t"]):
        server = socket.socket(family(inner), socket.SOCK_DGRAM)
        server.bind((TASK[inner], 8080))
    with inside(lab.names["c"]):
        client = socket.socket(family(inner), socket.SOCK_DGRAM)
    with server, client:
        server.settimeout(PATIENCE)
        client.settimeout(PATIENCE)
        for size in (0, 1, 100, 1360):
            client.sendto(bytes(size), (NEAR[inner], 80))
            data, peer = server.recvfrom(2000)
            assert (len(data), peer[0]) == (size, CLIENT[inner])
            server.sendto(data, peer)
            answer, source = client.recvfrom(2000)
            assert (len(answer), source[:2]) == (size, (NEAR[inner], 80))


@VERSIONS
@pytest.mark.parametrize("settings", [0, DIRECT], ids=["tunnel", "direct"])
@pytest.mark.parametrize("order", [swapped, last_first, shuffled])
def test_fragments_in_any_order_both_ways(lab: Lab, inner: int, outer: int, settings: int, order: Order) -> None:
    """Each node sends a datagram's first fragment first: the other one need not keep any."""
    lab.serve(inner, outer, settings=settings | SETTING_GUARD)
    lab.near.configure(settings=SETTING_GUARD)
    ends = {}
    for end, address, port in (("t", TASK[inner], 8080), ("c", CLIENT[inner], 40000)):
        with inside(lab.names[end]):
            ends[end] = socket.socket(family(inner), socket.SOCK_DGRAM), raw_socket_here(inner)
        ends[end][0].bind((address, port))
        ends[end][0].settimeout(PATIENCE)
    (task, from_task), (client, from_client) = ends["t"], ends["c"]
    with task, from_task, client, from_client:
        for ident in range(20):
            data = os.urandom(5000 + ident)
            put(from_client, NEAR[inner], order(cut((CLIENT[inner], 40000), (NEAR[inner], 80), data, ident)))
            got, peer = task.recvfrom(10000)
            assert (got, peer[:2]) == (data, (CLIENT[inner], 40000))
            put(from_task, CLIENT[inner], order(cut((TASK[inner], 8080), (CLIENT[inner], 40000), data, ident)))
            got, peer = client.recvfrom(10000)
            assert (got, peer[:2]) == (data, (NEAR[inner], 80))
    near, far = lab.near.verdicts(), lab.far.verdicts()
    assert near["EARLY"] >= 20 and far["EARLY"] >= 20
    assert not (near.keys() | far.keys()) & {"TUNNEL_INVALID", "NO_PORTS", "FRAGMENT"}


@VERSIONS
def test_a_datagram_that_is_too_large_is_answered(lab: Lab, inner: int, outer: int) -> None:
    lab.serve(inner, outer)
    with inside(lab.names["c"]):
        client = socket.socket(family(inner), socket.SOCK_DGRAM)
    with client:
        client.settimeout(PATIENCE)
        client.setsockopt(*((socket.IPPROTO_IP, 10, 2) if inner == 4 else (socket.IPPROTO_IPV6, 23, 2)))  # MTU_DISCOVER
        client.connect((NEAR[inner], 80))
        wait_for(lambda: refuses(client, 1440), "the kernel has heard of it")
        room = (64 if outer == 4 else 84) + 28 + (20 if inner == 6 else 0)
        wait_for(lambda: not refuses(client, 1500 - room), "what fits is sent")  # it may have heard twice
    assert lab.near.verdicts()["TUNNEL_TOO_BIG"] >= 1


@VERSIONS
def test_a_small_way_that_tells(lab: Lab, inner: int, outer: int) -> None:
    """The router's ICMP errors reach the near node, whose own then reach the client."""
    lab.mtu(1364)  # what is left for IPv6 is no less than it asks for
    lab.serve(inner, outer)
    with inside(lab.names["c"]):
        client = socket.socket(family(inner), socket.SOCK_DGRAM)
    with client:
        client.setsockopt(*((socket.IPPROTO_IP, 10, 2) if inner == 4 else (socket.IPPROTO_IPV6, 23, 2)))  # MTU_DISCOVER
        client.connect((NEAR[inner], 80))

        def told() -> bool:
            refuses(client, 1360)
            lab.near.believe_hints()
            return "TUNNEL_TOO_BIG" in lab.near.verdicts()

        wait_for(told, "the near node has answered the client")
    near = lab.near.verdicts()
    assert (near["TUNNEL_PMTU"], near["TUNNEL_TOO_BIG"]) >= (1, 1)


@VERSIONS
def test_connections_to_an_unknown_task_are_refused(lab: Lab, inner: int, outer: int) -> None:
    """Not at once: the task's node may only be about to learn of it. When the start comes again."""
    lab.serve(inner, outer, known=False)
    with inside(lab.names["c"]):
        client = socket.socket(family(inner))
    with client:
        client.settimeout(PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            client.connect((NEAR[inner], 80))
    assert lab.far.verdicts() == {"TUNNEL_NO_BACKEND": 2}
    assert lab.near.verdicts() == {"TUNNEL_TX": 2, "TUNNEL_REPLY_RX": 1}


@VERSIONS
@pytest.mark.parametrize("settings", [0, DIRECT], ids=["tunnel", "direct"])
def test_a_tasks_refusals_reach_the_client(lab: Lab, inner: int, outer: int, settings: int) -> None:
    """Nobody listens: the task's own reset and port unreachable."""
    lab.serve(inner, outer, settings=settings)
    with inside(lab.names["c"]):
        stream, datagram = socket.socket(family(inner)), socket.socket(family(inner), socket.SOCK_DGRAM)
    with stream, datagram:
        stream.settimeout(PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            stream.connect((NEAR[inner], 80))
        datagram.settimeout(PATIENCE)
        datagram.connect((NEAR[inner], 80))
        datagram.send(b"question")
        with pytest.raises(ConnectionRefusedError):
            datagram.recv(100)
    assert lab.far.verdicts()["ICMP_OUT"] == 1


def test_replies_go_straight_when_the_node_that_was_called_is_gone(lab: Lab) -> None:
    """A download whose client has nothing to say: the far node must not wait for it to call elsewhere."""
    lab.serve(4, 4)
    with inside(lab.names["t"]):
        server = socket.create_server(("0.0.0.0", 8080))
    with inside(lab.names["c"]):
        client = socket.socket()
    with server, client:
        server.settimeout(PATIENCE)
        client.settimeout(PATIENCE)
        client.connect((NEAR[4], 80))
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"before")
            assert client.recv(100) == b"before"
            lab.far.maps["mesh_nodes"].delete(packed(NODE_A[4]))
            connection.sendall(b"after")
            assert client.recv(100) == b"after"
    assert lab.far.verdicts()["TUNNEL_DIRECT"] >= 1
