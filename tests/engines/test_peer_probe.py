# SPDX-License-Identifier: Apache-2.0
"""How large a packet arrives at another node, across a router whose next link carries less."""

from __future__ import annotations

import ipaddress
import subprocess
import sys

import pytest

from mesh.datapath.paths.peer_probe import PathMtu, path_mtu
from tests.support.lab.netns import Lab, veth
from tests.support.polling import wait_for

pytestmark = pytest.mark.root

PORT = 9552
ANSWERS = f"""
import socket
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
sock.bind(("::", {PORT}))
print(flush=True)
while True:
    data, source = sock.recvfrom(65536)
    sock.sendto(data[:14] + bytes([1]) + data[15:52], source)
"""


@pytest.mark.parametrize("address", ["198.51.100.2", "2001:db8:2::2"])
def test_a_router_tells_or_keeps_silent(lab: Lab, address: str) -> None:
    here, router, there = (lab.namespace(name) for name in ("here", "router", "there"))
    veth(here, "eth0", router, "left")
    veth(router, "right", there, "eth0", mtu=1400)
    here.add_address("eth0", "192.0.2.2/24", "2001:db8:1::2/64")
    router.add_address("left", "192.0.2.1/24", "2001:db8:1::1/64")
    router.add_address("right", "198.51.100.1/24", "2001:db8:2::1/64")
    there.add_address("eth0", "198.51.100.2/24", "2001:db8:2::2/64")
    for end, four, six in ((here, "192.0.2.1", "2001:db8:1::1"), (there, "198.51.100.1", "2001:db8:2::1")):
        end.ip("route", "add", "default", "via", four)
        end.ip("-6", "route", "add", "default", "via", six)
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    server = there.popen(sys.executable, "-c", ANSWERS, stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline()
    silent = "icmp type destination-unreachable drop; icmpv6 type packet-too-big drop;"
    quiet = f"table inet quiet {{\nchain out {{ type filter hook output priority 0; {silent} }}\n}}"
    router.run("nft", "-f", "-", input=quiet)
    to = ipaddress.ip_address(address)
    with here.entered():
        wait_for(lambda: path_mtu(to, PORT, 1280).mtu, "neighbours have been found")
        # Again where an answer came too late, on a machine that others keep busy.
        hole = PathMtu(1400, 1500)
        wait_for(lambda: path_mtu(to, PORT, 1500) == hole, "a black hole")
    router.run("nft", "delete", "table", "inet", "quiet")
    with here.entered():
        told = PathMtu(1400, 1500, told=True)
        wait_for(lambda: path_mtu(to, PORT, 1500) == told, "a router that tells")
    server.kill()
    server.wait()
    assert (hole.black_hole, told.black_hole) == (True, False)
