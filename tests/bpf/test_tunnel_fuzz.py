# SPDX-License-Identifier: Apache-2.0
"""Mutated packets of the tunnel: one verdict is counted at most, only nodes are heard, only named tasks are reached.

MESH_FUZZ_SEED sets the seed.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from tests.bpf.plane import OK, PASS, REDIRECT, SHOT, TRACKED, packed, u32
from tests.bpf.plane import UDP as PROTO_UDP
from tests.bpf.tunnel import PEER4, PORT, REPLY, far, identity, wrapped
from tests.support.frames import CLIENT4, NODE4, TASK4, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("elsewhere")]

SEED = int(os.environ.get("MESH_FUZZ_SEED", "1"))
PACKETS = 6000
VIP = "192.0.2.200"
ASK, BACK = 2, 4
TASKS = (packed(TASK4)[12:],)


def mutated(chance: random.Random, frame: bytes) -> bytes:
    out = bytearray(frame)
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        if chance.random() < 0.85:
            out[chance.randrange(12, min(len(out), 120))] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
        else:
            del out[chance.randrange(34, len(out) + 1) :]
    return bytes(out)


def test_mutated_packets_reach_no_more_than_they_may() -> None:
    chance = random.Random(SEED)
    plane = far()
    plane.backend(4, TASK4, 8080, protocol=PROTO_UDP)
    plane.maps["mesh_ids"].update(identity(8080, PROTO_UDP), u32(4))
    plane.away(5, NODE4, 8081, bytes(range(8)))
    plane.frontend(1, 81, [(5, 5)])
    plane.local(NODE4.rsplit(".", 1)[0] + ".77")
    plane.local(VIP, floating=True)
    plane.frontend(2, 82, [(5, 3 | TRACKED), (5, PASS | TRACKED)])
    idents = [identity(), identity(8080, PROTO_UDP), identity(8082), REPLY, identity(flags=1), identity(flags=ASK)]
    idents += [identity(flags=BACK), identity(8081, seed=bytes(range(8)), flags=BACK)]
    inner = [segment(CLIENT4, 40000, NODE4, 80, flags, b"question") for flags in ("S", "A", "FA", "R")]
    inner += [segment(CLIENT4, sport, VIP, 82, "A", b"question") for sport in range(40000, 40004)]
    inner += [datagram(CLIENT4, 40000, NODE4, 80), segment("192.0.2.77", 81, CLIENT4, 40000, "A")]
    seen = Counter[str]()
    for _ in range(PACKETS):
        source = chance.choice((NODE4, NODE4, NODE4, "203.0.113.66"))
        packet = mutated(chance, bytes(chance.choice(inner)))
        frame = mutated(chance, wrapped(packet, source, PEER4, chance.choice(idents))).ljust(60, b"\0")
        before = Counter(plane.verdicts())
        out = plane.run("mesh_ingress", frame)
        counted = Counter(plane.verdicts()) - before
        assert out.retval in (OK, SHOT, REDIRECT)
        assert sum(counted.values()) <= 1, frame.hex()
        name = next(iter(counted), "")
        seen[name] += 1
        assert name != "ERROR", frame.hex()
        ours = frame[12:14] == b"\x08\0" and frame[26:30] == packed(NODE4)[12:]
        if name in ("TUNNEL_RX", "NOTED"):
            assert ours and out.data[30:34] in TASKS, frame.hex()
        if name == "PASS":
            assert ours and out.data[36:38] == (82).to_bytes(2, "big"), frame.hex()
        whole = frame[14] == 0x45 and frame[20:22] in (b"\x40\0", b"\0\0") and frame[23] == PROTO_UDP
        if not ours and whole and frame[36:38] == PORT.to_bytes(2, "big"):
            assert name in ("TUNNEL_FOREIGN", "") and out.retval in (SHOT, OK), frame.hex()
    assert {
        "TUNNEL_RX",
        "TUNNEL_FOREIGN",
        "TUNNEL_INVALID",
        "TUNNEL_NO_BACKEND",
        "TUNNEL_REPLY_RX",
        "TUNNEL_BACK",
        "PASS",
        "NOTED",
    } <= set(seen), seen
