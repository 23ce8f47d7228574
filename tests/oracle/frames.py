# SPDX-License-Identifier: Apache-2.0
"""Frames in plain Python, for tests/oracle/packets.py: parsing and checksums, written from the RFCs."""

from __future__ import annotations

import struct
from dataclasses import dataclass

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
EXTENSIONS = {0, 43, 44, 60, 51, 135}
MAPPED = bytes(10) + b"\xff\xff"
ETHER = 14

Flow = tuple[bytes, int, bytes, int, int]  # source, port, destination, port, protocol; addresses of 16 bytes


def be16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def total(data: bytes) -> int:
    """One's complement sum of 16-bit words, not yet complemented."""
    if len(data) % 2:
        data += b"\0"
    value = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while value > 0xFFFF:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def changed(check: int, old: bytes, new: bytes) -> int:
    """A checksum once `old` became `new` (RFC 1624, equation 3)."""
    value = (~check & 0xFFFF) + (~total(old) & 0xFFFF) + total(new)
    while value > 0xFFFF:
        value = (value & 0xFFFF) + (value >> 16)
    return ~value & 0xFFFF


@dataclass
class Packet:
    """A parsed frame. `kind`: other, flow, icmp, fragment, extension, malformed."""

    kind: str
    version: int = 0
    protocol: int = 0
    source: bytes = b""
    destination: bytes = b""
    sport: int = 0
    dport: int = 0
    l4: int = 0
    length: int = 0
    ttl: int = 0
    flags: int = 0
    fragment: int = 0
    ident: int = 0
    sequence: int = 0
    acknowledged: int = 0

    @property
    def flow(self) -> Flow:
        return (self.source, self.sport, self.destination, self.dport, self.protocol)


def parse(frame: bytes) -> Packet:
    """Read a frame."""
    kind = be16(frame, 12)
    if kind == 0x0800:
        return parse_v4(frame)
    if kind == 0x86DD:
        return parse_v6(frame)
    return Packet("other")


def parse_v4(frame: bytes) -> Packet:
    ip = frame[ETHER:]
    if len(ip) < 20:
        return Packet("other")
    header, length, protocol = (ip[0] & 15) * 4, be16(ip, 2), ip[9]
    if ip[0] >> 4 != 4 or protocol not in (TCP, UDP, ICMP) or header < 20 or not header <= length <= len(ip):
        return Packet("other")
    p = Packet("flow", 4, protocol, MAPPED + ip[12:16], MAPPED + ip[16:20], l4=ETHER + header, length=length, ttl=ip[8])
    bits = be16(ip, 6)
    p.ident = be16(ip, 4)
    p.fragment = 2 if bits & 0x1FFF else 1 if bits & 0x2000 else 0
    if protocol == ICMP:
        error = not p.fragment and length - header >= 8 and ip[header] in (3, 11, 12)
        p.kind = "icmp" if error else "other"
        return p
    if p.fragment == 2:
        p.kind = "fragment"
        return p
    return ports(p, frame, length - header)


def parse_v6(frame: bytes) -> Packet:
    ip = frame[ETHER:]
    if len(ip) < 40:
        return Packet("other")
    length, protocol = be16(ip, 4) + 40, ip[6]
    if ip[0] >> 4 != 6 or length > len(ip) or ip[8:20] == MAPPED or ip[24:36] == MAPPED:
        return Packet("other")
    p = Packet("flow", 6, protocol, ip[8:24], ip[24:40], l4=ETHER + 40, length=length, ttl=ip[7])
    if protocol == ICMP6:
        p.kind = "icmp" if length >= 48 and 1 <= ip[40] <= 4 else "other"
        return p
    if protocol == 44 and length >= 48 and ip[40] in (TCP, UDP) and be16(ip, 42) & ~6 and is_fragment_v6(ip, length):
        p.protocol, p.fragment, p.l4 = ip[40], 2 if be16(ip, 42) & ~7 else 1, ETHER + 48
        p.ident = int.from_bytes(ip[44:48], "big")
        if p.fragment == 2:
            p.kind = "fragment"
            return p
        return ports(p, frame, length - 48)
    if protocol in EXTENSIONS or protocol not in (TCP, UDP):
        p.kind = "extension" if protocol in EXTENSIONS else "other"
        return p
    return ports(p, frame, length - 40)


def is_fragment_v6(ip: bytes, length: int) -> bool:
    """Whether a fragment is a later one, or has ports."""
    return bool(be16(ip, 42) & ~7) or length >= 48 + 8


def ports(p: Packet, frame: bytes, rest: int) -> Packet:
    if rest < (20 if p.protocol == TCP else 8):
        p.kind = "malformed"
        if p.protocol == TCP and rest >= 4:
            p.sport, p.dport = be16(frame, p.l4), be16(frame, p.l4 + 2)
        return p
    p.sport, p.dport = be16(frame, p.l4), be16(frame, p.l4 + 2)
    if p.protocol == TCP:
        p.flags = frame[p.l4 + 13]
        p.sequence, p.acknowledged = struct.unpack_from("!II", frame, p.l4 + 4)
        if not 20 <= (frame[p.l4 + 12] >> 4) * 4 <= rest:
            p.kind = "malformed"
    return p
