# SPDX-License-Identifier: Apache-2.0
"""Proofs in the tunnel, packet by packet: what is accepted, what is not, and by whose word. The proofs are made by
tests/oracle/tunnel_proof.py. What proven flows meet is tested by test_tunnel_edges, test_second_chance and
test_tunnel_wires."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP

from mesh import _abi
from tests.bpf.again import Again
from tests.bpf.plane import REDIRECT, SHOT, Plane, packed
from tests.bpf.plane import UDP as PROTO_UDP
from tests.bpf.tunnel import KEY, PEER4, PEER6, REPLY, THERE, far, identity, near, unwrapped, wrapped
from tests.oracle import tunnel_proof as oracle
from tests.support.fragments import cut
from tests.support.frames import CLIENT4, CLIENT6, ETHER, IP, NODE4, NODE6, TASK4, UDP, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere")]

PROVE, DEMAND = 1, 2
OLD, UNKNOWN = (0x0BADC0DE, bytes(16)), (0x12345678, bytes(range(16)))
CALL = bytes(segment(CLIENT4, 40000, NODE4, 80, "A", b"question"))
ANSWER = bytes(segment(NODE4, 80, CLIENT4, 40000, "A", b"answer"))
ID = identity()
EPOCH = 1 << oracle.EPOCH  # nanoseconds


def owner(flags: int = PROVE | DEMAND, keys: tuple[tuple[int, bytes], ...] = (KEY, OLD)) -> Plane:
    """The node of the task, to which NODE4 hands over."""
    plane = far()
    plane.tunnel(7, NODE4, PEER4, flags=flags, keys=keys)
    return plane


def called(flags: int = PROVE | DEMAND, keys: tuple[tuple[int, bytes], ...] = (KEY, OLD)) -> Plane:
    """The node that a client calls, to which PEER4 replies."""
    plane = near()
    plane.tunnel(7, PEER4, NODE4, flags=flags, keys=keys)
    return plane


def proof(
    frame: bytes = CALL,
    ident: bytes = ID,
    *,
    key: tuple[int, bytes] = KEY,
    sender: str = NODE4,
    receiver: str = PEER4,
    later: int = 0,
) -> bytes:
    return oracle.proof(key, sender, receiver, frame[14:], ident, oracle.now() + later)


def unproven(plane: Plane, node: str) -> int:
    value = plane.maps["mesh_nodes"].lookup(packed(node))
    assert value
    return _abi.NODE.unpack(value).unproven


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


FORGED: list[tuple[str, Callable[[], bytes]]] = [
    ("no proof", bytes),
    ("zeros", lambda: bytes(12)),
    *((f"byte {at} changed", lambda at=at: flipped(proof(), at)) for at in range(12)),  # type: ignore[misc]
    ("a key that nobody has", lambda: proof(key=UNKNOWN)),
    ("the name of a key, and another secret", lambda: proof(key=(KEY[0], OLD[1]))),
    ("too old", lambda: proof(later=-9)),
    ("too new", lambda: proof(later=9)),
    ("of 2^16 epochs before", lambda: proof(later=-65536)),
    ("of another client", lambda: proof(bytes(segment("198.51.100.77", 40000, NODE4, 80, "A")))),
    ("of another client's port", lambda: proof(bytes(segment(CLIENT4, 40001, NODE4, 80, "A")))),
    ("of another address called", lambda: proof(bytes(segment(CLIENT4, 40000, "192.0.2.99", 80, "A")))),
    ("of another port called", lambda: proof(bytes(segment(CLIENT4, 40000, NODE4, 81, "A")))),
    ("of a datagram", lambda: proof(bytes(datagram(CLIENT4, 40000, NODE4, 80)))),
    ("of another task", lambda: proof(ident=identity(seed=bytes(8)))),
    ("of another port of the task", lambda: proof(ident=identity(8081))),
    ("of a question", lambda: proof(ident=identity(flags=2))),
    ("of what another node sent", lambda: proof(sender="192.0.2.3")),
    ("of what was sent to another node", lambda: proof(receiver="192.0.2.3")),
    ("of what this node sent", lambda: proof(sender=PEER4, receiver=NODE4)),
]


@pytest.mark.parametrize("forge", [pytest.param(make, id=name.replace(" ", "-")) for name, make in FORGED])
def test_what_is_not_proven_is_dropped_and_counted(forge: Callable[[], bytes]) -> None:
    """Also when packets of the same flow have just been proven."""
    plane = owner()
    for seen in (0, 1):
        assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, forge())).retval == SHOT
        assert plane.verdicts().get("TUNNEL_UNPROVEN") == seen + 1
        assert unproven(plane, NODE4) == seen + 1
        assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, proof())).retval == REDIRECT
    assert plane.verdicts() == {"TUNNEL_UNPROVEN": 2, "TUNNEL_RX": 2}


@pytest.mark.parametrize("later", [-6, -1, 0, 1, 6])
@pytest.mark.parametrize("key", [KEY, OLD], ids=["in-use", "before"])
def test_what_is_proven_is_delivered(key: tuple[int, bytes], later: int) -> None:
    plane = owner()
    for _ in range(3):
        frame = wrapped(CALL, NODE4, PEER4, ID, proof(key=key, later=later))
        assert plane.run("mesh_ingress", frame).retval == REDIRECT
    assert plane.verdicts() == {"TUNNEL_RX": 3}


def test_a_forged_reply_reaches_no_client() -> None:
    plane = called()
    assert plane.run("mesh_ingress", CALL).retval == REDIRECT
    good = proof(ANSWER, REPLY, sender=PEER4, receiver=NODE4)
    for made in (b"", flipped(good, 11), proof(ANSWER, REPLY)):
        assert plane.run("mesh_ingress", wrapped(ANSWER, PEER4, NODE4, REPLY, made)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_TX": 1, "TUNNEL_UNPROVEN": 3}
    assert plane.run("mesh_ingress", wrapped(ANSWER, PEER4, NODE4, REPLY, good)).retval == REDIRECT


def test_a_forged_return_changes_no_note() -> None:
    """MESH_TUNNEL_BACK: by it a node moves a flow to its slot's previous owner."""
    plane = called()
    back = identity(flags=4)
    assert plane.run("mesh_ingress", wrapped(CALL, PEER4, NODE4, back)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_UNPROVEN": 1}


def error(source: str = "203.0.113.1", sport: int = 80, destination: str = CLIENT4) -> bytes:
    quoted = segment(NODE4, sport, destination, 40000, "A", bytes(100))[IP]
    return bytes(ETHER / IP(src=source, dst=NODE4) / ICMP(type=3, code=4, nexthopmtu=1300) / bytes(quoted)[:48])


def test_an_icmp_error_is_proven_by_what_it_quotes() -> None:
    plane = owner()
    assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, proof())).retval == REDIRECT
    for made in (b"", proof(CALL), proof(error(sport=81)), proof(error(destination="198.51.100.77"))):
        assert plane.run("mesh_ingress", wrapped(error(), NODE4, PEER4, ID, made)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_RX": 1, "TUNNEL_UNPROVEN": 4}
    assert plane.run("mesh_ingress", wrapped(error(), NODE4, PEER4, ID, proof(error()))).retval == REDIRECT
    assert plane.verdicts() == {"TUNNEL_RX": 1, "TUNNEL_UNPROVEN": 4, "TUNNEL_ICMP": 1}


def test_fragments_are_proven_one_by_one() -> None:
    plane = far(protocol=PROTO_UDP)
    plane.tunnel(7, NODE4, PEER4, flags=3, keys=(KEY,))
    ident = identity(8080, PROTO_UDP)
    data = bytes(datagram(CLIENT4, 40000, NODE4, 80, bytes(800))[UDP])
    first = bytes(ETHER / IP(src=CLIENT4, dst=NODE4, id=77, flags="MF", proto=17) / data[:408])
    second = bytes(ETHER / IP(src=CLIENT4, dst=NODE4, id=77, frag=51, proto=17) / data[408:])
    for frame, other in ((first, second), (second, first)):
        assert plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, ident, proof(other, ident))).retval == SHOT
        assert plane.run("mesh_ingress", wrapped(frame, NODE4, PEER4, ident, proof(frame, ident))).retval == REDIRECT
    assert plane.verdicts() == {"TUNNEL_UNPROVEN": 2, "TUNNEL_RX": 2}


def test_a_fragment_that_is_not_proven_stores_no_ports() -> None:
    """It has what was kept come in again, which is then kept as before."""
    plane, ident = far(protocol=PROTO_UDP), identity(8080, PROTO_UDP)
    plane.tunnel(7, NODE4, PEER4, flags=3, keys=(KEY,))
    inner = [ETHER.build()[:12] + b"\x08\0" + p for p in cut((CLIENT4, 40000), (NODE4, 80), bytes(3000), 9)]
    first, *later = (wrapped(frame, NODE4, PEER4, ident, proof(frame, ident)) for frame in inner)
    forged = wrapped(inner[0], NODE4, PEER4, ident, proof(inner[1], ident))
    with Again(plane, "mesh_ingress") as node:
        node.run(later)
        assert node.run([forged]) == [SHOT] and not node.sent
        node.run([first])
        assert len(node.sent) == len(inner)


def test_of_a_node_that_need_not_prove_only_forged_proofs_are_refused() -> None:
    """As while builds are mixed: no proof, an unknown key and a wrong clock count as no proof."""
    plane = owner(flags=0)
    for made in (b"", proof(key=UNKNOWN), proof(later=20), proof()):
        assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, made)).retval == REDIRECT
    assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, flipped(proof(), 5))).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_RX": 4, "TUNNEL_UNPROVEN": 1}


def test_a_node_without_a_key_takes_proofs_for_none() -> None:
    plane = owner(flags=0, keys=())
    assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, proof())).retval == REDIRECT
    plane = owner(flags=DEMAND, keys=())
    assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, proof())).retval == SHOT


def leaves_proven(plane: Plane) -> bool:
    data = plane.run("mesh_ingress", CALL).data
    assert data[42] in (4, 7)
    return data[42] == 7


def test_proofs_are_sent_to_nodes_that_understand_them() -> None:
    """By the agent's word, or by that node's own proof, for as long as it proves."""
    assert leaves_proven(called(PROVE))
    plane = called(0)
    assert not leaves_proven(plane)
    answer = bytes(segment(NODE4, 80, CLIENT4, 40321, "A"))
    good = proof(answer, REPLY, sender=PEER4, receiver=NODE4)
    for made in (b"", flipped(good, 5)):
        plane.run("mesh_ingress", wrapped(answer, PEER4, NODE4, REPLY, made))
        assert not leaves_proven(plane)
    assert plane.run("mesh_ingress", wrapped(answer, PEER4, NODE4, REPLY, good)).retval == REDIRECT
    assert leaves_proven(plane)
    plane.configure(clock=time.time_ns() - time.monotonic_ns() + 3 * EPOCH)
    assert not leaves_proven(plane)


def test_proofs_follow_the_clock_of_the_day() -> None:
    plane = called()
    with_proofs, plain = Plane.proofs, time.time_ns() - time.monotonic_ns()
    try:
        Plane.proofs = (PROVE, (KEY,))
        unwrapped(plane.run("mesh_ingress", CALL).data, 4)
    finally:
        Plane.proofs = with_proofs
    plane = owner()
    plane.configure(clock=plain + 10 * EPOCH)
    call = bytes(segment(CLIENT4, 40123, NODE4, 80, "A"))  # a flow that has just been proven needs no look at the clock
    assert plane.run("mesh_ingress", wrapped(call, NODE4, PEER4, ID, proof(call))).retval == SHOT
    assert plane.run("mesh_ingress", wrapped(call, NODE4, PEER4, ID, proof(call, later=10))).retval == REDIRECT


@pytest.mark.parametrize(("inner", "outer"), [(4, 4), (6, 4), (4, 6), (6, 6)])
def test_many_flows_do_not_take_each_others_proofs(inner: int, outer: int) -> None:
    """More than the programs remember: each packet has the proof of its own flow."""
    Plane.proofs = (PROVE, (KEY,))
    try:
        plane = near(inner, outer)
        client, node = (CLIENT4, NODE4) if inner == 4 else (CLIENT6, NODE6)
        frame = bytearray(bytes(segment(client, 1024, node, 80, "A")))
        port = 34 if inner == 4 else 54
        for turn in range(2):
            for number in range(0, 6000, 1 + 6 * turn):
                frame[port : port + 2] = struct.pack("!H", 1024 + number)
                out = plane.run("mesh_ingress", bytes(frame)).data
                if number % 97 == 0 or turn:
                    unwrapped(out, outer)
    finally:
        Plane.proofs = (0, ())


def test_the_room_of_a_proof_is_kept_where_there_is_none() -> None:
    """So that a flow that began before its nodes prove fits when they do."""
    for flags in (0, PROVE):
        plane = near(mtu=1400)
        plane.tunnel(7, THERE[4], NODE4, mtu=1400, flags=flags, keys=(KEY,))
        largest = bytes(segment(CLIENT4, 40000, NODE4, 80, "A", bytes(1400 - 64 - 40)))
        out = plane.run("mesh_ingress", largest)
        assert out.retval == REDIRECT and len(out.data) - 14 == (1400 if flags else 1388)
        assert plane.verdicts() == {"TUNNEL_TX": 1}
        plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80, "A", bytes(1400 - 64 - 40 + 1))))
        assert plane.verdicts() == {"TUNNEL_TX": 1, "TUNNEL_TOO_BIG": 1}


def test_other_lengths_of_the_option_are_invalid() -> None:
    for more, declared in ((12, 2), (12, 4), (8, 2), (16, 4)):
        plane = owner()
        frame = wrapped(
            CALL, NODE4, PEER4, ID, proof().ljust(16, b"\0")[:more], words=4 + declared, length=3 + declared
        )
        assert plane.run("mesh_ingress", frame).retval == SHOT
        assert plane.verdicts() == {"TUNNEL_INVALID": 1}


def test_a_truncated_proof_is_invalid() -> None:
    plane = owner()
    whole = wrapped(CALL, NODE4, PEER4, ID, proof())
    frame = ETHER / IP(src=NODE4, dst=PEER4) / UDP(sport=50000, dport=6084, chksum=0) / whole[42 : 42 + 30]
    assert plane.run("mesh_ingress", bytes(frame)).retval == SHOT
    assert plane.verdicts() == {"TUNNEL_INVALID": 1}


def test_nodes_that_know_each_other_by_ipv6() -> None:
    plane = far(4, 6)
    plane.tunnel(7, NODE6, PEER6, flags=3, keys=(KEY,))
    for made, retval in ((b"", SHOT), (proof(sender=NODE6, receiver=PEER6), REDIRECT)):
        assert plane.run("mesh_ingress", wrapped(CALL, NODE6, PEER6, ID, made)).retval == retval


def test_what_the_task_answers_is_proven() -> None:
    plane = owner()
    assert plane.run("mesh_ingress", wrapped(CALL, NODE4, PEER4, ID, proof())).retval == REDIRECT
    Plane.proofs = (PROVE, (KEY,))
    try:
        for _ in range(2):
            out = plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "A", b"answer")))
            assert unwrapped(out.data, 4)[0] == REPLY
    finally:
        Plane.proofs = (0, ())
