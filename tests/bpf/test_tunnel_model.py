# SPDX-License-Identifier: Apache-2.0
"""Random packets between nodes through the programs and through the model in plain Python: equal verdicts and bytes.

MESH_FUZZ_SEED sets the seed.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from tests.bpf.packets import Packets
from tests.bpf.plane import HAIRPIN, HAIRPIN6, PASS, REDIRECT, SHOT, TRACKED, Plane, packed, steady_stamp, u32
from tests.bpf.tunnel import REPLY, identity, wrapped
from tests.oracle.frames import TCP, UDP, parse
from tests.oracle.state import Backend, Frontend, same
from tests.oracle.tunnel import Spanning

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere")]

SEED = int(os.environ.get("MESH_FUZZ_SEED", "1"))
PACKETS = 12000
HERE, THERE, THIRD, HERE6 = "192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1"
VIP, VIP6 = "192.0.2.200", "2001:db8::200"
ID = bytes(range(8))
ASK, BACK = 2, 4
CALLED = {
    2: ("172.18.0.2", 8002, TCP),
    3: ("172.18.0.3", 8003, UDP),
    4: ("fd00::4", 8004, TCP),
    5: ("172.18.0.5", 8002, TCP),
}
# For other nodes only: where flows of several frontends meet at one task, what mesh_recent confirms is not looked at.
NAMED = {6: ("172.18.0.6", 8002, TCP), 7: ("172.18.0.7", 8003, UDP), 8: ("fd00::8", 8004, TCP)}
AWAY = {
    10: (THERE, 8010, TCP, 4),
    11: (THERE, 8011, UDP, 4),
    12: (THIRD, 8012, TCP, 6),
    13: (THIRD, 8013, TCP, 4),
    14: ("192.0.2.4", 8014, UDP, 4),  # no node
    15: (THERE, 8015, TCP, 4),
}
FRONTENDS = {
    1: (80, TCP, [(10, 10), (2, 2), (13, 13)]),
    2: (53, UDP, [(11, 11), (3, 3), (14, 14)]),
    3: (86, TCP, [(12, 12), (4, 4)]),
    4: (81, TCP, [(13, 10 | TRACKED), (5, 10 | TRACKED), (10, 5 | TRACKED), (10, PASS | TRACKED), (10, 15 | TRACKED)]),
}
CLIENTS = {4: ["198.51.100.1", "198.51.100.2"], 6: ["2001:db8:9::1"]}


def twin() -> tuple[Plane, Spanning]:
    plane, known = Plane.fresh(), Spanning(packed(HAIRPIN), packed(HAIRPIN6), clock=steady_stamp)
    plane.local(HERE, HERE6)
    plane.local(VIP, VIP6, floating=True)
    known.floating, known.own = {packed(VIP), packed(VIP6)}, packed(HERE)
    known.addresses = known.floating | {packed(HERE), packed(HERE6)}
    for number, (node, mtu) in enumerate(((THERE, 1500), (THIRD, 220))):
        plane.tunnel(number, node, HERE, mtu=mtu)
        known.nodes[packed(node)] = mtu
    for owner, (address, port, protocol) in (CALLED | NAMED).items():
        plane.backend(owner, address, port, protocol=protocol)
        known.backends[owner] = Backend(packed(address), port, 1, 1)
        if owner in NAMED:
            plane.maps["mesh_ids"].update(identity(port, protocol, ID), u32(owner))
            known.ids[identity(port, protocol, ID)] = owner
    for owner, (node, port, protocol, version) in AWAY.items():
        plane.away(owner, node, port, ID, protocol=protocol, version=version)
        known.backends[owner] = Backend(packed(node), port, 1, 1)
        known.away[owner] = (identity(port, protocol, ID), version)
    for number, (port, protocol, slots) in FRONTENDS.items():
        plane.frontend(number, port, slots, protocol=protocol)
        known.frontends[number] = Frontend(slots)
        known.any_address[protocol, port] = number
    return plane, known


class Calls(Packets):
    """What clients send to this node, nodes send through the tunnel, and tasks answer."""

    def one(self) -> tuple[str, bytes]:
        kind = self.chance.random()
        version = self.chance.choice((4, 4, 4, 6))
        client = packed(self.chance.choice(CLIENTS[version]))
        sport = self.chance.randrange(1000, 1020)
        if kind < 0.3:
            protocol, port = self.chance.choice(((TCP, 80), (UDP, 53), (TCP, 86), (TCP, 81)))
            here = packed((VIP if version == 4 else VIP6) if port == 81 else HERE if version == 4 else HERE6)
            return "mesh_ingress", self.transport(client, sport, here, port, protocol)
        if kind < 0.45 and self.forwarded:
            p = parse(self.chance.choice(self.forwarded))
            return "mesh_task", self.transport(p.destination, p.dport, p.source, p.sport, p.protocol)
        source = self.chance.choice((THERE, THERE, THIRD, "203.0.113.66"))
        protocol = self.chance.choice((TCP, UDP))
        called = packed(self.chance.choice(("203.0.113.7", HERE, VIP) if version == 4 else (HERE6, VIP6)))
        port = self.chance.choice((80, 53, 86, 81, 81))
        way = self.chance.random()
        if way < 0.4:
            inner, ident = self.transport(called, port, client, sport, protocol), REPLY
        elif way < 0.6:
            inner = self.transport(client, sport, called, port, protocol)
            ident = identity(self.chance.choice((8010, 8013)), protocol, ID, flags=BACK)
        else:
            inner = self.transport(client, sport, called, port, protocol)
            target = self.chance.choice((8002, 8003, 8004, 8005))
            flags = self.chance.choice((0, 0, 0, ASK))
            ident = identity(target, self.chance.choice((protocol, protocol, protocol, TCP)), ID, flags=flags)
        if self.chance.random() < 0.2:
            inner = self.mutated(inner)
        frame = bytearray(wrapped(inner, source, HERE, ident))
        if self.chance.random() < 0.1:
            frame[self.chance.randrange(42, 66)] = self.chance.choice((0, 1, 0xFF))
        return "mesh_ingress", bytes(frame).ljust(60, b"\0")


def portless(frame: bytes | None, expected: bool) -> bytes:
    """Without the tunnel's source port, which is the flow's hash or nothing that the model knows."""
    frame = frame or b""
    return frame[:34] + bytes(2) + frame[36:] if expected else frame


def test_random_packets_between_nodes_meet_what_the_model_says() -> None:
    chance = random.Random(SEED)
    plane, known = twin()
    calls = Calls(chance)
    seen = Counter[str]()
    for _ in range(PACKETS):
        program, frame = calls.one()
        expected = known.ingress(frame) if program == "mesh_ingress" else known.task(frame)
        out = plane.run(program, frame)
        seen[expected.verdict] += 1
        tunnelled = (expected.frame or b"")[34:38] == bytes(2) + (6084).to_bytes(2, "big")
        if expected.verdict == "TUNNEL_TOO_BIG":
            assert out.retval in (SHOT, REDIRECT)  # the answer is in the packet tables
            continue
        expected.frame = portless(expected.frame, tunnelled) if expected.frame is not None else None
        assert same(expected, out.retval, portless(out.data, tunnelled)), (
            f"{program} {frame.hex()}\nexpected {expected.action} {expected.verdict} "
            f"{(expected.frame or b'').hex()}\ngot {out.retval} {out.data.hex()} {plane.verdicts()}"
        )
        if expected.verdict in ("FORWARD", "TUNNEL_RX", "TRANSLATED") and expected.frame:
            calls.forwarded.append(expected.frame)
    assert Counter(plane.verdicts()) == Counter({name: n for name, n in seen.items() if name})
    assert plane.failures() == known.failures
    assert {cause for _, cause in known.failures} >= {"NO_BACKEND", "TOO_BIG"}, known.failures
    assert {"TUNNEL_TX", "TUNNEL_RX", "TUNNEL_REPLY_TX", "TUNNEL_REPLY_RX", "TUNNEL_FOREIGN", "TUNNEL_INVALID",
            "TUNNEL_NO_BACKEND", "TUNNEL_TOO_BIG", "TUNNEL_NO_PATH", "TUNNEL_BACK", "FAMILY", "EXPIRED", "NOTED",
            "PASS", "TRANSLATED", "FRAGMENTED"} <= set(seen), seen  # fmt: skip
