# SPDX-License-Identifier: Apache-2.0
"""What the programs remember of routes (bpf/lib/fib.h), and for how long."""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bpf.plane import REDIRECT, Plane, context, packed, u32
from tests.bpf.wires import inside, sh
from tests.support.frames import CLIENT4, CLIENT6, NODE4, NODE6, TASK4, TASK6, Ether, segment
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

MAC = "02:00:00:00:00:33"
LIFE = 128  # jiffies
NONE = "0.0.0.0"
HOP = struct.Struct("=4s4sIII4sBBxx")


@dataclass(frozen=True)
class Hop:
    """An entry of fib_cache."""

    next: str  # 0.0.0.0: not remembered
    ifindex: int
    routes: int
    since: int
    tos: int


class Router:
    """A namespace with one wire, and the entry of a flow whose client is beyond it."""

    def __init__(self, plane: Plane, name: str, ifindex: int) -> None:
        self.plane, self.name, self.ifindex = plane, name, ifindex

    def ip(self, command: str) -> None:
        sh(f"ip -n {self.name} {command}")

    def start(self, client: str, node: str, task: str, port: int) -> None:
        self.client, self.node, self.task, self.port = client, node, task, port
        frame = segment(client, 40000, node, port)
        frame[Ether].dst = MAC
        with inside(self.name):
            assert self.plane.run("mesh_ingress", bytes(frame), ifindex=self.ifindex).retval == REDIRECT

    def reply(self, *, tos: int = 0, mark: int = 0) -> Hop | None:
        """A reply passes; the newest that is remembered then for these ends, since routes changed last."""
        routes = struct.unpack("=I", self.plane.maps["mesh_fib_gen"].lookup(u32(0)) or b"")[0]
        frame = segment(self.task, 8080, self.client, 40000, "PA", b"data", **({"tos": tos} if tos else {}))
        skb = bytearray(context())  # from the task's interface
        struct.pack_into("=I", skb, 8, mark)
        with inside(self.name):
            assert self.plane.programs["mesh_task"].test_run(bytes(frame), bytes(skb)).retval == REDIRECT
        found = []
        for index in range(1024):
            held = self.plane.hops.lookup(u32(index))
            for at in range(0, len(held or b""), HOP.size + -HOP.size % 8):
                source, destination, ifindex, known, since, hop, protocol, kind = HOP.unpack_from(held or b"", at)
                ends = (packed(self.node)[12:], packed(self.client)[12:])
                if (source, destination, known) == (*ends, routes):
                    assert protocol == 6
                    found.append(Hop(str(ipaddress.ip_address(hop)), ifindex, known, since, kind))
        return max(found, key=lambda h: h.since, default=None)


@pytest.fixture
def router(plane: Plane) -> Iterator[Router]:
    name = f"mesh{os.getpid()}-hop"
    sh(f"ip netns add {name}")
    try:
        sh(f"ip -n {name} link add mesha type veth peer name meshb")
        for device in ("lo", "meshb"):
            sh(f"ip -n {name} link set {device} up")
        sh(f"ip -n {name} link set mesha address {MAC} up")
        sh(f"ip netns exec {name} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        sh(f"ip -n {name} addr add {NODE4}/24 dev mesha")
        sh(f"ip -n {name} addr add {NODE6}/64 dev mesha nodad")
        yield Router(plane, name, int(sh(f"ip -n {name} -o link show mesha").split(":")[0]))
    finally:
        sh(f"ip netns del {name}")


NETWORK, FIRST, SECOND, ENDS = "198.51.100.0/24", "192.0.2.253", "192.0.2.254", (CLIENT4, NODE4, TASK4, 80)


def test_the_next_hop_is_asked_for_once_until_routes_change(router: Router) -> None:
    router.ip(f"route add {NETWORK} via {FIRST} dev mesha")
    router.start(*ENDS)
    hop = router.reply()
    assert hop and (hop.next, hop.ifindex) == (FIRST, router.ifindex)
    router.ip(f"route replace {NETWORK} via {SECOND} dev mesha")

    def told() -> bool:
        """Before anybody says so the old answer counts, for LIFE; when somebody does, the new one at once."""
        router.ip(f"route replace {NETWORK} via {FIRST} dev mesha")
        router.plane.reroute()
        asked = router.reply()
        router.ip(f"route replace {NETWORK} via {SECOND} dev mesha")
        remembered = router.reply()
        router.plane.reroute()
        again = router.reply()
        assert asked and remembered and again
        assert (asked.next, again.next) == (FIRST, SECOND)
        if remembered.since != asked.since or again.since - asked.since >= LIFE:  # too slow, or on another CPU
            return False
        assert remembered.next == FIRST
        return True

    wait_for(told, "within the life of an answer")


def test_without_an_agent_an_answer_counts_for_a_moment_only(router: Router) -> None:
    router.ip(f"route add {NETWORK} via {FIRST} dev mesha")
    router.start(*ENDS)
    assert (hop := router.reply()) and hop.next == FIRST
    router.ip(f"route replace {NETWORK} via {SECOND} dev mesha")
    wait_for(lambda: (h := router.reply()) and h.next == SECOND, "the new way")


def test_a_neighbour_is_its_own_next_hop(router: Router) -> None:
    router.start("192.0.2.77", NODE4, TASK4, 80)
    assert (hop := router.reply()) and hop.next == "192.0.2.77"


def test_rules_by_type_of_service_are_obeyed(router: Router) -> None:
    router.ip(f"route add {NETWORK} via {FIRST} dev mesha")
    router.ip(f"route add {NETWORK} via {SECOND} dev mesha table 77")
    router.ip("rule add tos 0x10 table 77")
    router.start(*ENDS)
    assert (hop := router.reply()) and (hop.next, hop.tos) == (FIRST, 0)
    assert (hop := router.reply(tos=0x10 | 1)) and (hop.next, hop.tos) == (SECOND, 0x10)
    assert (hop := router.reply(tos=2)) and (hop.next, hop.tos) == (FIRST, 0)  # ECN bits are no type of service


@pytest.mark.parametrize("way", ["none", "other interface", "forbidden", "marked"])
def test_where_no_neighbour_is_named_the_kernel_finds_the_way(router: Router, way: str) -> None:
    if way == "other interface":
        router.ip(f"route add {NETWORK} dev meshb")
    elif way != "none":
        router.ip(f"route add {NETWORK} via {FIRST} dev mesha" if way == "marked" else f"route add prohibit {NETWORK}")
    router.start(*ENDS)
    hop = router.reply(mark=7 if way == "marked" else 0)
    assert hop is None if way == "marked" else hop and hop.next == NONE


def test_ipv4_by_an_ipv6_gateway_is_left_to_the_kernel(router: Router) -> None:
    router.ip(f"route add {NETWORK} via inet6 fe80::253 dev mesha")
    router.start(*ENDS)
    assert (hop := router.reply()) and hop.next == NONE


def test_ipv6_is_looked_up_each_time(router: Router) -> None:
    """The kernel's answer for a way out leaves out rules by source."""
    router.ip("route add 2001:db8:9::/64 via fe80::253 dev mesha")
    router.start(CLIENT6, NODE6, TASK6, 86)
    assert router.reply() is None
