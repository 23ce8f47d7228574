# SPDX-License-Identifier: Apache-2.0
"""Replies follow the routes of their node, although its programs remember next hops."""

from __future__ import annotations

import os
import resource
import signal
from functools import partial
from pathlib import Path

import pytest

from mesh import _bpf
from mesh.datapath.netlink import Monitor
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import Connection, Plane
from tests.support.lab.netns import Namespace, veth
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FAR = "198.51.100.9"


@pytest.fixture
def engine(serving: Driver) -> Driver:
    """Not the suite's, which is a name."""
    return serving


class Detour:
    """A client behind two routers: its calls come by the first, replies go by the one that the node's route names."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.client = plane.lab.namespace("far")
        self.routers: list[Namespace] = []
        self.client.add_address("lo", f"{FAR}/32")
        for number in (1, 2):
            router = plane.lab.host(f"router{number}")
            veth(router, "far", self.client, f"r{number}")
            router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
            router.add_address("far", f"10.9.{number}.1/24")
            self.client.add_address(f"r{number}", f"10.9.{number}.2/24")
            router.ip("route", "add", FAR, "via", f"10.9.{number}.2")
            for device in ("all", f"r{number}"):
                self.client.run("sysctl", "-qw", f"net.ipv4.conf.{device}.rp_filter=0")
            for device in ("all", "eth0", "far"):
                router.run("sysctl", "-qw", f"net.ipv4.conf.{device}.rp_filter=0")
            self.routers.append(router)
        self.client.ip("route", "add", "default", "via", "10.9.1.1", "src", FAR)
        self.lead(0)

    def lead(self, number: int) -> None:
        """Route the client by one router; the other drops what goes to it from now on."""
        way, other = self.routers[number], self.routers[1 - number]
        way.ip("route", "replace", FAR, "via", f"10.9.{number + 1}.2")
        self.plane.node.ip("route", "replace", FAR, "via", way.address)
        other.ip("route", "replace", "blackhole", FAR)


@pytest.fixture
def detour(plane: Plane, engine: Driver) -> Detour:
    return Detour(plane)


def changes(plane: Plane) -> int:
    """The value of mesh_fib_gen."""
    (pin,) = (Path(p) for p in plane.pins() if p.name == "mesh_fib_gen")
    held = _bpf.Map.open(str(pin))
    try:
        return int.from_bytes(held.lookup(bytes(4)) or b"", "little")
    finally:
        held.close()


def test_a_transfer_goes_on_while_routes_change_under_it(detour: Detour) -> None:
    connection = Connection(detour.client, detour.plane.node.address)
    assert connection.seen == FAR
    for turn in range(6):
        connection.echo(200_000)
        detour.lead(1 - turn % 2)
    connection.echo(200_000)
    connection.close()


def test_the_programs_are_told_of_changes(plane: Plane, engine: Driver) -> None:
    def told(before: int) -> bool:
        return changes(plane) != before

    for change in (
        "route add 203.0.113.0/24 dev eth0",
        "-6 route add 2001:db8:77::/64 dev eth0",
        "rule add to 203.0.113.9 table 77",
        "-6 rule add to 2001:db8:77::9 table 77",
        "nexthop add id 77 via 192.0.2.1 dev eth0",
        "address add 203.0.113.9/32 dev eth0",
        "link set eth0 mtu 1400",
    ):
        before = changes(plane)
        plane.node.ip(*change.split())
        wait_for(partial(told, before), f"the programs are told of {change}")


def test_without_an_agent_replies_follow_all_the_same(detour: Detour, engine: Driver) -> None:
    connection = Connection(detour.client, detour.plane.node.address)
    connection.echo()
    engine.process.send_signal(signal.SIGKILL)
    engine.process.wait()
    detour.lead(1)
    connection.echo(200_000)
    connection.close()


def test_changes_are_seen_with_many_descriptors_open(plane: Plane) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with plane.node.entered():
            monitor = Monitor()
        plane.node.ip("address", "add", "203.0.113.9/32", "dev", "eth0")
        assert monitor.wait(PATIENCE)
        monitor.close()
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
