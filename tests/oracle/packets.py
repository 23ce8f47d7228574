# SPDX-License-Identifier: Apache-2.0
"""What the kernel engine's programs must do with a frame, in plain Python: the oracle for random packets.

Written from docs/DATAPATH.md and docs/HASHING.md, not from the C; slow and obvious. Caches never evict and time stands
still at `now`. Checksums follow RFC 1624; where 0 and 0xffff mean the same, compare with `tests.oracle.state.same`.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.oracle import selection
from tests.oracle.frames import (
    ETHER,
    EXTENSIONS,
    ICMP,
    ICMP6,
    MAPPED,
    TCP,
    UDP,
    Flow,
    Packet,
    be16,
    changed,
    parse,
    total,
)
from tests.oracle.state import Backend, Frontend, Outcome, Reply

OK, SHOT, REDIRECT = 0xFFFFFFFF, 2, 7  # OK: TC_ACT_UNSPEC, what comes next decides
FREE, ACTIVE, DRAINING = 0, 1, 2
CLIENT, DENY, PASS_IF_NONE, HOLD = 1, 2, 4, 8
NONE, PASS, FIRST = 0, 1, 2
TRACKED = 0x80000000
FIN, SYN, RST, ACK = 1, 2, 4, 16
NEVER, UDP_GRACE = 0, 64  # MESH_ORPHAN_*
OVERDUE = 2  # stamps for which a TCP flow that is not proven keeps a port that was chosen for it
FRAGMENT_LIFE = 4  # stamps for which a datagram's fragments wait for each other
PROOF_WINDOW = 1 << 17  # how far behind a task's first sequence number an acknowledgement may be


@dataclass
class Model:
    """One node's data plane."""

    hairpin: bytes
    hairpin6: bytes
    now: int = 0  # stamps, as orphan_at
    orphan_at: int = NEVER
    frontends: dict[int, Frontend] = field(default_factory=dict)
    any_address: dict[tuple[int, int], int] = field(default_factory=dict)
    exact: dict[tuple[bytes, int, int], int] = field(default_factory=dict)
    backends: dict[int, Backend] = field(default_factory=dict)
    addresses: set[bytes] = field(default_factory=set)
    rules: dict[int, list[tuple[int, bytes, bool]]] = field(default_factory=dict)  # bits, prefix, allow
    notes: dict[Flow, tuple[int, int, int]] = field(default_factory=dict)  # owner, epoch, frontend
    replies: dict[Flow, Reply] = field(default_factory=dict)
    openings: dict[Flow, Reply] = field(default_factory=dict)
    fragments: dict[tuple[bytes, bytes, int, int], tuple[int, int, int]] = field(default_factory=dict)  # ports, stamp
    failures: Counter[tuple[int, str]] = field(default_factory=Counter)  # by frontend and cause
    clock: Callable[[], int] = lambda: 0  # stamps, for flows that are not proven in time
    silent: bool = False  # a collision is not told
    guarded: bool = False  # a frontend has source rules, or UDP
    source: bytes = b""  # the node that the packet came from

    # From a flow to its owner

    def has_port(self, protocol: int, port: int) -> bool:
        key = (protocol, port)
        return key in self.any_address or any(k[1:] == (port, protocol) for k in self.exact)

    def find(self, destination: bytes, port: int, protocol: int) -> int:
        exact = self.exact.get((destination, port, protocol))
        if exact is not None:
            return exact
        return self.any_address.get((protocol, port), 0) if destination in self.addresses else 0

    def denied(self, frontend: Frontend, source: bytes) -> bool:
        best, allow = -1, not frontend.flags & DENY
        value = int.from_bytes(source, "big")
        for bits, prefix, rule in self.rules.get(frontend.acl, []):
            if bits > best and value >> (128 - bits) == int.from_bytes(prefix, "big") >> (128 - bits):
                best, allow = bits, rule
        return not allow

    @property
    def orphaned_for(self) -> int:
        """Stamps since the tables were orphaned; negative: they are not."""
        return -1 if self.orphan_at == NEVER else self.now - self.orphan_at

    def keeps(self, owner: int, protocol: int, flags: int) -> bool:
        if owner == NONE:
            return False
        if owner == PASS:
            return protocol == TCP or bool(flags & HOLD)
        if protocol == UDP and self.orphaned_for >= UDP_GRACE:
            return False
        state = self.backends[owner].state if owner in self.backends else FREE
        return state == ACTIVE or (state == DRAINING and protocol == TCP)

    def known_of(self, flow: Flow, owner: int, *, edge: bool = False) -> bool:
        """Whether the reverse entries know an un-noted flow as one of this owner's; `edge`: begun or ended suffices."""
        backend = self.backends.get(owner)
        if backend is None or backend.state == FREE:
            return False
        source, sport, _, _, protocol = flow
        if source == backend.address:  # the task calls itself
            source = self.hairpin if source[:12] == MAPPED else self.hairpin6
        key = (source, sport, backend.address, backend.port, protocol)
        sources = [key, *self._translated_keys(flow, key, backend)]
        for each in sources:
            reply = self.replies.get(each) or (self.openings.get(each) if edge else None)
            if reply is not None and self._is_of(reply, flow) and (reply.owner, reply.epoch) == (owner, backend.epoch):
                return edge or reply.closed != 3
        return False

    @staticmethod
    def _is_of(reply: Reply, flow: Flow) -> bool:
        same = (reply.client_port, reply.called, reply.called_port) == flow[1:4]
        return same and (reply.client == flow[0] or not reply.translated)

    def _translated_keys(self, flow: Flow, key: Flow, backend: Backend) -> list[Flow]:
        """The reverse entries that a flow may have with another source than its own."""
        sources = [key[0], *([backend.gateway] if self._is_neighbour(flow[0], backend) else [])]
        return [(source, port, *key[2:]) for source in sources for port in selection.source_ports(flow)]

    @staticmethod
    def _is_neighbour(client: bytes, backend: Backend) -> bool:
        """Whether the task has the client's network itself."""
        value = int.from_bytes(client, "big")
        return any(
            value >> (128 - bits) == int.from_bytes(prefix, "big") >> (128 - bits) for bits, prefix in backend.networks
        )

    def good(self, note: tuple[int, int, int], number: int) -> bool:
        owner, epoch, frontend = note
        if frontend != number:
            return False
        if owner == PASS:
            return True
        backend = self.backends.get(owner)
        return backend is not None and backend.state != FREE and backend.epoch == epoch

    def choose(self, flow: Flow, number: int, start: bool) -> tuple[str, int, bool]:
        """(verdict, owner, whether to note it)."""
        frontend = self.frontends[number]
        if self.denied(frontend, flow[0]):
            return "DENIED", NONE, False
        value = selection.client_hash(flow[0]) if frontend.flags & CLIENT else selection.flow_hash(*flow)
        listed, previous = frontend.slots[selection.slot_for(value, len(frontend.slots))]
        handed_back = self.orphaned_for >= 0
        current = PASS if handed_back else listed
        verdict, owner, note = "FORWARD", current, False
        if current != previous:
            known = self.notes.get(flow)
            verdict, note = ("STARTED" if start else "MOVED"), True
            if start:
                pass
            elif known is not None:
                if self.good(known, number):
                    verdict, owner, note = "NOTED", known[0], False
            elif self.known_of(flow, listed):
                verdict, owner = "NOTED", listed
            elif self.keeps(previous & ~TRACKED, flow[4], frontend.flags):
                verdict, owner = "KEPT", previous & ~TRACKED
        if owner == PASS:
            because = handed_back and listed != PASS and verdict in ("STARTED", "MOVED")
            return ("ORPHANED" if because else "PASS"), PASS, note
        if owner == NONE or owner not in self.backends or self.backends[owner].state == FREE:
            return ("NO_BACKEND" if frontend.flags & PASS_IF_NONE else "REJECTED"), NONE, False
        return verdict, owner, note

    def failed(self, p: Packet, number: int, cause: str) -> None:
        """Count a packet that gets no further, if it would have started a flow."""
        if p.fragment != 2 if p.protocol == UDP else p.flags & SYN:
            self.failures[number, cause] += 1

    # Programs

    def ingress(self, frame: bytes) -> Outcome:
        p = parse(frame)
        if p.fragment and p.kind in ("flow", "fragment") and frame[:6] != bytes(6):
            return Outcome(OK, "", frame)
        found = self._assembled(p)
        return Outcome(SHOT, "EARLY") if found is None else self._client(found, frame, from_task=False)

    def task(self, frame: bytes) -> Outcome:
        p = parse(frame)
        if (found := self._assembled(p, from_task=True)) is None:
            return Outcome(SHOT, "EARLY")
        p = found
        if p.kind == "flow":
            key = (p.destination, p.dport, p.source, p.sport, p.protocol)
            reply = self.replies.get(key) or self._goes_on(p, key)
            if reply:
                return self._reply(p, frame, reply)
        if p.kind == "icmp" and (out := self._error_of_task(p, frame)):
            return out
        return self._client(p, frame, from_task=True)

    def _assembled(self, p: Packet, *, from_task: bool = False) -> Packet | None:
        """A fragment with the ports of its first one, if known; None: it is kept until that comes."""
        ours = from_task or p.destination in self.addresses
        if p.kind == "flow" and p.fragment and ours:
            self.store(p)
        if p.kind != "fragment":
            return p
        known = self.known(p)
        if known is None:
            return None if self.guarded and ours else p
        return replace(p, kind="flow", sport=known[0], dport=known[1])

    def store(self, p: Packet) -> None:
        """The ports of a first fragment."""
        self.fragments[p.source, p.destination, p.ident, p.protocol] = (p.sport, p.dport, self.clock())

    def known(self, p: Packet) -> tuple[int, int] | None:
        """The ports of a later fragment, if others of its datagram were lately heard of."""
        key = (p.source, p.destination, p.ident, p.protocol)
        known = self.fragments.get(key)
        if known is None or self.clock() - known[2] >= FRAGMENT_LIFE:
            return None
        self.fragments[key] = (*known[:2], self.clock())
        return known[:2]

    def _denied_to_kernel(self, p: Packet) -> bool:
        """Whether source rules deny a packet that is not served."""
        number = self.find(p.destination, p.dport, p.protocol) if self.has_port(p.protocol, p.dport) else 0
        if not number or not self.denied(self.frontends[number], p.source):
            return False
        self.failed(p, number, "DENIED")
        return True

    def _extended(self, p: Packet, frame: bytes) -> Outcome:
        """A packet with IPv6 extension headers: passes unless its frontend denies it, or its ports cannot be known."""
        if p.destination not in self.addresses:
            return Outcome(OK, "", frame)
        at, following, end = p.l4, p.protocol, ETHER + p.length
        for _ in range(8):
            if following in (TCP, UDP):
                if at + 4 <= end:
                    found = replace(p, protocol=following, sport=be16(frame, at), dport=be16(frame, at + 2), flags=0)
                    return Outcome(SHOT, "DENIED") if self._denied_to_kernel(found) else Outcome(OK, "EXTENSION", frame)
                break
            if following not in EXTENSIONS or (at + 4 <= end and following == 44 and be16(frame, at + 2) & ~7):
                return Outcome(OK, "EXTENSION", frame)
            if at + 4 > end:
                break
            length = {44: 8, 51: (frame[at + 1] + 2) * 4}.get(following, (frame[at + 1] + 1) * 8)
            following, at = frame[at], at + length
        return Outcome(SHOT, "NO_PORTS") if self.guarded else Outcome(OK, "EXTENSION", frame)

    def _goes_on(self, p: Packet, key: Flow) -> Reply | None:
        """The entry of a flow that is not proven; a task's segment other than SYN and RST proves it."""
        opening = self.openings.get(key)
        if opening is None or p.protocol != TCP or p.fragment or p.flags & (SYN | RST) or opening.closed == 3:
            return opening
        if opening.answered and not p.flags & FIN and p.sequence == (opening.sequence + 1) % (1 << 32):
            return opening  # it may only acknowledge
        opening.opened |= opening.answered
        self.replies[key] = self.openings.pop(key)
        return opening

    def _client(self, p: Packet, frame: bytes, *, from_task: bool) -> Outcome:
        untouched = Outcome(OK, "", frame)
        if p.kind == "fragment":
            return replace(untouched, verdict="FRAGMENT" if p.destination in self.addresses else "")
        if p.kind == "extension":
            return self._extended(p, frame)
        if p.kind == "malformed":
            if self._denied_to_kernel(p):
                return Outcome(SHOT, "DENIED")
            ours = self.has_port(p.protocol, p.dport) and self.find(p.destination, p.dport, p.protocol)
            return replace(untouched, verdict="MALFORMED" if ours else "")
        if p.kind == "icmp":
            return self._error_of_client(p, frame, from_task=from_task) or untouched
        if p.kind != "flow" or (not from_task and frame[:6] != bytes(6)):
            return untouched
        number = self.find(p.destination, p.dport, p.protocol)
        if not number:
            return untouched
        return self._serve(p, frame, number, from_task=from_task)

    def _owner(self, p: Packet, number: int, *, start: bool, from_task: bool) -> tuple[str, int, bool]:
        """As `choose`, for a packet that a program has."""
        return self.choose(p.flow, number, start)

    def _serve(self, p: Packet, frame: bytes, number: int, *, from_task: bool) -> Outcome:
        if p.fragment == 1:
            self.store(p)
        start = p.protocol == TCP and p.flags & (SYN | ACK) == SYN
        verdict, owner, note = self._owner(p, number, start=start, from_task=from_task)
        if verdict in ("REJECTED", "DENIED"):
            self.failed(p, number, "NO_BACKEND" if verdict == "REJECTED" else verdict)
        if verdict == "REJECTED":
            return self._refuse(p, frame, verdict)
        if owner < FIRST:
            if note:
                self.notes[p.flow] = (owner, 0, number)
            return Outcome(SHOT, verdict) if verdict == "DENIED" else Outcome(OK, verdict, frame)
        backend = self.backends[owner]
        if (backend.address[:12] == MAPPED) != (p.version == 4):
            return Outcome(OK, "FAMILY", frame)
        if p.ttl <= 1:
            return self._refuse(p, frame, "EXPIRED")
        hairpin = from_task and p.source == backend.address
        source = (self.hairpin if p.version == 4 else self.hairpin6) if hairpin else p.source
        key = (source, p.sport, backend.address, backend.port, p.protocol)
        reply = Reply(p.destination, p.dport, p.source, owner, backend.epoch, hairpin, frontend=number)
        kept = self._keep(p, key, reply, start, inside=from_task)
        if kept is None:
            self.failed(p, number, "COLLISION")
            return Outcome(SHOT, "COLLISION") if self.silent else self._refuse(p, frame, "COLLISION")
        if note:
            self.notes[p.flow] = (owner, backend.epoch, number)
        verdict = verdict if kept == key else "TRANSLATED"
        return self._rewritten(p, frame, verdict, kept[0], kept[1], backend.address, backend.port)

    def _source(self, p: Packet, key: Flow, made: Reply, *, inside: bool) -> Flow | None:
        """The key of the flow's reverse entry: with another source than its own where the task would mistake it. None:
        all are taken. `inside`: the client is a container of this node."""
        backend = self.backends[made.owner]

        def current(reply: Reply | None) -> bool:
            return reply is not None and (reply.owner, reply.epoch) == (made.owner, made.epoch)

        def holds(reply: Reply | None) -> bool:
            return reply is not None and current(reply) and reply.closed != 3

        def mine(reply: Reply | None) -> bool:
            return reply is not None and self._is_of(reply, p.flow)

        reply, opening = self.replies.get(key), self.openings.get(key)
        if (mine(reply) and current(reply)) or (mine(opening) and current(opening) and not holds(reply)):
            return key
        hidden = not inside and self._is_neighbour(p.source, backend)
        source = backend.gateway if hidden else key[0]
        free: Flow | None = None
        for port in selection.source_ports(p.flow):
            place = (source, port, *key[2:])
            proven, waiting = self.replies.get(place), self.openings.get(place)
            if any(each is not None and each.translated and mine(each) for each in (proven, waiting)):
                return place
            young = waiting is not None and (p.protocol == UDP or made.stamp - waiting.stamp < OVERDUE)
            taken = young and holds(waiting)
            self.silent |= taken and p.protocol == TCP
            if free is None and not taken and not holds(proven):
                free = place
        return free if hidden or holds(reply) or holds(opening) else key

    def _keep(self, p: Packet, key: Flow, made: Reply, start: bool, *, inside: bool = False) -> Flow | None:
        """Store the reverse entry. Returns its key, None where the task could not tell the flow from others."""
        closed = 3 if p.flags & RST else p.flags & FIN
        self.silent = False
        made.stamp, made.client_port = self.clock(), p.sport
        found = self._source(p, key, made, inside=inside)
        if found is None:
            return None
        made.translated = found != key
        key = found
        old = self.replies.get(key)
        if old and not start and self._is_of(old, p.flow) and (old.owner, old.epoch) == (made.owner, made.epoch):
            old.closed |= closed
            return key
        if old:
            del self.replies[key]
        opening = self.openings.get(key)
        known = opening is not None and self._is_of(opening, p.flow)
        known = known and opening is not None and (opening.owner, opening.epoch) == (made.owner, made.epoch)
        if start or (not known and p.protocol == UDP):
            if known and opening is not None:
                self._sent_again(opening, made)
                made.stamp = opening.stamp
            self.openings[key] = made
            return key
        made.closed = closed
        if p.flags & RST:
            self.openings.pop(key, None)
        elif p.protocol == TCP and not (known and opening is not None and self._is_proof(p, opening)):
            if known and opening is not None:
                opening.closed |= closed
            else:
                self.openings[key] = made
        else:
            self.openings.pop(key, None)
            made.opened = not closed & 1
            self.replies[key] = made
        return key

    @staticmethod
    def _is_proof(p: Packet, opening: Reply) -> bool:
        """Whether a client's segment acknowledges what the task answered to its start."""
        behind = (p.acknowledged - opening.sequence - 1) % (1 << 32)
        return opening.answered and bool(p.flags & ACK) and not p.fragment and behind < PROOF_WINDOW

    def _sent_again(self, opening: Reply, made: Reply) -> None:
        """A client sends its SYN again. If its task has said nothing, the node that the client called counts it."""
        made.refused, made.answered, made.unanswered = opening.refused, opening.answered, opening.unanswered
        made.sequence = opening.sequence
        if not (made.refused or made.answered or made.unanswered or self.source):
            made.unanswered = True
            self.failures[made.frontend, "UNANSWERED"] += 1

    def _reply(self, p: Packet, frame: bytes, reply: Reply) -> Outcome:
        if p.ttl <= 1:
            return Outcome(SHOT, "EXPIRED")
        if p.flags & SYN and not p.fragment:
            reply.answered, reply.sequence = True, p.sequence
        if self._is_first_refusal(p, frame, reply):
            return Outcome(SHOT, "RESET_HELD")
        reply.closed |= 3 if p.flags & RST else 2 if p.flags & FIN else 0
        return self._rewritten(p, frame, "REPLY", reply.called, reply.called_port, reply.client, reply.client_port)

    def _is_first_refusal(self, p: Packet, frame: bytes, reply: Reply) -> bool:
        """A reset with sequence number 0 before the client has answered the task."""
        if p.protocol != TCP or p.flags & (SYN | FIN | RST | ACK) != RST | ACK or p.fragment:
            return False
        if reply.opened or frame[p.l4 + 4 : p.l4 + 8] != bytes(4):
            return False
        if reply.refused:
            self.failures[reply.frontend, "REFUSED"] += 1
        if reply.closed or reply.refused:
            return False
        reply.refused, reply.closed = True, 3
        return True

    # From frame to frame

    def _rewritten(
        self, p: Packet, frame: bytes, verdict: str, source: bytes, sport: int, destination: bytes, dport: int
    ) -> Outcome:
        out = bytearray(frame)
        checks = self._move(out, p, source, destination)
        if p.fragment != 2:
            at = p.l4 + (16 if p.protocol == TCP else 6)
            old = p.source + p.destination + frame[p.l4 : p.l4 + 4]
            new = source + destination + struct.pack("!HH", sport, dport)
            out[p.l4 : p.l4 + 4] = new[32:]
            if p.protocol == TCP or be16(frame, at):
                out[at : at + 2] = changed(be16(frame, at), old, new).to_bytes(2, "big")
                checks.append(at)
        return Outcome(REDIRECT, verdict, bytes(out), checks)

    @staticmethod
    def _move(out: bytearray, p: Packet, source: bytes, destination: bytes) -> list[int]:
        """New addresses in the IP header, one hop less. Returns where the header's checksum is."""
        if p.version == 6:
            out[ETHER + 7] -= 1
            out[ETHER + 8 : ETHER + 40] = source + destination
            return []
        old = bytes(out[ETHER : ETHER + 20])
        out[ETHER + 8] -= 1
        out[ETHER + 12 : ETHER + 20] = source[12:] + destination[12:]
        check = changed(
            be16(old, 10), old[8:10] + old[12:], bytes(out[ETHER + 8 : ETHER + 10] + out[ETHER + 12 : ETHER + 20])
        )
        out[ETHER + 10 : ETHER + 12] = check.to_bytes(2, "big")
        return [ETHER + 10]

    def _refuse(self, p: Packet, frame: bytes, verdict: str) -> Outcome:
        header = 20 if p.version == 4 else 40
        if p.fragment or p.l4 != ETHER + header or p.flags & RST:
            return Outcome(SHOT, "NO_BACKEND" if verdict == "REJECTED" else verdict)
        if p.protocol == TCP and verdict != "EXPIRED":
            return self._reset(p, frame, verdict)
        kind = {("EXPIRED", 4): (11, 0), ("EXPIRED", 6): (3, 0)}.get(
            (verdict, p.version), (3, 3) if p.version == 4 else (1, 4)
        )
        quote = frame[ETHER : ETHER + header + (20 if p.protocol == TCP else 8)]
        message = bytes([*kind, 0, 0]) + bytes(4) + quote
        pseudo = b"" if p.version == 4 else p.destination + p.source + struct.pack("!II", len(message), ICMP6)
        message = message[:2] + (~total(pseudo + message) & 0xFFFF).to_bytes(2, "big") + message[4:]
        return self._answer(p, frame, verdict, ICMP if p.version == 4 else ICMP6, message, 2)

    def _reset(self, p: Packet, frame: bytes, verdict: str) -> Outcome:
        got = frame[p.l4 : p.l4 + 20]
        seq, ack = struct.unpack("!II", got[4:12])
        length = p.length - (p.l4 - ETHER) - (got[12] >> 4) * 4 + bool(p.flags & SYN) + bool(p.flags & FIN)
        fields = (ack, 0, 0x5000 | RST) if p.flags & ACK else (0, (seq + length) & 0xFFFFFFFF, 0x5000 | RST | ACK)
        tcp = struct.pack("!HHIIHHHH", p.dport, p.sport, *fields, 0, 0, 0)
        pseudo = p.destination[-16:] + p.source + struct.pack("!II", len(tcp), TCP)
        if p.version == 4:
            pseudo = p.destination[12:] + p.source[12:] + struct.pack("!II", len(tcp), TCP)
        tcp = tcp[:16] + (~total(pseudo + tcp) & 0xFFFF).to_bytes(2, "big") + tcp[18:]
        return self._answer(p, frame, verdict, TCP, tcp, 16)

    @staticmethod
    def _answer(p: Packet, frame: bytes, verdict: str, protocol: int, message: bytes, check: int) -> Outcome:
        ether = frame[6:12] + frame[:6] + frame[12:14]
        if p.version == 6:
            ip = struct.pack("!IHBB", 0x60000000, len(message), protocol, 64) + p.destination + p.source
            return Outcome(REDIRECT, verdict, ether + ip + message, [ETHER + 40 + check])
        ip = struct.pack("!HHIBBH", 0x4500, 20 + len(message), 0x4000, 64, protocol, 0)
        ip += p.destination[12:] + p.source[12:]
        ip = ip[:10] + (~total(ip) & 0xFFFF).to_bytes(2, "big") + ip[12:]
        return Outcome(REDIRECT, verdict, ether + ip + message, [ETHER + 10, ETHER + 20 + check])

    # ICMP errors

    def _quoted(self, p: Packet, frame: bytes) -> tuple[Flow, int, int] | None:
        """(the quoted packet's flow, offset of its IP header, of its transport header)."""
        at = p.l4 + 8
        ip = frame[at:]
        if p.version == 4:
            if len(ip) < 20 or ip[0] >> 4 != 4 or ip[0] & 15 < 5 or be16(ip, 6) & 0x1FFF:
                return None
            source, destination, protocol, l4 = MAPPED + ip[12:16], MAPPED + ip[16:20], ip[9], at + (ip[0] & 15) * 4
        else:
            if len(ip) < 40 or ip[0] >> 4 != 6:
                return None
            source, destination, protocol, l4 = ip[8:24], ip[24:40], ip[6], at + 40
        if protocol not in (TCP, UDP) or l4 + 8 > ETHER + p.length:
            return None
        return (source, be16(frame, l4), destination, be16(frame, l4 + 2), protocol), at, l4

    def _error_of_client(self, p: Packet, frame: bytes, *, from_task: bool) -> Outcome | None:
        quoted = self._quoted(p, frame)
        if quoted is None or p.ttl <= 1 or (not from_task and frame[:6] != bytes(6)):
            return None
        (called, called_port, client, client_port, protocol), at, l4 = quoted
        number = self.find(called, called_port, protocol)
        if not number:
            return None
        _, owner, _ = self.choose((client, client_port, called, called_port, protocol), number, start=False)
        if owner < FIRST or (self.backends[owner].address[:12] == MAPPED) != (p.version == 4):
            return None
        backend = self.backends[owner]
        key = (client, client_port, backend.address, backend.port, protocol)
        flow = (client, client_port, called, called_port, protocol)
        for place in (key, *self._translated_keys(flow, key, backend)):
            reply = self.replies.get(place) or self.openings.get(place)
            if reply and self._is_of(reply, flow):
                inner = (backend.address, backend.port, place[0], place[1], protocol)
                source = place[0] if p.source == client else p.source
                return self._translated(p, frame, "ICMP_IN", at, l4, inner, source, backend.address)
        return None

    def _error_of_task(self, p: Packet, frame: bytes) -> Outcome | None:
        quoted = self._quoted(p, frame)
        if quoted is None or p.ttl <= 1 or quoted[0][0] != p.destination:
            return None
        flow, at, l4 = quoted
        reply = self.replies.get(flow) or self.openings.get(flow)
        if not reply or reply.hairpin:
            return None
        if flow[4] == UDP and tuple(frame[p.l4 : p.l4 + 2]) == ((3, 3) if p.version == 4 else (1, 4)):
            self.failures[reply.frontend, "REFUSED"] += 1
        inner = (reply.client, reply.client_port, reply.called, reply.called_port, flow[4])
        return self._translated(p, frame, "ICMP_OUT", at, l4, inner, reply.called, reply.client)

    def _translated(
        self, p: Packet, frame: bytes, verdict: str, at: int, l4: int, inner: Flow, source: bytes, destination: bytes
    ) -> Outcome:
        out = bytearray(frame)
        out[l4 : l4 + 4] = struct.pack("!HH", inner[1], inner[3])
        check = p.l4 + 2
        if p.version == 4:
            addresses = inner[0][12:] + inner[2][12:]
            header = changed(be16(frame, at + 10), frame[at + 12 : at + 20], addresses)
            out[at + 10 : at + 12] = header.to_bytes(2, "big")
            out[at + 12 : at + 20] = addresses
            old, new = frame[at : at + 20] + frame[l4 : l4 + 4], bytes(out[at : at + 20] + out[l4 : l4 + 4])
        else:
            out[at + 8 : at + 40] = inner[0] + inner[2]
            old = p.source + p.destination + frame[at + 8 : at + 40] + frame[l4 : l4 + 4]
            new = source + destination + bytes(out[at + 8 : at + 40] + out[l4 : l4 + 4])
        out[check : check + 2] = changed(be16(frame, check), old, new).to_bytes(2, "big")
        checks = [*self._move(out, p, source, destination), check]
        return Outcome(REDIRECT, verdict, bytes(out), checks + ([at + 10] if p.version == 4 else []))
