# SPDX-License-Identifier: Apache-2.0
"""The model of tests/oracle/packets.py between nodes: what leaves through the tunnel, arrives and goes back by it.

Written from docs/DATAPATH.md. Nodes know each other by IPv4; MSS options and errors about tunnelled flows are not its
business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

from tests.oracle import selection
from tests.oracle.frames import ETHER, MAPPED, TCP, UDP, Flow, Packet, be16, changed, parse, total
from tests.oracle.packets import ACK, CLIENT, FIRST, FREE, OK, REDIRECT, RST, SHOT, SYN, TRACKED, Model
from tests.oracle.state import Outcome, Reply

ROOM, HEAD = 52, 32
TAKES = 64  # of a path, with a proof, whether there is one or not
REPLY = bytes(11) + b"\x01"
ASK, BACK = b"\x02", b"\x04"
TRIAL = MAPPED + bytes((192, 0, 0, 8))


class Asked(tuple[int, int, int]):
    """A note of an owner whose node has to say whether the flow is its own."""


@dataclass
class Spanning(Model):
    """One node's data plane among others."""

    own: bytes = b""
    port: int = 6084
    nodes: dict[bytes, int] = field(default_factory=dict)  # MTU by address
    ids: dict[bytes, int] = field(default_factory=dict)
    away: dict[int, tuple[bytes, int]] = field(default_factory=dict)  # id, IP version that the tunnel carries, or 0
    ways: dict[Flow, bytes] = field(default_factory=dict)  # node, by reverse entry
    seen: set[Flow] = field(default_factory=set)
    awaited: dict[Flow, tuple[bytes, int]] = field(
        default_factory=dict
    )  # SYN's sequence number, how often it came again
    floating: set[bytes] = field(default_factory=set)

    def ingress(self, frame: bytes) -> Outcome:
        p = parse(frame)
        if (p.kind, p.protocol, p.dport, frame[:6]) == ("flow", UDP, self.port, bytes(6)):
            return self._arrive(p, frame)
        return super().ingress(frame)

    def _owner(self, p: Packet, number: int, *, start: bool, from_task: bool) -> tuple[str, int, bool]:
        """The second chance of flows to a floating address. The verdict ASKED: so noted, and sent with the question."""
        verdict, owner, note = self.choose(p.flow, number, start)
        frontend = self.frontends[number]
        value = selection.client_hash(p.source) if frontend.flags & CLIENT else selection.flow_hash(*p.flow)
        current, previous = frontend.slots[selection.slot_for(value, len(frontend.slots))]
        kept = owner == previous & ~TRACKED != current and note and p.flow not in self.notes
        backend = self.backends.get(current)
        if not kept or start or from_task or p.protocol != TCP or p.destination not in self.floating:
            return verdict, owner, note
        if backend is None or backend.state == FREE:
            return verdict, owner, note
        if current not in self.away:
            known = self.known_of(p.flow, current, edge=True)
            return ("NOTED", current, True) if known else (verdict, owner, note)
        mtu = self.nodes.get(backend.address, 0)
        if self.away[current][1] != p.version or not mtu or self.known_of(p.flow, owner, edge=True):
            return verdict, owner, note
        return "ASKED", current, True

    def _serve(self, p: Packet, frame: bytes, number: int, *, from_task: bool) -> Outcome:
        start = p.protocol == TCP and p.flags & (SYN | ACK) == SYN
        verdict, owner, note = self._owner(p, number, start=start, from_task=from_task)
        if owner not in self.away or verdict == "REJECTED":
            return super()._serve(p, frame, number, from_task=from_task)
        ident, version = self.away[owner]
        if p.fragment == 1:
            self.store(p)
        if version not in (0, p.version) or (version and from_task):
            return Outcome(OK, "FAMILY" if version != p.version else "TUNNEL_NO_PATH", frame)
        if note:
            made = (owner, self.backends[owner].epoch, number)
            self.notes[p.flow] = Asked(made) if verdict == "ASKED" else made
        if not version:
            return Outcome(OK, "TUNNEL_NO_PATH", frame)
        if verdict in ("ASKED", "NOTED") and isinstance(self.notes.get(p.flow), Asked):
            ident = ident[:-1] + ASK
        node = self.backends[owner].address
        if start:
            self._await(p.flow, frame[p.l4 + 4 : p.l4 + 8], number)
        if node not in self.nodes:
            return Outcome(OK, "TUNNEL_NO_PATH", frame)
        if p.ttl <= 1:
            return self._refuse(p, frame, "EXPIRED")
        if len(frame) - ETHER > self.nodes[node] - TAKES:
            self.failed(p, number, "TOO_BIG")
            return Outcome(SHOT, "TUNNEL_TOO_BIG")
        return self._wrapped(self._hop(p, frame), "TUNNEL_TX", node, ident)

    def _await(self, flow: Flow, sequence: bytes, number: int) -> None:
        """A SYN for another node: unanswered when it comes the third time."""
        known, again = self.awaited.get(flow, (b"", 0))
        again = again + 1 if known == sequence else 0
        self.awaited[flow] = (sequence, again)
        if again == 2:
            self.failures[number, "UNANSWERED"] += 1

    @staticmethod
    def _hop(p: Packet, frame: bytes) -> bytes:
        out = bytearray(frame)
        at = ETHER + (8 if p.version == 4 else 7)
        out[at] -= 1
        if p.version == 4:
            check = changed(be16(frame, ETHER + 10), frame[at : at + 2], bytes(out[at : at + 2]))
            out[ETHER + 10 : ETHER + 12] = check.to_bytes(2, "big")
        return bytes(out)

    def _wrapped(self, inner: bytes, verdict: str, node: bytes, ident: bytes, checks: tuple[int, ...] = ()) -> Outcome:
        """In the tunnel. The source port is any: `same_but_port` leaves it out."""
        length = len(inner) - ETHER + ROOM
        ip = struct.pack("!HHIBBH", 0x4500, length, 0x4000, 64, UDP, 0) + self.own[12:] + node[12:]
        ip = ip[:10] + (~total(ip) & 0xFFFF).to_bytes(2, "big") + ip[12:]
        head = struct.pack("!HHHH", 0, self.port, length - 20, 0) + b"\x04\x40" + inner[12:14] + bytes(4)
        out = inner[:12] + b"\x08\0" + ip + head + b"\xff\x6d\x81\x03" + ident + inner[ETHER:]
        return Outcome(REDIRECT, verdict, out, [ETHER + 10, *(at + ROOM for at in checks)])

    def _arrive(self, p: Packet, frame: bytes) -> Outcome:
        if p.destination not in self.addresses:
            return Outcome(OK, "", frame)
        if p.source not in self.nodes:
            return Outcome(SHOT, "TUNNEL_FOREIGN")
        head, ident = frame[p.l4 + 8 : p.l4 + 20], frame[p.l4 + 20 : p.l4 + HEAD]
        good = head[:2] == b"\x04\x40" and head[4:] == bytes(4) + b"\xff\x6d\x81\x03" and ident[-1] in (0, 1, 2, 4)
        kind = {b"\x08\0": 20, b"\x86\xdd": 40}.get(head[2:4], 0)
        rest = len(frame) - p.l4 - HEAD
        if not good or not kind or p.fragment or p.l4 != ETHER + 20 or p.length < 20 + HEAD or rest < kind:
            return Outcome(SHOT, "TUNNEL_INVALID")
        inner = frame[:12] + head[2:4] + frame[p.l4 + HEAD :]
        q = parse(inner)
        if q.kind == "fragment":
            known = self.known(q)
            if known is None:
                return Outcome(SHOT, "EARLY")
            q = replace(q, kind="flow", sport=known[0], dport=known[1])
        if q.kind == "flow" and q.fragment == 1:
            self.store(q)
        if q.kind != "flow":
            return Outcome(SHOT, "TUNNEL_INVALID")
        if ident[-1:] == REPLY[-1:]:
            return self._return(q, inner, p.source)
        if ident[-1:] == BACK:
            return self._back(q, inner, p.source, ident)
        out = self._deliver(q, inner, p.source, ident)
        if out.action != REDIRECT or out.verdict in ("TUNNEL_RX", "TRANSLATED", "TUNNEL_BACK"):
            return out
        assert out.frame is not None
        return self._wrapped(out.frame, out.verdict, p.source, REPLY, tuple(out.checks))

    def _back(self, q: Packet, inner: bytes, node: bytes, ident: bytes) -> Outcome:
        """A client's packet that this node has asked another one about."""
        tunnel = (q.protocol, q.dport) == (UDP, self.port)
        number = 0 if tunnel else self.find(q.destination, q.dport, q.protocol)
        if not number:
            return Outcome(SHOT, "TUNNEL_INVALID")
        note = self.notes.get(q.flow)
        asked = isinstance(note, Asked) and note[0] in self.away
        if note is None or (asked and (self.backends[note[0]].address, self.away[note[0]][0][:8]) == (node, ident[:8])):
            self.notes.pop(q.flow, None)
            _, owner, noted = self.choose(q.flow, number, start=False)
            if noted:
                self.notes[q.flow] = (owner, self.backends[owner].epoch if owner >= FIRST else 0, number)
        return self.ingress(inner)

    def _deliver(self, q: Packet, inner: bytes, node: bytes, ident: bytes) -> Outcome:
        if q.protocol != ident[10] or (q.protocol, q.dport) == (UDP, self.port):
            return Outcome(SHOT, "TUNNEL_INVALID")
        number = self.exact.get((q.destination, q.dport, q.protocol)) or self.any_address.get((q.protocol, q.dport), 0)
        asked, ident = ident[-1:] == ASK, ident[:-1] + b"\0"
        owner = self.ids.get(ident, 0)
        backend = self.backends.get(owner)
        if asked and not (owner and self.known_of(q.flow, owner, edge=True)):
            return self._wrapped(inner, "TUNNEL_BACK", node, ident[:-1] + BACK)
        if not backend or backend.state == FREE or (backend.address[:12] == MAPPED) != (q.version == 4):
            if (q.protocol == UDP or q.flags & SYN) and q.flow not in self.seen:
                self.seen.add(q.flow)
                return Outcome(SHOT, "TUNNEL_NO_BACKEND")
            self.failed(q, number, "NO_BACKEND")
            return self._refuse(q, inner, "TUNNEL_NO_BACKEND")
        if q.ttl <= 1:
            return self._refuse(q, inner, "EXPIRED")
        start = q.protocol == TCP and q.flags & (SYN | ACK) == SYN
        key = (q.source, q.sport, backend.address, backend.port, q.protocol)
        self.source = node
        made = Reply(q.destination, q.dport, q.source, owner, backend.epoch, False, frontend=number)
        kept = self._keep(q, key, made, start)
        self.source = b""
        if kept is None:
            self.failed(q, number, "COLLISION")
            return Outcome(SHOT, "COLLISION") if self.silent else self._refuse(q, inner, "COLLISION")
        verdict = "TUNNEL_RX" if kept == key else "TRANSLATED"
        return self._rewritten(q, inner, verdict, kept[0], kept[1], backend.address, backend.port)

    def _keep(self, p: Packet, key: Flow, made: Reply, start: bool, *, inside: bool = False) -> Flow | None:
        kept = super()._keep(p, key, made, start, inside=inside)
        if kept is not None:
            self.ways[kept] = self.source
        return kept

    def _reply(self, p: Packet, frame: bytes, reply: Reply) -> Outcome:
        node = self.ways.get((p.destination, p.dport, p.source, p.sport, p.protocol), b"")
        if not node:
            return super()._reply(p, frame, reply)
        if p.ttl > 1 and len(frame) - ETHER > self.nodes[node] - TAKES:
            self.failed(p, reply.frontend, "TOO_BIG")
            return Outcome(SHOT, "TUNNEL_TOO_BIG")
        out = super()._reply(p, frame, reply)
        if out.frame is None:
            return out
        return self._wrapped(out.frame, "TUNNEL_REPLY_TX", node, REPLY, tuple(out.checks))

    def _return(self, q: Packet, inner: bytes, node: bytes) -> Outcome:
        if (q.source, q.destination, q.protocol, q.sport, q.fragment) == (TRIAL, TRIAL, TCP, 0, 0):
            return Outcome(0, "TUNNEL_TRIAL", inner)
        number = self.exact.get((q.source, q.sport, q.protocol)) or self.any_address.get((q.protocol, q.sport), 0)
        flow = (q.destination, q.dport, q.source, q.sport, q.protocol)
        verdict, owner, note = self.choose(flow, number, start=False) if number else ("", 0, False)
        known = owner >= FIRST and owner in self.away and self.backends[owner].address == node
        if known and verdict == "NOTED" and not note and isinstance(self.notes[flow], Asked):
            self.notes[flow] = (owner, self.backends[owner].epoch, number)
        if not known or q.destination in self.addresses:
            return Outcome(SHOT, "TUNNEL_INVALID")
        if q.ttl <= 1:
            return Outcome(SHOT, "EXPIRED")
        if q.flags & (SYN | RST):
            self.awaited.pop(flow, None)
        checks = [ETHER + 10] if q.version == 4 else []
        return Outcome(REDIRECT, "TUNNEL_REPLY_RX", self._hop(q, inner), checks)
