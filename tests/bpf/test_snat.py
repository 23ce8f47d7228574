# SPDX-License-Identifier: Apache-2.0
"""Flows that cannot keep their source towards the task: the port is taken there, or the task has the client's network.

Expected bytes by scapy; the ports that such flows get by the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6PacketTooBig

from mesh._abi import SETTING_DIRECT
from tests.bpf.plane import OK, PASS, REDIRECT, SHOT, TRACKED, Plane, explained
from tests.bpf.tunnel import PEER4, identity, owner, unwrapped, wrapped
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
    Ether,
    Raw,
    become,
    datagram,
    error,
    l3,
    requoted,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Build = Callable[..., Any]
SECOND4, SECOND6, GATE4, GATE6 = "192.0.2.2", "2001:db8::2", "172.18.0.1", "fd00:18::1"
TCP4 = (segment, CLIENT4, NODE4, SECOND4, 80, TASK4, 8080)
TCP6 = (segment, CLIENT6, NODE6, SECOND6, 86, TASK6, 8080)
UDP4 = (datagram, CLIENT4, NODE4, SECOND4, 53, TASK4, 5353)
UDP6 = (datagram, CLIENT6, NODE6, SECOND6, 56, TASK6, 5353)
FLOWS = pytest.mark.parametrize("flow", [TCP4, TCP6, UDP4, UDP6], ids=["tcp4", "tcp6", "udp4", "udp6"])
REVERSE = ("mesh_revnat", "mesh_revnat_udp", "mesh_revnat_new")


@pytest.fixture
def both(plane: Plane) -> Plane:
    """The node has a second address, at which the same tasks are called."""
    plane.local(SECOND4, SECOND6)
    return plane


def ports(flow: tuple[Any, ...], called: str, sport: int = 40000) -> list[int]:
    """The ports that a flow to `called` may get instead of its own."""
    build, client, _, _, port, _, _ = flow
    protocol = 6 if build is segment else 17
    return list(selection.source_ports((selection.address(client), sport, selection.address(called), port, protocol)))


def start(plane: Plane, flow: tuple[Any, ...], called: str, sport: int = 40000, *, proven: bool = False) -> bytes:
    """The first packet of a flow as the task gets it; with `proven`, its next ones go there as well."""
    build, client, _, _, port, task, target = flow
    out = plane.run("mesh_ingress", bytes(build(client, sport, called, port)))
    assert out.retval == REDIRECT, plane.verdicts()
    if proven and build is segment:
        seen = Ether(out.data)["TCP"].sport
        source = l3(Ether(out.data)).src
        assert plane.run("mesh_task", bytes(segment(task, target, source, seen, "SA"))).retval == REDIRECT
    if proven:
        more = ("A",) if build is segment else ()
        assert plane.run("mesh_ingress", bytes(build(client, sport, called, port, *more))).retval == REDIRECT
    return out.data


def empty(plane: Plane, *names: str) -> None:
    for name in names:
        if keys := plane.maps[name].dump()[0]:
            plane.maps[name].delete_batch(keys)


@FLOWS
@pytest.mark.parametrize("proven", [False, True])
def test_a_taken_port_is_replaced_and_the_address_kept(both: Plane, flow: tuple[Any, ...], proven: bool) -> None:
    build, client, node, second, port, task, target = flow
    start(both, flow, node, proven=proven)
    first, *_ = ports(flow, second)
    frame = build(client, 40000, second, port, data=b"x")
    for _ in range(3):  # a SYN that comes again keeps its port
        out = both.run("mesh_ingress", bytes(frame))
        assert (out.retval, out.data) == (REDIRECT, become(frame, sport=first, dst=task, dport=target))
    for called, seen in ((second, first), (node, 40000)):
        answer = build(task, target, client, seen, data=b"answer")
        assert both.run("mesh_task", bytes(answer)).data == become(answer, src=called, sport=port, dport=40000)
    assert both.verdicts()["TRANSLATED"] == 3
    assert "COLLISION" not in {cause for _, cause in both.failures()}


@FLOWS
def test_it_keeps_the_port_while_it_lives(both: Plane, flow: tuple[Any, ...]) -> None:
    """The other flow ends and makes room: this one does not move. An entry that is lost is made again."""
    build, client, node, second, port, task, target = flow
    start(both, flow, node, proven=True)
    start(both, flow, second, proven=True)
    first, *_ = ports(flow, second)
    frame = build(client, 40000, second, port, *(("PA",) if build is segment else ()), data=b"more")
    right = become(frame, sport=first, dst=task, dport=target)
    for name in REVERSE:
        for key, _ in list(both.maps[name].rows()):
            if int.from_bytes(key[32:34], "big") == 40000:
                both.maps[name].delete(key)
    assert both.run("mesh_ingress", bytes(frame)).data == right
    start(both, flow, node, proven=True)
    empty(both, *REVERSE)
    start(both, flow, node)
    assert both.run("mesh_ingress", bytes(frame)).data == right
    answer = build(task, target, client, first, *(("A",) if build is segment else ()), data=b"answer")
    assert both.run("mesh_task", bytes(answer)).data == become(answer, src=second, sport=port, dport=40000)


def test_it_ends_and_is_counted_like_any_other(both: Plane) -> None:
    start(both, TCP4, NODE4, proven=True)
    start(both, TCP4, SECOND4, proven=True)
    first, *_ = ports(TCP4, SECOND4)
    assert both.counts("mesh_be_metrics", 2)[4:] == (2, 0)
    assert both.run("mesh_ingress", bytes(segment(CLIENT4, 40000, SECOND4, 80, "FA"))).retval == REDIRECT
    assert both.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, first, "FA"))).retval == REDIRECT
    assert both.counts("mesh_be_metrics", 2)[4:] == (2, 1)


def test_two_published_ports_of_one_task(plane: Plane) -> None:
    start(plane, TCP4, NODE4)
    frame = segment(CLIENT4, 40000, NODE4, 8080)
    out = Ether(plane.run("mesh_ingress", bytes(frame)).data)
    assert (out[IP].src, out["TCP"].dport) == (CLIENT4, 8080)
    assert out["TCP"].sport != 40000
    assert plane.verdicts() == {"FORWARD": 1, "TRANSLATED": 1}


def test_who_has_the_port_by_nature_gets_another_as_well(both: Plane) -> None:
    """A port that a flow was given may be another client port's own."""
    start(both, TCP4, NODE4, proven=True)
    start(both, TCP4, SECOND4, proven=True)
    taken, *_ = ports(TCP4, SECOND4)
    seen = Ether(start(both, TCP4, SECOND4, taken, proven=True))["TCP"].sport
    assert seen == ports(TCP4, SECOND4, taken)[0]
    answer = segment(TASK4, 8080, CLIENT4, seen, "A", b"answer")
    assert both.run("mesh_task", bytes(answer)).data == become(answer, src=SECOND4, sport=80, dport=taken)
    answer = segment(TASK4, 8080, CLIENT4, taken, "A", b"answer")
    assert both.run("mesh_task", bytes(answer)).data == become(answer, src=SECOND4, sport=80, dport=40000)


@FLOWS
@pytest.mark.parametrize("free", [1, 5, 8])
def test_it_is_refused_when_all_ports_are_taken(both: Plane, flow: tuple[Any, ...], free: int) -> None:
    build, client, node, second, port, task, target = flow
    start(both, flow, node, proven=True)
    tries = ports(flow, second)
    for each in tries[:free]:
        start(both, flow, node, each, proven=True)
    frame = build(client, 40000, second, port)
    out = both.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    if free < 8:
        assert out.data == become(frame, sport=tries[free], dst=task, dport=target)
        return
    refusal = l3(Ether(out.data))
    assert (refusal.src, refusal.dst) == (second, client)
    assert both.verdicts()["COLLISION"] == 1
    ((_, cause),) = both.failures()
    assert cause == "COLLISION"


def test_of_ports_that_anybody_can_have_forged_one_is_free_soon(both: Plane) -> None:
    """Its client's kernel sends the SYN again after a second, and after three."""
    for each in (40000, *ports(TCP4, SECOND4)):
        start(both, TCP4, NODE4, each)
    assert both.run("mesh_ingress", bytes(segment(CLIENT4, 40000, SECOND4, 80))).retval == SHOT
    assert both.verdicts()["COLLISION"] == 1


@FLOWS
@pytest.mark.parametrize("proven", [False, True])
def test_icmp_errors_find_it_both_ways(both: Plane, flow: tuple[Any, ...], proven: bool) -> None:
    build, client, node, second, port, task, target = flow
    start(both, flow, node, proven=proven)
    got = l3(Ether(start(both, flow, second, proven=proven)))
    first, *_ = ports(flow, second)
    icmp = ICMPv6PacketTooBig(mtu=1400) if ":" in node else ICMP(type=3, code=4, nexthopmtu=1400)
    sent = l3(Ether(bytes(build(second, port, client, 40000, data=b"answer"))))
    frame = error(client, second, icmp, bytes(sent), 60)
    quoted = requoted(sent, src=task, sport=target, dport=first)
    right = error(client, task, icmp, quoted, 59)
    assert both.run("mesh_ingress", frame).data == right
    frame = error(task, client, icmp, bytes(got), 60)
    quoted = requoted(got, dst=second, dport=port, sport=40000)
    right = error(second, client, icmp, quoted, 59)
    assert both.run("mesh_task", frame).data == right


def test_fragments_follow(both: Plane) -> None:
    start(both, UDP4, NODE4)
    first, *_ = ports(UDP4, SECOND4)
    more = bytes(16)
    parts = [
        ETHER / IP(src=CLIENT4, dst=SECOND4, id=7, flags="MF") / datagram(CLIENT4, 40000, SECOND4, 53, more)["UDP"],
        ETHER / IP(src=CLIENT4, dst=SECOND4, id=7, frag=3, proto=17) / Raw(b"the rest"),
    ]
    head, rest = (both.run("mesh_ingress", bytes(part)) for part in parts)
    assert (head.retval, rest.retval) == (REDIRECT, REDIRECT)
    assert (Ether(head.data)["UDP"].sport, Ether(head.data)[IP].dst) == (first, TASK4)
    assert (Ether(rest.data)[IP].src, Ether(rest.data)[IP].dst) == (CLIENT4, TASK4)
    parts = [
        ETHER / IP(src=TASK4, dst=CLIENT4, id=8, flags="MF") / datagram(TASK4, 5353, CLIENT4, first, more)["UDP"],
        ETHER / IP(src=TASK4, dst=CLIENT4, id=8, frag=3, proto=17) / Raw(b"the rest"),
    ]
    head, rest = (both.run("mesh_task", bytes(part)) for part in parts)
    assert (head.retval, rest.retval) == (REDIRECT, REDIRECT)
    assert (Ether(head.data)["UDP"].dport, Ether(head.data)[IP].src) == (40000, SECOND4)
    assert (Ether(rest.data)[IP].src, Ether(rest.data)[IP].dst) == (SECOND4, CLIENT4)


def test_a_slot_in_transition_finds_it_without_a_note(both: Plane) -> None:
    start(both, TCP4, NODE4, proven=True)
    start(both, TCP4, SECOND4, proven=True)
    both.frontend(1, 80, [(2, PASS | TRACKED)])
    frame = segment(CLIENT4, 40000, SECOND4, 80, "PA", b"more")
    first, *_ = ports(TCP4, SECOND4)
    assert both.run("mesh_ingress", bytes(frame)).data == become(frame, sport=first, dst=TASK4, dport=8080)
    assert both.run("mesh_ingress", bytes(segment(CLIENT4, 40001, SECOND4, 80, "PA"))).retval == OK


def test_explain_foretells_it(both: Plane) -> None:
    start(both, TCP4, NODE4)
    frame = bytes(segment(CLIENT4, 40000, SECOND4, 80))
    before = [both.maps[name].dump() for name in REVERSE]
    assert explained(both.run("mesh_explain", frame))[0] == "TRANSLATED"
    assert explained(both.run("mesh_explain", bytes(segment(CLIENT4, 40001, SECOND4, 80))))[0] == "FORWARD"
    assert [both.maps[name].dump() for name in REVERSE] == before


# Behind the tunnel


def arriving(node: str, called: str, flags: str, data: bytes = b"") -> bytes:
    return wrapped(bytes(segment(CLIENT4, 40000, called, 80, flags, data)), node, PEER4, identity())


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("direct", [False, True])
def test_calls_of_two_nodes_with_one_port(direct: bool) -> None:
    """The node of the task sees what none of the nodes that were called can see."""
    plane = owner(settings=SETTING_DIRECT * direct)
    third = "192.0.2.3"
    plane.tunnel(8, third, PEER4)
    for node in (NODE4, third):
        assert plane.run("mesh_ingress", arriving(node, node, "S")).retval == REDIRECT
    (first, *_) = ports(TCP4, third)
    assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, first, "SA"))).retval == REDIRECT
    frame = segment(CLIENT4, 40000, third, 80, "A", b"question")
    out = plane.run("mesh_ingress", arriving(third, third, "A", b"question"))
    assert out.data == become(frame, sport=first, dst=TASK4, dport=8080)
    for seen, node in ((40000, NODE4), (first, third)):
        answer = segment(TASK4, 8080, CLIENT4, seen, "A", b"answer")
        out = plane.run("mesh_task", bytes(answer))
        right = become(answer, src=node, sport=80, dport=40000)
        if direct:
            assert out.data == right
        else:
            assert Ether(out.data)[IP].dst == node
            assert unwrapped(out.data, 4)[1] == right[14:]
    assert plane.verdicts()["TRANSLATED"] == 2


# Clients whose network the task has itself


@pytest.fixture
def near(plane: Plane) -> Plane:
    """The tasks have the clients' networks themselves."""
    for number, (task, port, protocol) in enumerate(
        ((TASK4, 8080, 6), (TASK6, 8080, 6), (TASK4, 5353, 17), (TASK6, 5353, 17)), start=2
    ):
        v6 = ":" in task
        networks = ["2001:db8:9::/64"] if v6 else ["198.51.100.0/24", "10.0.0.0/8"]
        plane.backend(number, task, port, protocol=protocol, networks=networks, source=GATE6 if v6 else GATE4, bridge=2)
    return plane


@FLOWS
def test_a_neighbours_address_is_replaced(near: Plane, flow: tuple[Any, ...]) -> None:
    build, client, node, _, port, task, target = flow
    gate = GATE6 if ":" in node else GATE4
    first, *_ = ports(flow, node)
    frame = build(client, 40000, node, port, data=b"x")
    out = near.run("mesh_ingress", bytes(frame))
    assert (out.retval, out.data) == (REDIRECT, become(frame, src=gate, sport=first, dst=task, dport=target))
    answer = build(task, target, gate, first, *(("SA",) if build is segment else ()), data=b"answer")
    right = become(answer, src=node, sport=port, dst=client, dport=40000)
    assert near.run("mesh_task", bytes(answer)).data == right
    more = build(client, 40000, node, port, *(("A",) if build is segment else ()), data=b"more")
    out = near.run("mesh_ingress", bytes(more))
    assert out.data == become(more, src=gate, sport=first, dst=task, dport=target)
    assert near.verdicts() == {"TRANSLATED": 2, "REPLY": 1}


@FLOWS
def test_other_clients_keep_theirs(near: Plane, flow: tuple[Any, ...]) -> None:
    """Whether or not they share the bits that spare the look-up."""
    build, client, node, _, port, task, target = flow
    others = ["2001:db9:9::9", "2003:db8::9"] if ":" in node else ["198.51.101.9", "203.0.113.9", "9.1.2.3"]
    for other in others:
        frame = build(other, 40000, node, port)
        assert near.run("mesh_ingress", bytes(frame)).data == become(frame, dst=task, dport=target)
    assert client not in others
    assert near.verdicts() == {"FORWARD": len(others)}


def test_containers_of_the_node_are_neighbours(near: Plane) -> None:
    """They answer for their addresses on the task's bridge."""
    near.backend(2, TASK4, 8080, networks=["172.18.0.0/16"], source=GATE4, bridge=2)
    frame = segment("172.18.0.77", 40000, NODE4, 80)
    assert near.run("mesh_task", bytes(frame)).data == become(frame, dst=TASK4, dport=8080)
    outside = near.run("mesh_ingress", bytes(segment("172.18.0.77", 40001, NODE4, 80)))
    assert Ether(outside.data)[IP].src == GATE4
    near.backend(2, TASK4, 8080, networks=["172.18.0.0/16"], source=GATE4, bridge=1)  # by which the packet comes in
    frame = segment("172.18.0.78", 40000, NODE4, 80)
    assert near.run("mesh_bridge", bytes(frame)).data == become(frame, dst=TASK4, dport=8080)


def test_many_neighbours_with_one_port(near: Plane) -> None:
    seen = set()
    for host in range(1, 200):
        frame = segment(f"198.51.100.{host}", 40000, NODE4, 80)
        out = Ether(near.run("mesh_ingress", bytes(frame)).data)
        assert out[IP].src == GATE4
        seen.add(out["TCP"].sport)
    assert len(seen) == 199
    assert all(1024 <= port < 32768 for port in seen)


@FLOWS
def test_icmp_errors_of_a_neighbour(near: Plane, flow: tuple[Any, ...]) -> None:
    build, client, node, _, port, task, target = flow
    gate = GATE6 if ":" in node else GATE4
    got = l3(Ether(start(near, flow, node)))
    first, *_ = ports(flow, node)
    icmp = ICMPv6PacketTooBig(mtu=1400) if ":" in node else ICMP(type=3, code=4, nexthopmtu=1400)
    router = "2001:db8:77::1" if ":" in node else "203.0.113.1"
    sent = l3(Ether(bytes(build(node, port, client, 40000, data=b"answer"))))
    for sender, shown in ((client, gate), (router, router)):
        frame = error(sender, node, icmp, bytes(sent), 60)
        quoted = requoted(sent, src=task, sport=target, dst=gate, dport=first)
        right = error(shown, task, icmp, quoted, 59)
        assert near.run("mesh_ingress", frame).data == right
    frame = error(task, gate, icmp, bytes(got), 60)
    quoted = requoted(got, dst=node, dport=port, src=client, sport=40000)
    right = error(node, client, icmp, quoted, 59)
    assert near.run("mesh_task", frame).data == right
    assert near.run("mesh_explain", bytes(build(client, 40000, node, port))).retval == OK


def test_a_neighbour_that_called_another_node() -> None:
    plane = owner()
    plane.backend(3, TASK4, 8080, networks=["198.51.100.0/24"], source=GATE4)
    out = plane.run("mesh_ingress", arriving(NODE4, NODE4, "A"))
    first, *_ = ports(TCP4, NODE4)
    frame = segment(CLIENT4, 40000, NODE4, 80, "A")
    assert out.data == become(frame, src=GATE4, sport=first, dst=TASK4, dport=8080)
    answer = segment(TASK4, 8080, GATE4, first, "A")
    _, inner = unwrapped(plane.run("mesh_task", bytes(answer)).data, 4)
    assert inner == become(answer, src=NODE4, sport=80, dst=CLIENT4, dport=40000)[14:]
