# SPDX-License-Identifier: Apache-2.0
"""What the programs count as failed, by frontend and cause: starts of flows, and nothing that was served."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6DestUnreach

from tests.bpf.plane import DENY, DENY_RULE, OK, PASS_IF_NONE, REDIRECT, SHOT, UDP, Plane, u32
from tests.bpf.tunnel import PEER4, caller, identity, owner, wrapped
from tests.bpf.wires import inside
from tests.oracle import selection
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    ETHER,
    IP,
    NODE4,
    NODE6,
    TASK4,
    TASK6,
    TCP,
    IPv6,
    datagram,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]

V4, V6 = (CLIENT4, NODE4, TASK4), (CLIENT6, NODE6, TASK6)


@pytest.fixture
def plane() -> Iterator[Plane]:
    """80/tcp and 53/udp have IPv4 tasks, 86/tcp and 56/udp IPv6 tasks, 81/tcp and 54/udp none; 82/tcp, 55/udp deny."""
    p = Plane.fresh()
    p.local(NODE4, NODE6)
    p.backend(2, TASK4, 8080)
    p.backend(3, TASK6, 8080)
    p.backend(4, TASK4, 5353, protocol=UDP)
    p.backend(5, TASK6, 5353, protocol=UDP)
    p.frontend(1, 80, [(2, 2)])
    p.frontend(2, 86, [(3, 3)])
    p.frontend(3, 53, [(4, 4)], protocol=UDP)
    p.frontend(4, 56, [(5, 5)], protocol=UDP)
    p.frontend(5, 81, [(0, 0)])
    p.frontend(6, 54, [(0, 0)], protocol=UDP)
    p.frontend(7, 82, [(2, 2)], flags=DENY)
    p.frontend(8, 55, [(4, 4)], protocol=UDP, flags=DENY)
    yield p
    assert 0 not in {number for number, _ in p.failures()}


def send(plane: Plane, program: str, frames: Sequence[Any]) -> list[int]:
    return [plane.run(program, bytes(frame)).retval for frame in frames]


@pytest.mark.parametrize(("client", "node", "_"), [V4, V6], ids=["v4", "v6"])
def test_denied_starts_count_and_so_do_those_sent_again(plane: Plane, client: str, node: str, _: str) -> None:
    send(plane, "mesh_ingress", [segment(client, 40000, node, 82)] * 3)
    send(plane, "mesh_ingress", [segment(client, 40000, node, 82, flags) for flags in ("A", "PA", "FA", "R")])
    send(plane, "mesh_ingress", [datagram(client, 40000, node, 55)] * 2)
    assert plane.failures() == {(7, "DENIED"): 3, (8, "DENIED"): 2}


def test_what_the_first_stage_drops_is_counted_too() -> None:
    plane = Plane.fresh("ingress", "xdp")
    plane.local(NODE4)
    plane.rule(1, "198.51.100.0/24", DENY_RULE)
    plane.frontend(1, 80, [(0, 0)], acl=1)
    for flags in ("S", "A"):
        assert plane.programs["mesh_xdp"].test_run(bytes(segment(CLIENT4, 40000, NODE4, 80, flags))).retval == 1
    assert plane.failures() == {(1, "DENIED"): 1}


@pytest.mark.parametrize(("client", "node", "_"), [V4, V6], ids=["v4", "v6"])
def test_no_backend(plane: Plane, client: str, node: str, _: str) -> None:
    send(plane, "mesh_ingress", [segment(client, 40000, node, 81, flags) for flags in ("S", "A", "S")])
    send(plane, "mesh_ingress", [datagram(client, 40000, node, 54)])
    assert plane.failures() == {(5, "NO_BACKEND"): 2, (6, "NO_BACKEND"): 1}
    plane.frontend(5, 81, [(0, 0)], flags=PASS_IF_NONE)  # Docker's mesh may serve it
    assert send(plane, "mesh_ingress", [segment(client, 40000, node, 81)]) == [OK]
    assert plane.failures()[5, "NO_BACKEND"] == 2


@pytest.mark.parametrize(("path", "port", "number"), [(V4, 80, 1), (V6, 86, 2)], ids=["v4", "v6"])
def test_a_refusal_counts_once_the_client_is_told(
    plane: Plane, path: tuple[str, str, str], port: int, number: int
) -> None:
    client, node, task = path
    call, refusal = segment(client, 40000, node, port), segment(task, 8080, client, 40000, "RA")
    refusal[TCP].seq = 0
    assert send(plane, "mesh_ingress", [call]) + send(plane, "mesh_task", [refusal]) == [REDIRECT, SHOT]
    assert plane.failures() == {}  # it may still be served
    assert send(plane, "mesh_ingress", [call]) + send(plane, "mesh_task", [refusal]) == [REDIRECT, REDIRECT]
    assert plane.failures() == {(number, "REFUSED"): 1}
    assert plane.backend_failures() == {(number + 1, "REFUSED"): 1}


def test_a_reset_of_a_connection_is_no_refusal(plane: Plane) -> None:
    send(plane, "mesh_ingress", [segment(CLIENT4, 40000, NODE4, 80)])
    send(plane, "mesh_task", [segment(TASK4, 8080, CLIENT4, 40000, "SA")])
    send(plane, "mesh_ingress", [segment(CLIENT4, 40000, NODE4, 80, "A")])
    send(plane, "mesh_task", [segment(TASK4, 8080, CLIENT4, 40000, flags) for flags in ("RA", "R")])
    assert plane.failures() == {}


@pytest.mark.parametrize(("path", "port", "number"), [(V4, 53, 3), (V6, 56, 4)], ids=["v4", "v6"])
def test_a_datagram_that_nobody_listens_for(plane: Plane, path: tuple[str, str, str], port: int, number: int) -> None:
    client, node, task = path
    out = plane.run("mesh_ingress", bytes(datagram(client, 40000, node, port)))
    quote = out.data[14:]
    if path is V4:
        errors = [ETHER / IP(src=task, dst=client) / ICMP(type=3, code=code) / quote for code in (3, 4, 1)]
    else:
        errors = [ETHER / IPv6(src=task, dst=client) / ICMPv6DestUnreach(code=code) / quote for code in (4, 0)]
    send(plane, "mesh_task", errors)
    assert plane.verdicts()["ICMP_OUT"] == len(errors)
    assert plane.failures() == {(number, "REFUSED"): 1}
    assert plane.backend_failures() == {(number + 1, "REFUSED"): 1}


@pytest.mark.parametrize(("path", "port", "number"), [(V4, 80, 1), (V6, 86, 2)], ids=["v4", "v6"])
def test_a_start_that_is_never_answered_counts_once(
    plane: Plane, path: tuple[str, str, str], port: int, number: int
) -> None:
    client, node, _ = path
    call = segment(client, 40000, node, port)
    send(plane, "mesh_ingress", [call])
    assert plane.failures() == {}
    send(plane, "mesh_ingress", [call] * 3)
    assert plane.failures() == {(number, "UNANSWERED"): 1}
    send(plane, "mesh_ingress", [segment(client, 40001, node, port)] * 2)
    assert plane.failures() == {(number, "UNANSWERED"): 2}
    assert plane.backend_failures() == {(number + 1, "UNANSWERED"): 2}


def test_an_answer_that_the_client_did_not_get_is_an_answer(plane: Plane) -> None:
    call = segment(CLIENT4, 40000, NODE4, 80)
    send(plane, "mesh_ingress", [call])
    send(plane, "mesh_task", [segment(TASK4, 8080, CLIENT4, 40000, "SA")])
    send(plane, "mesh_ingress", [call, call])
    assert plane.failures() == {}


def test_a_client_port_that_calls_two_ports_of_a_task_while_no_other_is_free(plane: Plane) -> None:
    plane.frontend(9, 8080, [(2, 2)])
    others = selection.source_ports((selection.address(CLIENT4), 40000, selection.address(NODE4), 8080, 6))
    send(plane, "mesh_ingress", [segment(CLIENT4, port, NODE4, 80) for port in (40000, *others)])
    assert plane.failures() == {}
    send(plane, "mesh_ingress", [segment(CLIENT4, 40000, NODE4, 8080, flags) for flags in ("S", "A")])
    assert plane.failures() == {(9, "COLLISION"): 1}


# Between nodes


def arriving(frame: Any, ident: bytes) -> bytes:
    return wrapped(bytes(frame), NODE4, PEER4, ident)


def test_a_start_that_another_node_does_not_answer_counts_where_it_was_called() -> None:
    """The other node may drop one on purpose: the third counts. It does not count there."""
    plane, call = caller(), segment(CLIENT4, 40000, NODE4, 80)
    send(plane, "mesh_ingress", [call] * 2)
    assert plane.failures() == {}
    send(plane, "mesh_ingress", [call] * 3)
    assert plane.failures() == {(1, "UNANSWERED"): 1}
    assert list(plane.backend_failures().values()) == [1]
    plane = owner()
    for _ in range(4):
        assert plane.run("mesh_ingress", arriving(call, identity())).retval == REDIRECT
    assert plane.failures() == {}


def test_the_client_port_may_be_used_again() -> None:
    plane = caller()
    for sequence in range(5):
        call = segment(CLIENT4, 40000, NODE4, 80)
        call[TCP].seq = sequence
        send(plane, "mesh_ingress", [call])
    assert plane.failures() == {}


@pytest.mark.parametrize("flags", ["SA", "RA"])
def test_another_nodes_answer_ends_the_wait(flags: str) -> None:
    plane, call = caller(), segment(CLIENT4, 40000, NODE4, 80)
    send(plane, "mesh_ingress", [call] * 2)
    assert len(plane.maps["mesh_revnat_new"].dump()[0]) == 40
    answer = segment(NODE4, 80, CLIENT4, 40000, flags)
    plane.run("mesh_ingress", wrapped(bytes(answer), PEER4, NODE4, identity(0, 0, bytes(8), 1)))
    assert plane.maps["mesh_revnat_new"].dump()[0] == b""
    send(plane, "mesh_ingress", [call])
    assert plane.failures() == {}


def test_a_refusal_counts_on_the_tasks_node() -> None:
    plane = owner()
    refusal = segment(TASK4, 8080, CLIENT4, 40000, "RA")
    refusal[TCP].seq = 0
    for _ in range(2):
        plane.run("mesh_ingress", arriving(segment(CLIENT4, 40000, NODE4, 80), identity()))
        plane.run("mesh_task", bytes(refusal))
    assert plane.failures() == {(1, "REFUSED"): 1}
    assert [(cause, count) for (_, cause), count in plane.backend_failures().items()] == [("REFUSED", 1)]


def test_a_task_that_is_gone_counts_when_the_client_is_told() -> None:
    plane, other = owner(), identity(seed=bytes(7) + b"\x09")
    for count in (0, 1, 2):
        plane.run("mesh_ingress", arriving(segment(CLIENT4, 40000, NODE4, 80), other))
        assert plane.failures().get((1, "NO_BACKEND"), 0) == count
    plane.run("mesh_ingress", arriving(segment(CLIENT4, 40001, NODE4, 80, "A"), other))
    assert plane.failures() == {(1, "NO_BACKEND"): 2}


def test_datagrams_larger_than_the_path_and_no_segments() -> None:
    plane = caller(mtu=1280)
    plane.away(4, PEER4, 5353, bytes(range(8)), protocol=UDP)
    plane.frontend(3, 53, [(4, 4)], protocol=UDP)
    send(plane, "mesh_ingress", [datagram(CLIENT4, 40000, NODE4, 53, bytes(size), flags="DF") for size in (100, 1250)])
    send(plane, "mesh_ingress", [segment(CLIENT4, 40000, NODE4, 80, "A", bytes(1300))])
    assert plane.verdicts() == {"TUNNEL_TX": 1, "TUNNEL_TOO_BIG": 2}
    assert plane.failures() == {(3, "TOO_BIG"): 1}


def test_answers_larger_than_the_path() -> None:
    plane = owner(mtu=1280)
    plane.backend(4, TASK4, 5353, protocol=UDP)
    plane.frontend(3, 53, [(4, 4)], protocol=UDP)
    plane.maps["mesh_ids"].update(identity(5353, UDP), u32(4))
    plane.run("mesh_ingress", arriving(datagram(CLIENT4, 40000, NODE4, 53), identity(5353, UDP)))
    send(plane, "mesh_task", [datagram(TASK4, 5353, CLIENT4, 40000, bytes(size), flags="DF") for size in (100, 1250)])
    assert plane.failures() == {(3, "TOO_BIG"): 1}


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A namespace without routes."""
    name = f"mesh{os.getpid()}-none"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    try:
        commands = ("ip link set lo up", "sysctl -q -w net.ipv4.ip_forward=1")
        for command in commands:
            subprocess.run(["ip", "netns", "exec", name, *command.split()], check=True, timeout=30)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=30)


def test_an_answer_without_a_way_back(nowhere: str) -> None:
    plane = owner()
    plane.run("mesh_ingress", arriving(segment(CLIENT4, 40000, NODE4, 80), identity()))
    plane.maps["mesh_nodes"].delete_batch(plane.maps["mesh_nodes"].dump()[0])
    answers = [segment(TASK4, 8080, CLIENT4, 40000, flags) for flags in ("SA", "A")]
    with inside(nowhere):
        assert send(plane, "mesh_task", answers) == [SHOT, SHOT]
    assert plane.failures() == {(1, "NO_PATH"): 1}
