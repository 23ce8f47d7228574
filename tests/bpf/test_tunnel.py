# SPDX-License-Identifier: Apache-2.0
"""Packet tables of the tunnel between nodes; expected bytes by scapy (RFC 8926)."""

from __future__ import annotations

import struct

import pytest
from scapy.contrib.geneve import GENEVE

from tests.bpf.plane import DIRECT, OK, REDIRECT, SHOT
from tests.bpf.tunnel import PEER4, PORT, SEED, caller, identity, owner, wrapped
from tests.support.frames import CLIENT4, ETHER, IP, NODE4, TASK4, TCP, UDP, Ether, become, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ROOM = 64  # with a proof, whether there is one or not


def test_a_clients_packet_is_wrapped_for_the_node_of_its_task() -> None:
    plane = caller()
    frame = segment(CLIENT4, 40000, NODE4, 80, "A", b"question")
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    outer = Ether(out.data)
    assert (outer[IP].src, outer[IP].dst, outer[UDP].dport, outer[UDP].chksum) == (NODE4, PEER4, PORT, 0)
    assert outer[UDP].sport >= 0xC000
    right = outer.copy()
    del right[IP].chksum
    del right[IP].len
    assert bytes(right)[14:34] == out.data[14:34]
    assert outer[UDP].len == len(out.data) - 34
    geneve = GENEVE(out.data[42:])
    assert (geneve.version, geneve.optionlen, geneve.critical, geneve.proto) == (0, 4, 1, 0x0800)
    assert out.data[50:66] == struct.pack("!HBB", 0xFF6D, 0x81, 3) + identity()
    assert out.data[66:] == become(frame)[14:]
    assert plane.verdicts() == {"TUNNEL_TX": 1}


def test_a_path_that_changes_leaves_established_flows_where_they_are() -> None:
    """Owner 2 is the task by the tunnel, 3 the same task by the peer port, to which the fallback proxy hands over."""
    plane = caller()
    plane.away(3, PEER4, 8080, SEED, version=0)
    plane.frontend(1, 80, [(3, 2)])
    started = [segment(CLIENT4, 40000, NODE4, 80, flags) for flags in ("S", "A", "PA")]
    assert [plane.run("mesh_ingress", bytes(frame)).retval for frame in started] == [OK] * 3
    assert plane.verdicts() == {"TUNNEL_NO_PATH": 3}
    established = bytes(segment(CLIENT4, 40001, NODE4, 80, "A", b"question"))
    assert plane.run("mesh_ingress", established).retval == REDIRECT
    assert plane.verdicts() == {"TUNNEL_NO_PATH": 3, "TUNNEL_TX": 1}
    plane.frontend(1, 80, [(2, 3)])  # and back: the flow that began meanwhile stays with the proxy
    assert plane.run("mesh_ingress", bytes(started[1])).retval == OK
    assert plane.run("mesh_ingress", bytes(segment(CLIENT4, 40002, NODE4, 80))).retval == REDIRECT
    assert plane.verdicts() == {"TUNNEL_NO_PATH": 4, "TUNNEL_TX": 2}


def test_a_first_refusal_does_not_leave_the_owners_node() -> None:
    plane = owner()
    call = wrapped(bytes(segment(CLIENT4, 40000, NODE4, 80)), NODE4, PEER4, identity())
    refusal = segment(TASK4, 8080, CLIENT4, 40000, "RA")
    refusal[TCP].seq = 0
    for retval in (SHOT, REDIRECT):
        assert plane.run("mesh_ingress", call).retval == REDIRECT
        assert plane.run("mesh_task", bytes(refusal)).retval == retval
    assert plane.verdicts() == {"TUNNEL_RX": 2, "RESET_HELD": 1, "TUNNEL_REPLY_TX": 1}


def test_there_and_back_through_the_owners_node() -> None:
    plane = owner()
    for flags in ("S", "A"):
        frame = segment(CLIENT4, 40000, NODE4, 80, flags, b"" if flags == "S" else b"question")
        out = plane.run("mesh_ingress", wrapped(bytes(frame), NODE4, PEER4, identity()))
        assert (out.retval, plane.verdicts().get("TUNNEL_RX")) == (REDIRECT, 1 if flags == "S" else 2), plane.verdicts()
        if flags == "A":
            assert out.data == become(frame, dst=TASK4, dport=8080)
    reply = segment(TASK4, 8080, CLIENT4, 40000, "A", b"answer")
    out = plane.run("mesh_task", bytes(reply))
    assert out.retval == REDIRECT
    assert out.data[66:] == become(reply, src=NODE4, sport=80)[14:]
    assert out.data[54:66] == identity(0, 0, bytes(8), 1)
    assert plane.verdicts()["TUNNEL_REPLY_TX"] == 1


def test_direct_return_leaves_without_the_tunnel() -> None:
    plane = owner(settings=DIRECT)
    frame = segment(CLIENT4, 40000, NODE4, 80, "A")
    plane.run("mesh_ingress", wrapped(bytes(frame), NODE4, PEER4, identity()))
    reply = segment(TASK4, 8080, CLIENT4, 40000, "A", b"answer")
    assert plane.run("mesh_task", bytes(reply)).data == become(reply, src=NODE4, sport=80)


def test_segments_fit_the_way_after_a_syn() -> None:
    plane = caller(mtu=1280)
    out = plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80)))
    inner = IP(out.data[66:])
    assert dict(inner["TCP"].options)["MSS"] == 1280 - ROOM - 40
    check = inner["TCP"].chksum
    del inner["TCP"].chksum
    assert IP(bytes(inner))["TCP"].chksum == check


def test_too_big_is_told_to_the_sender() -> None:
    plane = caller(mtu=1280)
    out = plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80, "A", bytes(1300))))
    error = Ether(out.data)
    assert (out.retval, error["ICMP"].type, error["ICMP"].code, error["ICMP"].nexthopmtu) == (
        REDIRECT,
        3,
        4,
        1280 - ROOM,
    )
    assert plane.verdicts() == {"TUNNEL_TOO_BIG": 1}


def test_only_nodes_are_listened_to() -> None:
    plane = owner()
    frame = bytes(segment(CLIENT4, 40000, NODE4, 80))
    assert plane.run("mesh_ingress", wrapped(frame, "203.0.113.66", PEER4, identity())).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_FOREIGN": 1}


@pytest.mark.parametrize("cut", [10, 30, 34, 40, 60])
def test_truncated_packets_are_dropped(cut: int) -> None:
    plane = owner()
    whole = Ether(wrapped(bytes(segment(CLIENT4, 40000, NODE4, 80)), NODE4, PEER4, identity()))
    frame = ETHER / IP(src=NODE4, dst=PEER4) / UDP(sport=50000, dport=PORT, chksum=0) / bytes(whole)[42 : 42 + cut]
    assert plane.run("mesh_ingress", bytes(frame)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_INVALID": 1}


def test_an_unknown_task_drops_starts_once_and_resets_others() -> None:
    plane = owner()
    start = bytes(segment(CLIENT4, 40000, NODE4, 80))
    other = identity(seed=bytes(8)[:-1] + b"\x09")
    assert plane.run("mesh_ingress", wrapped(start, NODE4, PEER4, other)).retval == SHOT
    later = bytes(segment(CLIENT4, 40001, NODE4, 80, "A"))
    for frame, flags in ((start, "RA"), (later, "R")):
        out = plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, other))
        assert out.retval == REDIRECT
        inner = IP(out.data[66:])
        assert (inner.src, inner.dst, str(inner["TCP"].flags)) == (NODE4, CLIENT4, flags)
        assert out.data[54:66] == identity(0, 0, bytes(8), 1)
    assert plane.verdicts() == {"TUNNEL_NO_BACKEND": 3}


def test_udp_port_of_the_tunnel_on_other_addresses_passes() -> None:
    plane = owner()
    frame = bytes(datagram(CLIENT4, 40000, "192.0.2.99", PORT))
    assert plane.run("mesh_ingress", frame).retval == OK
