# SPDX-License-Identifier: Apache-2.0
"""Packets without DF that are larger than their way takes: the fragments that come in instead, as scapy cuts them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IPOption_NOP, fragment

from tests.bpf.plane import REDIRECT, SHOT, UDP, Plane
from tests.bpf.tunnel import PEER4, SEED, caller
from tests.bpf.wires import ETH_P_ALL, inside, sh
from tests.support.frames import CLIENT4, IP, NODE4, TASK4, Ether, Packet, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ROOM = 64  # of the tunnel
DATA = bytes(range(256)) * 10
MAC = "02:00:00:00:00:33"


class Way:
    """An interface whose ingress is listened to, of MTU 1300."""

    def __init__(self, namespace: str) -> None:
        self.ifindex = int(sh(f"ip -n {namespace} -o link show mesha").split(":")[0])
        self._listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._listener.bind(("mesha", 0))
        self._listener.settimeout(1)

    def came(self, number: int) -> list[bytes]:
        """So many frames that came in; no more have."""
        found = [self._listener.recv(65536) for _ in range(number)]
        self._listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            self._listener.recv(65536)
        return found

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def way() -> Iterator[Way]:
    name = f"mesh{os.getpid()}-cut"
    sh(f"ip netns add {name}")
    try:
        sh(f"ip -n {name} link add name mesha mtu 1300 type veth peer name meshb")
        for key in ("all", "default", "mesha"):
            sh(f"ip netns exec {name} sysctl -qw net.ipv6.conf.{key}.disable_ipv6=1")
        sh(f"ip -n {name} link set mesha address {MAC}")
        for end in ("mesha", "meshb"):
            sh(f"ip -n {name} link set {end} up")
        with inside(name):
            yield (found := Way(name))
            found.close()
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def cut(frame: Packet, mtu: int) -> list[bytes]:
    """What a router makes of a frame, each fragment with its Ethernet header."""
    ether = bytes(frame)[:14]
    return [ether + bytes(each) for each in fragment(IP(bytes(frame)[14:]), (mtu - 20) // 8 * 8)]


def called(mtu: int) -> Plane:
    """Port 53 of a task on another node, to which the way takes so much."""
    plane = caller(mtu=mtu)
    plane.away(4, PEER4, 5353, SEED, protocol=UDP)
    plane.frontend(3, 53, [(4, 4)], protocol=UDP)
    return plane


def asked(size: int, **fields: Any) -> Packet:
    return to_mac(datagram(CLIENT4, 40000, NODE4, 53, DATA[: size - 28], id=77, **fields))


def to_mac(frame: Packet) -> Packet:
    frame[Ether].dst = MAC
    return frame


@pytest.mark.parametrize("size", [1217, 1220, 1500, 2408, 2409, 2560])
def test_a_datagram_for_another_node(way: Way, size: int) -> None:
    plane, frame = called(1280), asked(size)
    expected = cut(frame, 1280 - ROOM)
    out = plane.run("mesh_ingress", bytes(frame), ifindex=way.ifindex)
    assert (out.retval, out.data, plane.verdicts()) == (REDIRECT, expected[-1], {"FRAGMENTED": 1})
    assert way.came(len(expected) - 1) == expected[:-1]  # the test run does not redirect the last one


def test_the_fragments_go_through_the_tunnel(way: Way) -> None:
    plane, frame = called(1280), asked(2500)
    *first, last = cut(frame, 1280 - ROOM)
    plane.run("mesh_ingress", bytes(frame), ifindex=way.ifindex)
    for each in [*way.came(len(first)), last]:
        out = plane.run("mesh_ingress", each, ifindex=way.ifindex)
        assert (out.retval, out.data[66:86][4:]) == (REDIRECT, bytes(hopped(each))[18:34])
    assert plane.verdicts() == {"FRAGMENTED": 1, "TUNNEL_TX": 3}


def hopped(frame: bytes) -> Packet:
    found = Ether(frame)
    found[IP].ttl -= 1
    del found[IP].chksum
    return found


def test_fragments_keep_their_places(way: Way) -> None:
    """A datagram in fragments of 1,500 bytes: those that are too large are cut, and only the very last ends it."""
    plane = called(1280)
    whole = [Ether(each) for each in cut(asked(2560), 1500)]
    assert [len(bytes(each)) for each in whole] == [1514, 1094]
    first = cut(whole[0], 1280 - ROOM)
    out = plane.run("mesh_ingress", bytes(whole[0]), ifindex=way.ifindex)
    assert (out.data, IP(out.data[14:]).flags) == (first[-1], "MF")
    assert way.came(1) == first[:-1]
    later = asked(2000, flags="MF", frag=185)
    pieces = cut(later, 1280 - ROOM)
    assert (out := plane.run("mesh_ingress", bytes(later), ifindex=way.ifindex)).data == pieces[-1]
    assert way.came(1) == pieces[:-1]
    assert (IP(out.data[14:]).flags, IP(out.data[14:]).frag) == ("MF", 185 + 1192 // 8)
    assert plane.verdicts() == {"FRAGMENTED": 2}


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_tasks_answer(plane: Plane, way: Way, protocol: str) -> None:
    plane.backend(2, TASK4, 8080, ifindex=way.ifindex)
    plane.backend(4, TASK4, 5353, protocol=UDP, ifindex=way.ifindex)
    if protocol == "udp":
        question, answer = datagram(CLIENT4, 40000, NODE4, 53), datagram(TASK4, 5353, CLIENT4, 40000, DATA[:1400])
    else:
        question = segment(CLIENT4, 40000, NODE4, 80)
        answer = segment(TASK4, 8080, CLIENT4, 40000, "A", DATA[:1400])
        answer[IP].flags = ""
    assert plane.run("mesh_ingress", bytes(to_mac(question)), ifindex=way.ifindex).retval == REDIRECT
    expected = cut(answer, 1300)
    out = plane.run("mesh_task", bytes(answer), ifindex=way.ifindex)
    assert (out.retval, out.data) == (REDIRECT, expected[-1])
    assert way.came(1) == expected[:1]
    assert plane.verdicts() == {"FORWARD": 1, "FRAGMENTED": 1}


@pytest.mark.parametrize(
    ("fields", "gso"),
    [({"flags": "DF"}, 0), ({"options": [IPOption_NOP()] * 4}, 0), ({}, 1400)],
    ids=["df", "options", "gso"],
)
def test_what_is_not_cut(way: Way, fields: dict[str, Any], gso: int) -> None:
    plane = called(1280)
    out = plane.run("mesh_ingress", bytes(asked(1500, **fields)), ifindex=way.ifindex, gso=gso)
    assert out.retval == (REDIRECT if "flags" in fields or gso else SHOT)  # an ICMP error where there may be one
    assert plane.verdicts() == {"TUNNEL_TOO_BIG": 1}
    assert way.came(0) == []
