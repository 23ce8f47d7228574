# SPDX-License-Identifier: Apache-2.0
"""Flows that began on another node while their slot was in transition, to an address that has moved here since.

`here` is the node that has the address now; the slot's current owner is on `there`, the previous one on `third`, here,
or PASS. Expected bytes by scapy.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bpf.plane import FREE, OK, PASS, REDIRECT, SHOT, TRACKED, Plane, packed, u32
from tests.bpf.plane import UDP as PROTO_UDP
from tests.bpf.tunnel import PEER4, REPLY, SEED, VERSIONS, identity, unwrapped, wrapped
from tests.support.frames import CLIENT4, CLIENT6, NODE4, NODE6, OTHER4, TASK4, TASK6, Ether, become, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere", "plain_and_proven")]

VIP = {4: "192.0.2.200", 6: "2001:db8::200"}
CLIENT = {4: CLIENT4, 6: CLIENT6}
TASK = {4: TASK4, 6: TASK6}
HERE = {4: NODE4, 6: NODE6}
THERE = {4: PEER4, 6: "2001:db8::2"}
THIRD = {4: "192.0.2.3", 6: "2001:db8::3"}
OLD = {4: "192.0.2.4", 6: "2001:db8::4"}  # the node that had the address
CURRENT, PREVIOUS, LOCAL = 2, 3, 4
ASK, BACK = 2, 4
ID, ASKED, CAME_BACK = identity(), identity(flags=ASK), identity(flags=BACK)
OTHER_ID = identity(8081)


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Plane, Plane]]:
    yield Plane(), Plane()


class Pair:
    """Two nodes: the one that has the address, and that of the current owner."""

    def __init__(
        self, planes: tuple[Plane, Plane], inner: int = 4, outer: int = 4, *, previous: int = PREVIOUS
    ) -> None:
        self.here, self.there = planes
        self.inner, self.outer = inner, outer
        for plane in planes:
            plane.empty()
        self.here.local(HERE[4], HERE[6])
        self.here.local(VIP[inner], floating=True)
        for number, node in enumerate((THERE, THIRD)):
            self.here.tunnel(number, node[outer], HERE[outer])
        self.here.away(CURRENT, THERE[outer], 8080, SEED, version=inner)
        self.here.away(PREVIOUS, THIRD[outer], 8081, SEED, version=inner)
        self.here.backend(LOCAL, OTHER4 if inner == 4 else "fd00:18::4", 8082)
        self.here.frontend(1, 80, [(CURRENT, previous | TRACKED)])
        self.there.local(THERE[outer])
        for number, node in enumerate((HERE, OLD)):
            self.there.tunnel(number, node[outer], THERE[outer])
        self.there.backend(9, TASK[inner], 8080)
        self.there.maps["mesh_ids"].update(ID, u32(9))

    def call(self, flags: str = "A", data: bytes = b"question", sport: int = 40000) -> Ether:
        return segment(CLIENT[self.inner], sport, VIP[self.inner], 80, flags, data)  # type: ignore[return-value]

    def leaves(self, frame: bytes) -> tuple[bytes, bytes, str]:
        """(id, inner packet, node) of what `here` makes of a frame."""
        out = self.here.run("mesh_ingress", frame)
        assert out.retval == REDIRECT, self.here.verdicts()
        node = Ether(out.data)["IP" if self.outer == 4 else "IPv6"].dst
        return (*unwrapped(out.data, self.outer), node)

    def arrives(self, packet: bytes, ident: bytes, source: str = "") -> bytes:
        """What `there` makes of an inner packet."""
        frame = bytes(self.call())[:14] + packet
        out = self.there.run("mesh_ingress", wrapped(frame, source or HERE[self.outer], THERE[self.outer], ident))
        assert out.retval == REDIRECT, self.there.verdicts()
        return out.data

    def begin(self, *flags: str, sport: int = 40000) -> None:
        """Let a flow begin by way of the node that had the address."""
        for each in flags:
            packet = bytes(self.call(each, b"" if "S" in each else b"x", sport))[14:]
            self.arrives(packet, ID, OLD[self.outer])

    def come_back(self, packet: bytes, ident: bytes = CAME_BACK, source: str = "") -> bytes:
        """A frame with a packet that a node sends back."""
        frame = bytes(self.call())[:14] + packet
        return wrapped(frame, source or THERE[self.outer], HERE[self.outer], ident)


@VERSIONS
def test_the_current_owner_is_asked_and_keeps_what_it_knows(
    loaded: tuple[Plane, Plane], inner: int, outer: int
) -> None:
    pair = Pair(loaded, inner, outer)
    pair.begin("S", "A")
    call = pair.call()
    ident, packet, node = pair.leaves(bytes(call))
    assert (ident, node) == (ASKED, THERE[outer])
    assert packet == become(call)[14:]
    assert pair.arrives(packet, ident)[14:] == become(call, dst=TASK[inner], dport=8080, hops=2)[14:]
    assert pair.there.verdicts() == {"TUNNEL_RX": 3}
    answer = segment(TASK[inner], 8080, CLIENT[inner], 40000, "A", b"answer")
    out = pair.there.run("mesh_task", bytes(answer))
    assert Ether(out.data)["IP" if outer == 4 else "IPv6"].dst == HERE[outer]  # no more to the node that had it
    assert unwrapped(out.data, outer) == (REPLY, become(answer, src=VIP[inner], sport=80)[14:])
    assert pair.leaves(bytes(call))[0] == ASKED  # as long as nothing was heard of it; the note is in its place now
    back = bytes(call)[:14] + unwrapped(out.data, outer)[1]
    assert pair.here.run("mesh_ingress", wrapped(back, THERE[outer], HERE[outer], REPLY)).retval == REDIRECT
    assert pair.leaves(bytes(call))[0] == ID
    assert pair.here.verdicts() == {"TUNNEL_TX": 3, "TUNNEL_REPLY_RX": 1}


@VERSIONS
def test_what_it_does_not_know_comes_back_and_is_the_previous_owners(
    loaded: tuple[Plane, Plane], inner: int, outer: int
) -> None:
    pair = Pair(loaded, inner, outer)
    call = pair.call()
    ident, packet, _ = pair.leaves(bytes(call))
    out = pair.arrives(packet, ident)
    assert pair.there.verdicts() == {"TUNNEL_BACK": 1}
    assert Ether(out)["IP" if outer == 4 else "IPv6"].dst == HERE[outer]
    assert unwrapped(out, outer) == (CAME_BACK, packet)
    ident, packet, node = pair.leaves(pair.come_back(packet))
    assert (ident, node) == (OTHER_ID, THIRD[outer])
    assert packet == become(call, hops=2)[14:]
    assert pair.leaves(bytes(call)) == (OTHER_ID, become(call)[14:], THIRD[outer])  # straight from now on
    assert pair.here.verdicts() == {"TUNNEL_TX": 3}


def test_packets_that_were_asked_before_the_first_came_back_follow_it(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded)
    packets = [pair.leaves(bytes(pair.call(data=bytes([n]))))[1] for n in range(3)]
    for packet in packets:
        assert pair.leaves(pair.come_back(packet))[0] == OTHER_ID
    assert pair.here.verdicts() == {"TUNNEL_TX": 6}


@pytest.mark.parametrize("data", [b"question", bytes(3000)])
def test_a_flow_that_the_kernel_had_before_comes_back_to_it(loaded: tuple[Plane, Plane], data: bytes) -> None:
    pair = Pair(loaded, previous=PASS)
    pair.here.tunnel(0, THERE[4], HERE[4], mtu=9000)
    call = pair.call(data=data)
    ident, packet, _ = pair.leaves(bytes(call))
    assert ident == ASKED
    out = pair.here.run("mesh_ingress", pair.come_back(packet))
    assert (out.retval, out.data) == (OK, become(call))
    out = pair.here.run("mesh_ingress", bytes(call))
    assert (out.retval, out.data) == (OK, bytes(call))
    assert pair.here.verdicts() == {"TUNNEL_TX": 1, "PASS": 2}


def test_a_flow_after_a_take_over_is_the_current_owners_if_it_is_known(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded, previous=PASS)
    pair.begin("S")  # its second packet comes by way of the new node
    assert pair.there.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "SA"))).retval == REDIRECT
    call = pair.call("A", b"")
    ident, packet, _ = pair.leaves(bytes(call))
    assert pair.arrives(packet, ident) == become(call, dst=TASK4, dport=8080, hops=2)
    assert pair.there.counts("mesh_be_metrics", 9)[4] == 1


def test_a_flow_that_has_ended_stays_the_current_owners(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded)
    pair.begin("S", "A", "FA")
    pair.there.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "FA")))
    pair.arrives(pair.leaves(bytes(pair.call("A", b"")))[1], ASKED)
    assert pair.there.verdicts()["TUNNEL_RX"] == 4


def test_a_previous_owner_of_this_node_is_known_here(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded, previous=LOCAL)
    pair.here.frontend(1, 80, [(LOCAL, LOCAL)])
    for flags in "SA":
        assert pair.here.run("mesh_ingress", bytes(pair.call(flags))).retval == REDIRECT
    pair.here.frontend(1, 80, [(CURRENT, LOCAL | TRACKED)])
    call = pair.call()
    assert pair.here.run("mesh_ingress", bytes(call)).data == become(call, dst=OTHER4, dport=8082)
    assert pair.here.verdicts() == {"FORWARD": 2, "KEPT": 1}


def test_what_nobody_knows_is_a_local_previous_owners(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded, previous=LOCAL)
    call = pair.call()
    ident, packet, _ = pair.leaves(bytes(call))
    assert ident == ASKED
    out = pair.here.run("mesh_ingress", pair.come_back(packet))
    assert (out.retval, out.data) == (REDIRECT, become(call, dst=OTHER4, dport=8082, hops=2))


def test_nobody_is_asked_where_both_owners_are_here(loaded: tuple[Plane, Plane]) -> None:
    """A node that gets the address and has both tasks: the flow came through the tunnel before."""
    pair = Pair(loaded)
    pair.here.backend(5, TASK4, 8080)
    pair.here.maps["mesh_ids"].update(ID, u32(5))
    pair.here.frontend(1, 80, [(5, LOCAL | TRACKED)])
    call = pair.call()
    for flags in "SA":
        frame = wrapped(bytes(pair.call(flags)), THIRD[4], HERE[4], ID)
        assert pair.here.run("mesh_ingress", frame).retval == REDIRECT
    assert pair.here.run("mesh_ingress", bytes(call)).data == become(call, dst=TASK4, dport=8080)
    other = pair.call(sport=40001)
    assert pair.here.run("mesh_ingress", bytes(other)).data == become(other, dst=OTHER4, dport=8082)
    assert pair.here.verdicts() == {"TUNNEL_RX": 2, "NOTED": 1, "KEPT": 1}


def test_a_task_that_is_not_there_is_not_the_flows(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded)
    pair.there.maps["mesh_ids"].delete(ID)
    packet = pair.leaves(bytes(pair.call()))[1]
    assert unwrapped(pair.arrives(packet, ASKED), 4) == (CAME_BACK, packet)
    assert pair.there.verdicts() == {"TUNNEL_BACK": 1}


def test_nobody_is_asked_about_what_can_not_have_begun_elsewhere(loaded: tuple[Plane, Plane]) -> None:
    """Another address than a floating one, a start, a datagram."""
    pair = Pair(loaded)
    fixed = segment(CLIENT4, 40000, NODE4, 80, "A")
    assert pair.leaves(bytes(fixed))[0] == OTHER_ID
    assert pair.leaves(bytes(pair.call("S", b"")))[0] == ID
    pair.here.away(6, THERE[4], 8080, SEED, protocol=PROTO_UDP)
    pair.here.away(7, THIRD[4], 8081, SEED, protocol=PROTO_UDP)
    pair.here.frontend(2, 80, [(6, 7 | TRACKED)], protocol=PROTO_UDP)
    assert pair.leaves(bytes(datagram(CLIENT4, 40000, VIP[4], 80)))[0] == identity(8081, PROTO_UDP)


@pytest.mark.parametrize("why", ["gone", "no way", "no tunnel", "other version"])
def test_nobody_is_asked_who_can_not_answer(loaded: tuple[Plane, Plane], why: str) -> None:
    pair = Pair(loaded)
    if why == "gone":
        pair.here.away(CURRENT, THERE[4], 8080, SEED, state=FREE)
    elif why == "no way":
        pair.here.maps["mesh_nodes"].delete(packed(THERE[4]))
    elif why == "no tunnel":
        pair.here.tunnel(0, THERE[4], HERE[4], mtu=0)
    else:
        pair.here.away(CURRENT, THERE[4], 8080, SEED, version=6)
    assert pair.leaves(bytes(pair.call()))[0] == OTHER_ID


def test_segments_of_a_flow_that_needed_no_tunnel_before_are_told_their_size(loaded: tuple[Plane, Plane]) -> None:
    """Its task is on the node that had the address: nobody has clamped them."""
    pair = Pair(loaded, previous=PASS)
    error = Ether(pair.here.run("mesh_ingress", bytes(pair.call(data=bytes(1440)))).data)
    assert (error["ICMP"].type, error["ICMP"].code, error["ICMP"].nexthopmtu) == (3, 4, 1436)
    assert pair.leaves(bytes(pair.call(data=bytes(1390))))[0] == ASKED


def test_an_owner_that_was_asked_keeps_its_flow_through_further_changes(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded)
    assert pair.leaves(bytes(pair.call()))[0] == ASKED
    pair.here.away(6, THIRD[4], 8086, SEED)
    pair.here.frontend(1, 80, [(6, PREVIOUS | TRACKED)])
    ident, packet, node = pair.leaves(bytes(pair.call()))
    assert (ident, node) == (ASKED, THERE[4])
    assert pair.leaves(pair.come_back(packet))[0] == OTHER_ID


def test_only_who_was_asked_can_give_a_flow_away(loaded: tuple[Plane, Plane]) -> None:
    pair = Pair(loaded)
    packet = pair.leaves(bytes(pair.call()))[1]
    for source, ident in ((THIRD[4], CAME_BACK), (THERE[4], identity(seed=bytes(7) + b"\x01", flags=BACK))):
        assert pair.leaves(pair.come_back(packet, ident, source))[0] == ASKED
    start = pair.call("S", b"", sport=40001)
    assert pair.leaves(bytes(start))[0] == ID
    late = become(pair.call(sport=40001))[14:]
    assert pair.leaves(pair.come_back(late))[0] == ID  # noted by its start


def test_packets_that_come_back_are_clients_of_a_frontend(loaded: tuple[Plane, Plane]) -> None:
    """Another port, another address, the tunnel's own port, an error, or from a stranger: dropped."""
    pair = Pair(loaded)
    error = bytes.fromhex("0303000000000000") + bytes(pair.call())[14:54]
    bad = [
        become(segment(CLIENT4, 40000, VIP[4], 81, "A"))[14:],
        become(segment(CLIENT4, 40000, "192.0.2.99", 80, "A"))[14:],
        become(datagram(CLIENT4, 40000, NODE4, 6084))[14:],
        bytes(Ether(bytes(pair.call()))["IP"].__class__(src=CLIENT4, dst=VIP[4], proto=1) / error),
    ]
    for packet in bad:
        assert pair.here.run("mesh_ingress", pair.come_back(packet)).retval == SHOT
    assert pair.here.verdicts() == {"TUNNEL_INVALID": 4}
    good = become(pair.call())[14:]
    assert pair.here.run("mesh_ingress", pair.come_back(good, source="203.0.113.66")).retval == SHOT
    assert pair.here.verdicts() == {"TUNNEL_INVALID": 4, "TUNNEL_FOREIGN": 1}


@pytest.mark.parametrize("flags", [ASK | 1, BACK | 1, ASK | BACK, 8])
def test_no_packet_has_two_flags(loaded: tuple[Plane, Plane], flags: int) -> None:
    pair = Pair(loaded)
    frame = wrapped(bytes(pair.call()), HERE[4], THERE[4], identity(flags=flags))
    assert pair.there.run("mesh_ingress", frame).retval == SHOT
    assert pair.there.verdicts() == {"TUNNEL_INVALID": 1}


def test_a_packet_does_not_go_round_for_ever(loaded: tuple[Plane, Plane]) -> None:
    """Even where the notes are lost again and again, it has a time to live."""
    pair = Pair(loaded)
    packet, rounds = become(pair.call())[14:], 0
    while True:
        for name in ("mesh_flows", "mesh_flows_new"):
            if keys := pair.here.maps[name].dump()[0]:
                pair.here.maps[name].delete_batch(keys)
        out = pair.here.run("mesh_ingress", pair.come_back(packet))
        if out.retval != REDIRECT or pair.here.verdicts().get("EXPIRED"):
            break
        packet, rounds = unwrapped(out.data, 4)[1], rounds + 1
    assert 0 < rounds < 64
