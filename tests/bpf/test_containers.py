# SPDX-License-Identifier: Apache-2.0
"""Containers and the ports by which nodes hand flows to each other; source rules at the node of the task."""

from __future__ import annotations

import pytest

from tests.bpf.plane import DENY, DENY_RULE, OK, REDIRECT, SHOT, Plane, u32
from tests.bpf.tunnel import PEER4, PEER6, PORT, caller, identity, owner, wrapped
from tests.support.frames import CLIENT4, NODE4, NODE6, OTHER4, TASK4, TASK6, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PEER_PORT = 9552
NODES = 0x20000000
OURS = pytest.mark.parametrize("program", ["mesh_task", "mesh_bridge", "mesh_guard"])


def guarded() -> Plane:
    """A node among others, whose peer port is PEER_PORT."""
    plane = caller()
    plane.local(NODE6)
    plane.tunnel(8, PEER6, NODE6)
    for index, word in ((PEER_PORT, NODES), (65536 + PEER_PORT, NODES), (65536 + PORT, NODES | 0x40000000)):
        plane.maps["mesh_ports"].update(u32(index), u32(word))
        plane.used.add(("mesh_ports", index))
    return plane


@OURS
def test_what_containers_send_to_nodes_is_dropped(program: str) -> None:
    plane, sent = guarded(), 0
    for source, destinations in ((TASK4, (PEER4, NODE4)), (TASK6, (PEER6, NODE6))):
        for destination in destinations:
            frames = [segment(source, 40000, destination, PEER_PORT, flags) for flags in ("S", "A", "PA")]
            frames += [datagram(source, 40000, destination, port) for port in (PORT, PEER_PORT)]
            for frame in frames:
                sent += 1
                assert plane.run(program, bytes(frame)).retval == SHOT, frame.summary()
    assert plane.verdicts() == {"CONTAINER": sent}


@OURS
def test_what_they_send_elsewhere_passes(program: str) -> None:
    plane = guarded()
    passing = [
        *(datagram(TASK4, 40000, OTHER4, port) for port in (PORT, PEER_PORT)),
        segment(TASK4, 40000, "203.0.113.9", PEER_PORT),
        datagram(TASK6, 40000, "2001:db8:77::1", PORT),
        segment(TASK4, 40000, PEER4, 443),
        segment(TASK4, 40000, PEER4, PORT),  # TCP: not the tunnel's
        datagram(TASK4, PEER_PORT, PEER4, 53),
    ]
    for frame in passing:
        assert plane.run(program, bytes(frame)).retval == OK, frame.summary()
    assert plane.verdicts() == {}


def test_other_nodes_are_let_through() -> None:
    plane = guarded()
    for frame in (segment(PEER4, 40000, NODE4, PEER_PORT), datagram(PEER4, 40000, NODE4, PEER_PORT)):
        assert plane.run("mesh_ingress", bytes(frame)).retval == OK
    assert plane.verdicts() == {}


def test_a_frontend_on_such_a_port_is_still_served() -> None:
    plane = guarded()
    plane.backend(3, TASK4, 8080)
    plane.frontend(2, PEER_PORT, [(3, 3)])
    plane.maps["mesh_ports"].update(u32(PEER_PORT), u32(NODES | 2))
    assert plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, PEER_PORT))).retval == REDIRECT
    assert plane.run("mesh_task", bytes(segment(OTHER4, 40000, NODE4, PEER_PORT))).retval == REDIRECT
    assert plane.run("mesh_task", bytes(segment(OTHER4, 40000, PEER4, PEER_PORT))).retval == SHOT
    assert plane.verdicts() == {"FORWARD": 2, "CONTAINER": 1}


def ruled(**options: int) -> Plane:
    """The task's node; its service denies CLIENT4."""
    plane = owner(**options)
    plane.backend(3, TASK4, 8080, frontend=1)
    plane.frontend(1, 80, [(3, 3)], acl=5)
    plane.rule(5, f"{CLIENT4}/32", DENY_RULE)
    return plane


@pytest.mark.parametrize("called", [80, 81])  # of another service, or of none
def test_a_denied_client_is_denied_where_the_task_is(called: int) -> None:
    plane = ruled()
    plane.frontend(2, 81, [(3, 3)])
    for flags in ("S", "A"):
        frame = bytes(segment(CLIENT4, 40000, NODE4, called, flags))
        assert plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, identity())).retval == SHOT
    other = bytes(segment("198.51.100.10", 40000, NODE4, called))
    assert plane.run("mesh_ingress", wrapped(other, NODE4, PEER4, identity())).retval == REDIRECT
    assert plane.verdicts() == {"DENIED": 2, "TUNNEL_RX": 1}
    assert plane.failures() == {(1, "DENIED"): 1}


def test_only_admitted_clients_are_admitted_there() -> None:
    plane = ruled()
    plane.frontend(1, 80, [(3, 3)], flags=DENY)
    frame = bytes(segment(CLIENT4, 40000, NODE4, 80))
    assert plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, identity())).retval == SHOT
    plane.rule(6, f"{CLIENT4}/32", 1)
    plane.frontend(1, 80, [(3, 3)], flags=DENY, acl=6)
    assert plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, identity())).retval == REDIRECT
    assert plane.verdicts() == {"DENIED": 1, "TUNNEL_RX": 1}
