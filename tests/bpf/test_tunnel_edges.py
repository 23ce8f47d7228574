# SPDX-License-Identifier: Apache-2.0
"""Edges of the tunnel between nodes, packet by packet: other IP versions, fragments, ICMP errors, hostile packets."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded

from tests.bpf.again import Again
from tests.bpf.plane import OK, REDIRECT, SHOT, Plane, packed, u32
from tests.bpf.plane import UDP as PROTO_UDP
from tests.bpf.tunnel import (
    CLIENT,
    HERE,
    PEER4,
    PEER6,
    PORT,
    REPLY,
    TASK,
    THERE,
    VERSIONS,
    far,
    identity,
    near,
    unwrapped,
    wrapped,
)
from tests.support.fragments import Order, cut, last_first, swapped
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    ETHER,
    IP,
    NODE4,
    NODE6,
    TASK4,
    TCP,
    UDP,
    Ether,
    IPv6,
    become,
    datagram,
    requoted,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere", "plain_and_proven")]

TRIAL = "192.0.0.8"  # both inner addresses of a trial of the tunnel

BUILD = pytest.mark.parametrize(("build", "protocol"), [(segment, 6), (datagram, 17)], ids=["tcp", "udp"])


@VERSIONS
@BUILD
def test_every_step_of_a_flow(inner: int, outer: int, build: Any, protocol: int) -> None:
    ident = identity(8080, protocol)
    call = build(CLIENT[inner], 40000, HERE[inner], 80, **({"flags": "A"} if protocol == 6 else {}), data=b"question")
    reply = build(TASK[inner], 8080, CLIENT[inner], 40000, **({"flags": "A"} if protocol == 6 else {}), data=b"answer")
    plane = near(inner, outer, protocol)
    out = plane.run("mesh_ingress", bytes(call))
    assert out.retval == REDIRECT
    assert unwrapped(out.data, outer) == (ident, become(call)[14:])
    plane = far(inner, outer, protocol)
    out = plane.run("mesh_ingress", wrapped(become(call), HERE[outer], THERE[outer], ident))
    assert (out.retval, out.data[14:]) == (REDIRECT, become(call, dst=TASK[inner], dport=8080, hops=2)[14:])
    assert out.data[12:14] == bytes(call)[12:14]
    out = plane.run("mesh_task", bytes(reply))
    assert out.retval == REDIRECT
    back = become(reply, src=HERE[inner], sport=80)
    assert unwrapped(out.data, outer) == (REPLY, back[14:])
    plane = near(inner, outer, protocol)
    out = plane.run("mesh_ingress", wrapped(back, THERE[outer], HERE[outer], REPLY))
    assert (out.retval, out.data[14:]) == (REDIRECT, become(reply, src=HERE[inner], sport=80, hops=2)[14:])
    assert plane.verdicts() == {"TUNNEL_REPLY_RX": 1}


@VERSIONS
@pytest.mark.parametrize("step", ["leave", "arrive", "depart", "return"])
def test_segments_are_clamped_to_the_way_wherever_it_is_known(inner: int, outer: int, step: str) -> None:
    plane = near(inner, outer, mtu=1400) if step in ("leave", "return") else far(inner, outer, mtu=1400)
    call = segment(CLIENT[inner], 40000, HERE[inner], 80)
    reply = segment(HERE[inner], 80, CLIENT[inner], 40000, "SA")
    if step == "leave":
        packet = unwrapped(plane.run("mesh_ingress", bytes(call)).data, outer)[1]
    elif step == "return":
        packet = plane.run("mesh_ingress", wrapped(bytes(reply), THERE[outer], HERE[outer], REPLY)).data[14:]
    else:
        packet = plane.run("mesh_ingress", wrapped(bytes(call), HERE[outer], THERE[outer], identity())).data[14:]
    if step == "depart":
        answer = segment(TASK[inner], 8080, CLIENT[inner], 40000, "SA")
        packet = unwrapped(plane.run("mesh_task", bytes(answer)).data, outer)[1]
    parsed = IP(packet) if inner == 4 else IPv6(packet)
    room, headers = (64 if outer == 4 else 84), (40 if inner == 4 else 60)
    assert dict(parsed[TCP].options)["MSS"] == 1400 - room - headers
    check = parsed[TCP].chksum
    del parsed[TCP].chksum
    assert parsed.__class__(bytes(parsed))[TCP].chksum == check


@VERSIONS
def test_what_does_not_fit_is_told_to_either_side(inner: int, outer: int) -> None:
    room = 64 if outer == 4 else 84
    call = segment(CLIENT[inner], 40000, HERE[inner], 80, "A", bytes(1400))
    plane = near(inner, outer, mtu=1400)
    errors = [Ether(plane.run("mesh_ingress", bytes(call)).data)]
    plane = far(inner, outer, mtu=1400)
    plane.run(
        "mesh_ingress",
        wrapped(bytes(segment(CLIENT[inner], 40000, HERE[inner], 80, "A")), HERE[outer], THERE[outer], identity()),
    )
    answer = segment(TASK[inner], 8080, CLIENT[inner], 40000, "A", bytes(1400))
    errors.append(Ether(plane.run("mesh_task", bytes(answer)).data))
    for error, frame in zip(errors, (call, answer), strict=True):
        sent = frame[IP] if inner == 4 else frame[IPv6]
        if inner == 4:
            assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (3, 4, 1400 - room)
            assert (error[IP].src, error[IP].dst) == (sent.dst, sent.src)
        else:
            assert error[ICMPv6PacketTooBig].mtu == 1400 - room
            assert (error[IPv6].src, error[IPv6].dst) == (sent.dst, sent.src)


@VERSIONS
def test_hops_that_are_used_up_are_told_through_the_tunnel(inner: int, outer: int) -> None:
    plane = far(inner, outer)
    frame = segment(CLIENT[inner], 40000, HERE[inner], 80, "A", ttl=1)
    out = plane.run("mesh_ingress", wrapped(bytes(frame), HERE[outer], THERE[outer], identity()))
    ident, packet = unwrapped(out.data, outer)
    assert (out.retval, ident, plane.verdicts()) == (REDIRECT, REPLY, {"EXPIRED": 1})
    if inner == 4:
        assert IP(packet)[ICMP].type == 11
    else:
        assert ICMPv6TimeExceeded in IPv6(packet)
    plane = near(inner, outer)
    out = plane.run(
        "mesh_ingress", wrapped(ETHER.build()[:12] + bytes(frame)[12:14] + packet, THERE[outer], HERE[outer], REPLY)
    )
    assert (out.retval, plane.verdicts()) == (REDIRECT, {"TUNNEL_REPLY_RX": 1})


def test_fragments_follow_their_first() -> None:
    plane = near(protocol=PROTO_UDP)
    call = datagram(CLIENT4, 40000, NODE4, 80, bytes(800), id=77)
    first = ETHER / IP(src=CLIENT4, dst=NODE4, id=77, flags="MF", proto=17) / bytes(call[UDP])[:408]
    second = ETHER / IP(src=CLIENT4, dst=NODE4, id=77, frag=51, proto=17) / bytes(call[UDP])[408:]
    inner = []
    for fragment in (first, second):
        out = plane.run("mesh_ingress", bytes(fragment))
        ident, packet = unwrapped(out.data, 4)
        assert ident == identity(8080, PROTO_UDP)
        inner.append(packet)
    assert plane.verdicts() == {"TUNNEL_TX": 2}
    plane = far(protocol=PROTO_UDP)
    ether = bytes(call)[:14]
    for packet in inner:
        out = plane.run("mesh_ingress", wrapped(ether + packet, NODE4, PEER4, identity(8080, PROTO_UDP)))
        assert (out.retval, IP(out.data[14:]).dst) == (REDIRECT, TASK4)
    assert plane.verdicts() == {"TUNNEL_RX": 2}


@VERSIONS
@pytest.mark.parametrize("order", [swapped, last_first])
def test_fragments_that_the_network_between_nodes_has_put_in_another_order(inner: int, outer: int, order: Order) -> None:
    """A node keeps them as they came: each is proven by itself when it comes in again."""
    ether = ETHER.build()[:12] + (b"\x86\xdd" if inner == 6 else b"\x08\0")
    called, client, task = (HERE[inner], 80), (CLIENT[inner], 40000), (TASK[inner], 8080)
    for source, target, ident, plane in (
        (client, called, identity(8080, PROTO_UDP), far(inner, outer, PROTO_UDP)),
        (called, client, REPLY, near(inner, outer, PROTO_UDP)),
    ):
        ends = (HERE[outer], THERE[outer]) if target == called else (THERE[outer], HERE[outer])
        pieces = [wrapped(ether + piece, *ends, ident) for piece in cut(source, target, bytes(3000), 9)]
        whole = cut(*((client, task) if target == called else (called, client)), bytes(3000), 9, ttl=63)
        with Again(plane, "mesh_ingress") as node:
            node.run(order(pieces))
            assert sorted(frame[14:] for frame in node.sent) == sorted(whole)
            assert node.sent[0][14:] == whole[0]
            early = plane.verdicts()["EARLY"]
        assert early == order(pieces).index(pieces[0])


def test_errors_about_replies_reach_the_task() -> None:
    """A router on the clients' side: to the near node, through the tunnel, to the task; each sees its own packet."""
    plane = near()
    quoted = segment(NODE4, 80, CLIENT4, 40000, "A", bytes(100))[IP]
    icmp = ICMP(type=3, code=4, nexthopmtu=1300)
    frame = ETHER / IP(src="203.0.113.1", dst=NODE4) / icmp / bytes(quoted)[:48]
    out = plane.run("mesh_ingress", bytes(frame))
    ident, packet = unwrapped(out.data, 4)
    assert (ident, plane.verdicts()) == (identity(), {"TUNNEL_TX": 1})
    plane = far()
    call = segment(CLIENT4, 40000, NODE4, 80, "A")
    plane.run("mesh_ingress", wrapped(bytes(call), NODE4, PEER4, identity()))
    out = plane.run("mesh_ingress", wrapped(bytes(frame)[:14] + packet, NODE4, PEER4, identity()))
    expected = IP(src="203.0.113.1", dst=TASK4, ttl=62) / icmp / requoted(quoted, src=TASK4, sport=8080)[:48]
    got = IP(out.data[14:])
    assert (out.retval, got.src, got.dst, got.ttl) == (REDIRECT, "203.0.113.1", TASK4, 62)
    assert bytes(got)[28:48] == requoted(quoted, src=TASK4, sport=8080)[:20]
    assert bytes(got)[:20] == bytes(expected)[:20]
    assert plane.verdicts() == {"TUNNEL_RX": 1, "TUNNEL_ICMP": 1}


def test_errors_of_the_task_reach_the_client() -> None:
    plane = far(protocol=PROTO_UDP)
    call = datagram(CLIENT4, 40000, NODE4, 80)
    delivered = plane.run("mesh_ingress", wrapped(bytes(call), NODE4, PEER4, identity(8080, PROTO_UDP))).data
    frame = ETHER / IP(src=TASK4, dst=CLIENT4) / ICMP(type=3, code=3) / delivered[14:42]
    out = plane.run("mesh_task", bytes(frame))
    ident, packet = unwrapped(out.data, 4)
    assert (ident, plane.verdicts()) == (REPLY, {"TUNNEL_RX": 1, "ICMP_OUT": 1})
    assert (IP(packet).src, IP(packet).dst) == (NODE4, CLIENT4)
    plane = near(protocol=PROTO_UDP)
    out = plane.run("mesh_ingress", wrapped(bytes(frame)[:14] + packet, PEER4, NODE4, REPLY))
    assert (out.retval, plane.verdicts()) == (REDIRECT, {"TUNNEL_REPLY_RX": 1})


@pytest.mark.parametrize(
    ("source", "mtu", "noted"),
    [
        (PEER4, 1300, True),
        (PEER4, 1279, False),
        (PEER4, 576, False),
        (PEER4, 1500, False),
        ("203.0.113.7", 1300, False),
    ],
)
def test_the_way_tells_what_it_takes(source: str, mtu: int, noted: bool) -> None:
    """A router between the nodes, about a packet to `source`. Once the agent has seen to it, the client is told."""
    plane = near()
    quoted = IP(src=NODE4, dst=source, flags="DF") / UDP(sport=50000, dport=PORT, chksum=0, len=1400)
    error = ETHER / IP(src="203.0.113.1", dst=NODE4) / ICMP(type=3, code=4, nexthopmtu=mtu) / quoted
    assert plane.run("mesh_ingress", bytes(error)).retval == OK  # the kernel may look at it, too
    assert plane.verdicts() == ({"TUNNEL_PMTU": 1} if noted else {})
    assert plane.believe_hints() == noted
    call = bytes(segment(CLIENT4, 40000, NODE4, 80, "A", bytes(1300)))
    answer = Ether(plane.run("mesh_ingress", call).data)
    assert (ICMP in answer) == noted
    if noted:
        assert answer[ICMP].nexthopmtu == 1300 - 64


@pytest.mark.parametrize("quoted", ["ports", "tunnel", "other option", "other port"])
def test_an_error_must_quote_what_the_tunnel_sends(quoted: str) -> None:
    plane = near()
    sent = Ether(plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80, "A"))).data)[IP]
    raw = bytearray(bytes(sent))
    raw[20:22] = b"\x10\x00" if quoted == "other port" else raw[20:22]
    raw[36] ^= quoted == "other option"  # the option's class
    error = ETHER / IP(src="203.0.113.1", dst=NODE4) / ICMP(type=3, code=4, nexthopmtu=1300)
    plane.run("mesh_ingress", bytes(error / bytes(raw)[: 28 if quoted == "ports" else 200]))
    assert plane.believe_hints() == (quoted in ("ports", "tunnel"))


HOSTILE = [
    pytest.param({"words": 5}, id="more-options"),
    pytest.param({"words": 0x44}, id="version"),
    pytest.param({"flags": 0xC0}, id="control"),
    pytest.param({"type": 0x6558}, id="ethernet"),
    pytest.param({"type": 0x86DD}, id="other-inner-version"),
    pytest.param({"vni": 0x100}, id="network"),
    pytest.param({"class": 0x0100}, id="class"),
    pytest.param({"option": 0x01}, id="option"),
    pytest.param({"length": 2}, id="length"),
]


@pytest.mark.parametrize("changes", HOSTILE)
def test_other_geneve_is_dropped(changes: dict[str, Any]) -> None:
    plane = far()
    frame = wrapped(bytes(segment(CLIENT4, 40000, NODE4, 80)), NODE4, PEER4, identity(), **changes)
    assert plane.run("mesh_ingress", frame).retval == SHOT
    other = Plane.proofs[0] and changes.get("type") == 0x86DD  # what it is then proven to be is nothing that there is
    assert plane.verdicts() == {"TUNNEL_UNPROVEN" if other else "TUNNEL_INVALID": 1}


def test_a_tunnel_in_the_tunnel_is_dropped() -> None:
    plane = far()
    once = wrapped(bytes(segment(CLIENT4, 40000, NODE4, 80)), NODE4, PEER4, identity())
    for ident in (identity(), identity(8080, PROTO_UDP), REPLY):
        assert plane.run("mesh_ingress", wrapped(once, NODE4, PEER4, ident)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_INVALID": 3}


def test_unknown_flags_and_another_protocol_are_dropped() -> None:
    plane = far()
    frame = bytes(segment(CLIENT4, 40000, NODE4, 80))
    for ident in (identity(flags=8), identity(flags=3), identity(protocol=PROTO_UDP)):
        assert plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, ident)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_INVALID": 3}


def test_replies_of_a_node_that_never_got_the_flow_are_dropped() -> None:
    """Another node of the cluster, a port that nobody serves, a flow of a local task, a reply to this node itself."""
    third = "192.0.2.3"
    plane = near()
    plane.tunnel(8, third, NODE4)
    plane.backend(4, TASK4, 8080)
    plane.frontend(2, 81, [(4, 4)])
    good = bytes(segment(NODE4, 80, CLIENT4, 40000, "A"))
    for source, frame in (
        (third, good),
        (PEER4, bytes(segment(NODE4, 443, CLIENT4, 40000, "A"))),
        (PEER4, bytes(segment(NODE4, 81, CLIENT4, 40000, "A"))),
        (PEER4, bytes(segment(NODE4, 80, NODE4, 40000, "A"))),
    ):
        assert plane.run("mesh_ingress", wrapped(frame, source, NODE4, REPLY)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_INVALID": 4}
    assert plane.run("mesh_ingress", wrapped(good, PEER4, NODE4, REPLY)).retval == REDIRECT


def test_answers_to_trials_are_left_to_the_agent() -> None:
    plane = near()
    answer = bytes(segment(TRIAL, 0, TRIAL, 40000, "R"))
    out = plane.run("mesh_ingress", wrapped(answer, PEER4, NODE4, REPLY))
    assert (out.retval, out.data[14:]) == (0, answer[14:])  # TC_ACT_OK: no program after ours sees it
    assert plane.verdicts() == {"TUNNEL_TRIAL": 1}
    for other in (
        segment(TRIAL, 1, TRIAL, 40000, "R"),
        segment("192.0.0.9", 0, TRIAL, 40000, "R"),
        segment(TRIAL, 0, NODE4, 40000, "R"),
        datagram(TRIAL, 0, TRIAL, 40000),
    ):
        assert plane.run("mesh_ingress", wrapped(bytes(other), PEER4, NODE4, REPLY)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_TRIAL": 1, "TUNNEL_INVALID": 4}
    assert plane.run("mesh_ingress", wrapped(answer, "203.0.113.66", NODE4, REPLY)).retval == SHOT


def test_replies_from_an_address_that_has_moved_away_go_on() -> None:
    """A floating address: the node that had it has replies under way, and the client may have nothing to say."""
    plane = near()
    plane.maps["mesh_addresses"].update(packed(PEER6), u32(1))
    moved = bytes(segment("192.0.2.200", 80, CLIENT4, 40000, "A"))
    assert plane.run("mesh_ingress", wrapped(moved, PEER4, NODE4, REPLY)).retval == REDIRECT


def test_fragments_of_the_tunnel_are_no_packets() -> None:
    plane = far()
    whole = Ether(wrapped(bytes(segment(CLIENT4, 40000, NODE4, 80, "A", bytes(900))), NODE4, PEER4, identity()))
    first = ETHER / IP(src=NODE4, dst=PEER4, id=9, flags="MF", proto=17) / bytes(whole[UDP])[:400]
    assert plane.run("mesh_ingress", bytes(first)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_INVALID": 1}


def test_no_way_is_left_to_the_kernel() -> None:
    plane = near()
    plane.maps["mesh_nodes"].delete(packed(PEER4))
    frame = bytes(segment(CLIENT4, 40000, NODE4, 80))
    out = plane.run("mesh_ingress", frame)
    assert (out.retval, out.data) == (OK, frame)
    assert plane.verdicts() == {"TUNNEL_NO_PATH": 1}


def test_calls_of_containers_are_left_to_the_kernel() -> None:
    plane = near()
    frame = bytes(segment(TASK4, 40000, NODE4, 80))
    out = plane.run("mesh_task", frame)
    assert (out.retval, out.data, plane.verdicts()) == (OK, frame, {"TUNNEL_NO_PATH": 1})


def test_a_task_of_the_other_version_is_left_to_the_kernel() -> None:
    plane = near(4, 4)
    plane.local(NODE6)
    frame = bytes(segment(CLIENT6, 40000, NODE6, 80))
    out = plane.run("mesh_ingress", frame)
    assert (out.retval, out.data, plane.verdicts()) == (OK, frame, {"FAMILY": 1})


def test_a_backend_at_an_address_of_the_far_node_itself_is_not_there() -> None:
    """Its replies would not come by a task's interface: refused like a task that nobody knows, not lost in lo."""
    plane = far()
    plane.backend(3, PEER4, 8080, ifindex=0, bridge=1)
    start, later = (bytes(segment(CLIENT4, 40000, NODE4, 80, flags)) for flags in "SA")
    assert plane.run("mesh_ingress", wrapped(start, NODE4, PEER4, identity())).retval == SHOT
    for frame, flags in ((start, "RA"), (later, "R")):
        out = plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, identity()))
        ident, packet = unwrapped(out.data, 4)
        assert (out.retval, ident, str(IP(packet)[TCP].flags)) == (REDIRECT, REPLY, flags)
    assert plane.verdicts() == {"TUNNEL_NO_BACKEND": 3}
