# SPDX-License-Identifier: Apache-2.0
"""ICMP errors about flows, both ways: expected bytes by scapy, quoted transport checksums apart (they stay)."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig, ICMPv6TimeExceeded

from tests.bpf.plane import OK, REDIRECT, Plane
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    IP,
    NODE4,
    NODE6,
    TASK4,
    TASK6,
    Ether,
    datagram,
    error,
    l3,
    requoted,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ROUTER4, ROUTER6 = "203.0.113.1", "2001:db8:77::1"
ERRORS4 = [ICMP(type=3, code=4, nexthopmtu=1400), ICMP(type=3, code=1), ICMP(type=11, code=0), ICMP(type=12, code=0)]
ERRORS6 = [ICMPv6PacketTooBig(mtu=1400), ICMPv6DestUnreach(code=3), ICMPv6TimeExceeded()]
CASES = [
    pytest.param(CLIENT4, NODE4, TASK4, ROUTER4, segment, 80, 8080, ERRORS4, id="tcp4"),
    pytest.param(CLIENT4, NODE4, TASK4, ROUTER4, datagram, 53, 5353, ERRORS4, id="udp4"),
    pytest.param(CLIENT6, NODE6, TASK6, ROUTER6, segment, 86, 8080, ERRORS6, id="tcp6"),
    pytest.param(CLIENT6, NODE6, TASK6, ROUTER6, datagram, 56, 5353, ERRORS6, id="udp6"),
]


@pytest.mark.parametrize(("client", "node", "task", "router", "build", "port", "target", "errors"), CASES)
@pytest.mark.parametrize("cut", [8, 1000])
def test_error_about_a_reply_reaches_the_task(
    plane: Plane,
    client: str,
    node: str,
    task: str,
    router: str,
    build: Any,
    port: int,
    target: int,
    errors: list[Any],
    cut: int,
) -> None:
    plane.run("mesh_ingress", bytes(build(client, 40000, node, port)))
    sent = l3(Ether(bytes(build(node, port, client, 40000, data=b"answer " * 30))))
    seen = requoted(sent, src=task, sport=target)
    header = (20 if "." in node else 40) + cut
    for icmp in errors:
        for source in (router, client):
            out = plane.run("mesh_ingress", error(source, node, icmp, bytes(sent)[:header]))
            assert out.retval == REDIRECT
            assert out.data == error(source, task, icmp, seen[:header], 59)
    assert plane.verdicts() == {"FORWARD": 1, "ICMP_IN": 2 * len(errors)}


@pytest.mark.parametrize(("client", "node", "task", "router", "build", "port", "target", "errors"), CASES)
@pytest.mark.parametrize("cut", [8, 1000])
def test_error_of_a_task_reaches_the_client(
    plane: Plane,
    client: str,
    node: str,
    task: str,
    router: str,
    build: Any,
    port: int,
    target: int,
    errors: list[Any],
    cut: int,
) -> None:
    frame = build(client, 40000, node, port, data=b"question " * 30)
    out = plane.run("mesh_ingress", bytes(frame))
    got = l3(Ether(out.data))
    seen = requoted(got, dst=node, dport=port)
    header = (20 if "." in node else 40) + cut
    assert router
    for icmp in errors:
        out = plane.run("mesh_task", error(task, client, icmp, bytes(got)[:header]))
        assert out.retval == REDIRECT
        assert out.data == error(node, client, icmp, seen[:header], 59)
    assert plane.verdicts() == {"FORWARD": 1, "ICMP_OUT": len(errors)}


def test_quoted_ip_options_are_stepped_over(plane: Plane) -> None:
    plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80)))
    sent = Ether(bytes(segment(NODE4, 80, CLIENT4, 40000, "PA", options=b"\x94\x04\0\0")))[IP]
    out = plane.run("mesh_ingress", error(ROUTER4, NODE4, ERRORS4[0], bytes(sent)[:32]))
    assert out.data == error(ROUTER4, TASK4, ERRORS4[0], requoted(sent, src=TASK4, sport=8080)[:32], 59)


def untouched(plane: Plane, frame: bytes) -> None:
    for program in ("mesh_ingress", "mesh_task"):
        out = plane.run(program, frame)
        assert (out.retval, out.data) == (OK, frame)


def test_other_icmp_is_untouched(plane: Plane) -> None:
    plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80)))
    before = plane.verdicts()
    sent = Ether(bytes(segment(NODE4, 80, CLIENT4, 40000)))[IP]
    quoted = bytes(sent)[:28]
    untouched(plane, error(ROUTER4, NODE4, ICMP(type=8), b"ping" * 10))
    untouched(plane, error(ROUTER6, NODE6, ICMPv6EchoRequest(), b"ping" * 10))
    untouched(plane, error(ROUTER4, NODE4, ICMP(type=5), quoted))
    untouched(plane, error(ROUTER4, NODE4, ERRORS4[0], bytes(segment(NODE4, 81, CLIENT4, 40000)[IP])[:28]))
    untouched(plane, error(ROUTER4, NODE4, ERRORS4[0], bytes(segment(NODE4, 80, CLIENT4, 40001)[IP])[:28]))
    untouched(plane, error(ROUTER4, NODE4, ERRORS4[0], bytes(segment("192.0.2.9", 80, CLIENT4, 40000)[IP])[:28]))
    for length in range(28):  # truncated quotes
        untouched(plane, error(ROUTER4, NODE4, ERRORS4[0], quoted[:length]))
    untouched(plane, error(ROUTER4, NODE4, ERRORS4[0], quoted, ttl=1))
    assert plane.verdicts() == before
