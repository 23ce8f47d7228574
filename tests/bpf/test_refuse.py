# SPDX-License-Identifier: Apache-2.0
"""Refusals: resets and ICMP errors that the programs send themselves, compared with scapy's."""

from __future__ import annotations

import os
from typing import Any

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6TimeExceeded

from tests.bpf.plane import REDIRECT, SHOT, Plane
from tests.bpf.plane import UDP as PROTO_UDP
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    IP,
    NODE4,
    NODE6,
    TASK4,
    TASK6,
    TCP,
    UDP,
    Ether,
    IPv6,
    become,
    datagram,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def plane() -> Plane:
    """80/tcp and 53/udp have no backend; 81/tcp and 54/udp have one, 86/tcp and 56/udp one over IPv6."""
    p = Plane.fresh()
    p.local(NODE4, NODE6)
    p.backend(2, TASK4, 8080)
    p.backend(3, TASK6, 8080)
    p.frontend(1, 80, [(0, 0)])
    p.frontend(2, 53, [(0, 0)], protocol=PROTO_UDP)
    p.frontend(3, 81, [(2, 2)])
    p.frontend(4, 54, [(2, 2)], protocol=PROTO_UDP)
    p.frontend(5, 86, [(3, 3)])
    p.frontend(6, 56, [(3, 3)], protocol=PROTO_UDP)
    return p


def answer(frame: Any) -> Any:
    """Ethernet and IP headers of an answer to the frame."""
    ether = Ether(src=frame[Ether].dst, dst=frame[Ether].src)
    if IP in frame:
        return ether / IP(src=frame[IP].dst, dst=frame[IP].src, id=0, flags="DF", ttl=64)
    return ether / IPv6(src=frame[IPv6].dst, dst=frame[IPv6].src, hlim=64)


@pytest.mark.parametrize(("client", "node"), [(CLIENT4, NODE4), (CLIENT6, NODE6)])
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(250)) * 5])
@pytest.mark.parametrize("flags", ["S", "A", "PA", "FA", "SA", "F", ""])
def test_tcp_is_reset(plane: Plane, client: str, node: str, flags: str, data: bytes) -> None:
    frame = segment(client, 40000, node, 80, flags, data)
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    tcp = frame[TCP]
    reset = TCP(sport=80, dport=40000, seq=tcp.ack, ack=0, flags="R", window=0)
    if "A" not in flags:
        length = len(data) + ("S" in flags) + ("F" in flags)
        reset = TCP(sport=80, dport=40000, seq=0, ack=tcp.seq + length, flags="RA", window=0)
    assert out.data == bytes(answer(frame) / reset)
    assert plane.verdicts() == {"REJECTED": 1}


def error(frame: Any, v4: Any, v6: Any) -> bytes:
    """The ICMP error about the frame that quotes its IP header and the transport header without options."""
    ip = frame[IP] if IP in frame else frame[IPv6]
    header = 20 if IP in frame else 40
    quote = bytes(ip)[: header + (20 if TCP in frame else 8)]
    return bytes(answer(frame) / (v4 if IP in frame else v6) / quote)


@pytest.mark.parametrize(("client", "node"), [(CLIENT4, NODE4), (CLIENT6, NODE6)])
@pytest.mark.parametrize("data", [b"", b"x", b"question", bytes(range(250)) * 5])
def test_udp_gets_port_unreachable(plane: Plane, client: str, node: str, data: bytes) -> None:
    frame = datagram(client, 40000, node, 53, data)
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    assert out.data == error(frame, ICMP(type=3, code=3, unused=0), ICMPv6DestUnreach(code=4))
    assert plane.verdicts() == {"REJECTED": 1}


def test_udp_without_checksum_gets_port_unreachable(plane: Plane) -> None:
    frame = datagram(CLIENT4, 40000, NODE4, 53)
    frame[UDP].chksum = 0
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.data == error(frame, ICMP(type=3, code=3, unused=0), None)


@pytest.mark.parametrize("ttl", [0, 1])
@pytest.mark.parametrize(
    ("client", "node", "tcp", "udp"), [(CLIENT4, NODE4, 81, 54), (CLIENT6, NODE6, 86, 56)], ids=["v4", "v6"]
)
def test_last_hop_is_told(plane: Plane, client: str, node: str, tcp: int, udp: int, ttl: int) -> None:
    for frame in (segment(client, 40000, node, tcp, ttl=ttl), datagram(client, 40000, node, udp, ttl=ttl)):
        out = plane.run("mesh_ingress", bytes(frame))
        assert out.retval == REDIRECT
        assert out.data == error(frame, ICMP(type=11, code=0, unused=0), ICMPv6TimeExceeded())
    assert plane.verdicts() == {"EXPIRED": 2}


@pytest.mark.parametrize(
    "frame",
    [
        segment(CLIENT4, 40000, NODE4, 80, "R"),
        segment(CLIENT4, 40000, NODE4, 80, "RA"),
        segment(CLIENT4, 40000, NODE4, 80, "S", options=b"\x94\x04\0\0"),
        datagram(CLIENT4, 40000, NODE4, 53, flags="MF"),
    ],
    ids=["reset", "reset-ack", "options", "fragment"],
)
def test_some_packets_get_no_answer(plane: Plane, frame: Any) -> None:
    assert plane.run("mesh_ingress", bytes(frame)).retval == SHOT
    assert plane.verdicts() == {"NO_BACKEND": 1}


def test_containers_are_answered_too(plane: Plane) -> None:
    frame = segment("172.18.0.9", 40000, NODE4, 80)
    assert plane.run("mesh_task", bytes(frame)).retval == REDIRECT
    assert plane.verdicts() == {"REJECTED": 1}


def test_reply_at_its_last_hop_is_dropped(plane: Plane) -> None:
    plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 81)))
    assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "SA", ttl=1))).retval == SHOT
    assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "SA", ttl=2))).retval == REDIRECT


@pytest.mark.parametrize(
    ("client", "node", "port", "task"), [(CLIENT4, NODE4, 81, TASK4), (CLIENT6, NODE6, 86, TASK6)], ids=["v4", "v6"]
)
def test_a_tasks_first_refusal_is_not_told(plane: Plane, client: str, node: str, port: int, task: str) -> None:
    """The client's kernel asks again; what the task says then counts. A reset of a connection is always told."""
    call, refusal = segment(client, 40000, node, port), segment(task, 8080, client, 40000, "RA")
    reset = become(refusal, src=node, sport=port)
    refusal[TCP].seq = 0
    told = become(refusal, src=node, sport=port)
    for retval, data in ((SHOT, None), (REDIRECT, told), (REDIRECT, told)):
        assert plane.run("mesh_ingress", bytes(call)).retval == REDIRECT
        out = plane.run("mesh_task", bytes(refusal))
        assert (out.retval, data and out.data) == (retval, data)
    assert plane.verdicts() == {"FORWARD": 3, "RESET_HELD": 1, "REPLY": 2}
    plane.run("mesh_ingress", bytes(segment(client, 40001, node, port)))
    late = segment(task, 8080, client, 40001, "RA")  # not of a connection that never was
    assert plane.run("mesh_task", bytes(late)).retval == REDIRECT
    plane.run("mesh_ingress", bytes(segment(client, 40000, node, port, "A")))
    out = plane.run("mesh_task", bytes(segment(task, 8080, client, 40000, "RA")))
    assert (out.retval, out.data) == (REDIRECT, reset)
    assert plane.verdicts()["RESET_HELD"] == 1


def test_another_task_may_refuse_as_well(plane: Plane) -> None:
    """Each is given one more try."""
    plane.backend(4, "172.18.0.4", 8080)
    call = bytes(segment(CLIENT4, 40000, NODE4, 81))
    for owner, task in ((2, TASK4), (4, "172.18.0.4"), (4, "172.18.0.4")):
        plane.frontend(3, 81, [(owner, owner)])
        plane.run("mesh_ingress", call)
        refusal = segment(task, 8080, CLIENT4, 40000, "RA")
        refusal[TCP].seq = 0
        plane.run("mesh_task", bytes(refusal))
    assert plane.verdicts() == {"FORWARD": 3, "RESET_HELD": 2, "REPLY": 1}


def test_errors_are_limited_and_resets_are_not(plane: Plane) -> None:
    """As the kernel's own: a burst of 50, then so many a second; here one, on each CPU."""
    plane.configure(error_rate=1)
    question, call = bytes(datagram(CLIENT4, 40000, NODE4, 53)), bytes(segment(CLIENT4, 40000, NODE4, 80))
    home = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(home)})
    try:
        check_limits(plane, question, call)
    finally:
        os.sched_setaffinity(0, home)


def check_limits(plane: Plane, question: bytes, call: bytes) -> None:
    for _ in range(1000):
        plane.run("mesh_ingress", question)
    counted = plane.verdicts()
    assert counted["REJECTED"] >= 50
    assert counted["RATE_LIMITED"] == 1000 - counted["REJECTED"] > 0
    for _ in range(100):
        assert plane.run("mesh_ingress", call).retval == REDIRECT
    expired = bytes(segment(CLIENT4, 40000, NODE4, 81, ttl=1))
    limited = sum(plane.run("mesh_ingress", expired).retval == SHOT for _ in range(100))
    assert plane.verdicts()["RATE_LIMITED"] - counted["RATE_LIMITED"] == limited > 0
