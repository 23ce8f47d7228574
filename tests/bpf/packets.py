# SPDX-License-Identifier: Apache-2.0
"""Random frames for the programs and their model."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.bpf.plane import packed
from tests.oracle.frames import ICMP, ICMP6, MAPPED, TCP, UDP, parse, total
from tests.oracle.state import Outcome

NODE4, NODE6, EXACT = "192.0.2.1", "2001:db8::1", "203.0.113.80"
BACKENDS = {owner: (f"172.18.0.{owner}", 8000 + owner, TCP if owner < 20 else UDP) for owner in range(10, 30)}
BACKENDS |= {owner: (f"fd00::{owner}", 8000 + owner, TCP if owner < 40 else UDP) for owner in range(30, 50)}
CLIENTS4 = ["198.51.100.1", "198.51.100.2", "198.51.100.200", "203.0.113.9", "172.18.0.99"]
CLIENTS6 = ["2001:db8:9::1", "2001:db8:9::2", "fd00::99"]
PORTS = [80, 53, 81, 54, 86, 56, 82, 83, 84, 85, 57, 443, 0]


class Packets:
    """Frames: plausible ones, replies to what was forwarded, errors about it, and mutations of all."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.forwarded: list[bytes] = []
        self.makers: list[Callable[[], tuple[str, bytes]]] = [self.call] * 5 + [self.reply] * 3 + [self.error] * 2

    def next(self) -> tuple[str, bytes]:
        program, frame = self.chance.choice(self.makers)()
        if self.chance.random() < 0.3:
            frame = self.mutated(frame).ljust(54, b"\0")  # newer kernels run no packet without its IP header
        if self.chance.random() < 0.03:
            program = "mesh_task" if program == "mesh_ingress" else "mesh_ingress"
        return program, frame

    def remember(self, outcome: Outcome) -> None:
        if outcome.verdict in ("FORWARD", "STARTED", "NOTED", "KEPT", "MOVED", "TRANSLATED") and outcome.frame:
            self.forwarded.append(outcome.frame)
            if len(self.forwarded) > 500:
                del self.forwarded[:250]

    def call(self) -> tuple[str, bytes]:
        v6 = self.chance.random() < 0.3
        source = self.chance.choice(CLIENTS6 if v6 else CLIENTS4)
        destination = self.chance.choice([NODE6] * 5 + ["2001:db8::99"] if v6 else [NODE4] * 5 + [EXACT, "192.0.2.9"])
        protocol = self.chance.choice((TCP, UDP))
        program = "mesh_ingress"
        if self.chance.random() < 0.1:  # a local container
            program = "mesh_task"
            owner = self.chance.choice([o for o in BACKENDS if (":" in BACKENDS[o][0]) == v6])
            source = BACKENDS[owner][0]
        return program, self.transport(
            packed(source), self.chance.randrange(1000, 1020), packed(destination), self.chance.choice(PORTS), protocol
        )

    def reply(self) -> tuple[str, bytes]:
        if not self.forwarded:
            return self.call()
        p = parse(self.chance.choice(self.forwarded))
        return "mesh_task", self.transport(p.destination, p.dport, p.source, p.sport, p.protocol)

    def error(self) -> tuple[str, bytes]:
        """An ICMP error: of a task about what it got, or of the outside about what it might have been sent."""
        if not self.forwarded:
            return self.call()
        frame = self.chance.choice(self.forwarded)
        p = parse(frame)
        program, source, quoted = "mesh_task", p.destination, frame[14:]
        destination = p.source
        if self.chance.random() < 0.5:
            called = packed(NODE6 if p.version == 6 else NODE4)
            program, source, destination = "mesh_ingress", p.source, called
            ports = [80, 81, 85] if p.protocol == TCP else [53, 54, 57]
            sport = self.chance.choice([*ports, 86, 56])
            quoted = self.transport(called, sport, p.source, p.sport, p.protocol)[14:]
        quoted = quoted[: self.chance.choice((28, 48, 60, 500))]
        kind = self.chance.choice((1, 2, 3, 4) if p.version == 6 else (3, 11, 12, 3, 8))
        message = bytes([kind, self.chance.randrange(4), 0, 0]) + self.chance.randbytes(4) + quoted
        pseudo = b""
        if p.version == 6:
            pseudo = source + destination + struct.pack("!II", len(message), ICMP6)
        message = message[:2] + (~total(pseudo + message) & 0xFFFF).to_bytes(2, "big") + message[4:]
        return program, self.network(source, destination, ICMP6 if p.version == 6 else ICMP, message)

    def transport(self, source: bytes, sport: int, destination: bytes, dport: int, protocol: int) -> bytes:
        data = self.chance.randbytes(self.chance.choice((0, 1, 5, 100)))
        if protocol == TCP:
            flags = self.chance.choice((2, 2, 16, 16, 24, 17, 18, 4, 20, self.chance.randrange(256)))
            options = bytes(4 * self.chance.choice((0, 0, 3)))
            sequence = self.chance.choice((0, 1000, self.chance.getrandbits(32)))
            acknowledged = self.chance.choice((1, 1001, self.chance.getrandbits(32)))
            head = struct.pack("!HHII", sport, dport, sequence, acknowledged)
            segment = head + bytes([(5 + len(options) // 4) << 4, flags]) + b"\xff\xff\0\0\0\0" + options + data
            at = 16
        else:
            segment = struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data
            at = 6
        mapped = source[:12] == MAPPED
        ends = source[12:] + destination[12:] if mapped else source + destination
        check = ~total(ends + struct.pack("!II", len(segment), protocol) + segment) & 0xFFFF
        if protocol == UDP:
            check = 0 if mapped and self.chance.random() < 0.1 else check or 0xFFFF
        return self.network(source, destination, protocol, segment[:at] + check.to_bytes(2, "big") + segment[at + 2 :])

    def network(self, source: bytes, destination: bytes, protocol: int, data: bytes) -> bytes:
        ether = bytes(6) + bytes.fromhex("020000000001")
        ttl = self.chance.choice((64, 64, 64, 64, 255, 2, 1, 0)) if self.chance.random() < 0.2 else 64
        if source[:12] != MAPPED:
            if self.chance.random() < 0.1:
                place = self.chance.choice((1, 1, 0x11, 0x10, 8, 0))
                data = struct.pack("!BBHI", protocol, 0, place, self.chance.randrange(4)) + data
                protocol = 44
            return (
                ether
                + struct.pack("!HIHBB", 0x86DD, 0x60000000, len(data), protocol, ttl)
                + source
                + destination
                + data
            )
        options = b"\x94\x04\0\0" if self.chance.random() < 0.05 else b""
        ident, bits = self.chance.randrange(4), self.chance.choice((0, 0x4000))
        if self.chance.random() < 0.1:
            bits = self.chance.choice((0x2000, 0x2010, 0x0010, 0x0001))
        head = struct.pack(
            "!BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(data), ident, bits, ttl, protocol, 0
        )
        head += source[12:] + destination[12:] + options
        return ether + b"\x08\0" + head[:10] + (~total(head) & 0xFFFF).to_bytes(2, "big") + head[12:] + data

    def mutated(self, frame: bytes) -> bytes:
        out = bytearray(frame)
        for _ in range(self.chance.choice((1, 1, 2, 5))):
            what = self.chance.random()
            if what < 0.6:
                out[self.chance.randrange(min(len(out), 80))] = self.chance.choice(
                    (0, 1, 0xFF, self.chance.randrange(256))
                )
            elif what < 0.8:
                del out[self.chance.randrange(34, len(out) + 1) :]
            elif what < 0.9:
                out += self.chance.randbytes(self.chance.randrange(30))
            else:
                at = self.chance.randrange(14, len(out))
                out[at : at + 2] = self.chance.randbytes(2)[: len(out) - at]
        return bytes(out)
