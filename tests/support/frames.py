# SPDX-License-Identifier: Apache-2.0
"""Frames built by scapy: inputs, and what they must have become, checksums computed anew."""

from __future__ import annotations

import logging
from typing import Any

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)

from scapy.layers.inet import IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402
from scapy.layers.l2 import Ether  # noqa: E402
from scapy.packet import Packet, Raw  # noqa: E402

__all__ = [
    "CLIENT4",
    "CLIENT6",
    "ETHER",
    "IP",
    "NODE4",
    "NODE6",
    "OTHER4",
    "TASK4",
    "TASK6",
    "TCP",
    "UDP",
    "Ether",
    "IPv6",
    "Raw",
    "become",
    "datagram",
    "error",
    "l3",
    "requoted",
    "segment",
]

CLIENT4, NODE4, TASK4, OTHER4 = "198.51.100.9", "192.0.2.1", "172.18.0.3", "172.18.0.4"
CLIENT6, NODE6, TASK6 = "2001:db8:9::9", "2001:db8::1", "fd00:18::3"
ETHER = Ether(src="02:00:00:00:00:01", dst="00:00:00:00:00:00")


def network(source: str, destination: str, **fields: Any) -> Packet:
    if ":" in destination:
        if "ttl" in fields:
            fields["hlim"] = fields.pop("ttl")
        return ETHER / IPv6(src=source, dst=destination, **fields)
    return ETHER / IP(src=source, dst=destination, **fields)


def segment(
    source: str, sport: int, destination: str, dport: int, flags: str = "S", data: bytes = b"", **fields: Any
) -> Packet:
    options = [("MSS", 1460), ("SAckOK", b""), ("WScale", 7)] if "S" in flags else []
    if ":" not in destination:
        fields = {"flags": "DF", **fields}  # as kernels do
    tcp = TCP(sport=sport, dport=dport, flags=flags, seq=0x12345678, ack=0x12345679, options=options)
    return network(source, destination, **fields) / tcp / Raw(data)


def datagram(source: str, sport: int, destination: str, dport: int, data: bytes = b"question", **fields: Any) -> Packet:
    return network(source, destination, **fields) / UDP(sport=sport, dport=dport) / Raw(data)


def become(
    frame: Packet,
    *,
    src: str | None = None,
    dst: str | None = None,
    sport: int | None = None,
    dport: int | None = None,
    hops: int = 1,
) -> bytes:
    """The frame with other addresses and ports, `hops` further on, all checksums computed anew."""
    out = frame.copy()
    ip = out[IP] if IP in out else out[IPv6]
    ip.src, ip.dst = src or ip.src, dst or ip.dst
    if IP in out:
        ip.ttl -= hops
        del ip.chksum
    else:
        ip.hlim -= hops
    l4 = out[TCP] if TCP in out else out[UDP]
    l4.sport, l4.dport = sport or l4.sport, dport or l4.dport
    if not (UDP in out and frame[UDP].chksum == 0):
        del l4.chksum
    return bytes(out)


def requoted(quoted: Any, **changes: Any) -> bytes:
    """The quoted packet with other addresses and ports; its transport checksum as it was, the IP header's anew."""
    out = quoted.__class__(bytes(quoted))
    for name in ("src", "dst"):
        if name in changes:
            setattr(out, name, changes[name])
    l4 = out[TCP] if TCP in out else out[UDP]
    for name in ("sport", "dport"):
        if name in changes:
            setattr(l4, name, changes[name])
    if isinstance(out, IP):
        del out.chksum
    return bytes(out)


def l3(frame: Any) -> Any:
    """A frame's IP packet."""
    return frame[IP] if IP in frame else frame[IPv6]


def error(source: str, destination: str, icmp: Any, quoted: bytes, ttl: int = 60) -> bytes:
    """An ICMP error in a frame, as it arrives."""
    if ":" in source:
        return bytes(ETHER / IPv6(src=source, dst=destination, hlim=ttl) / icmp / quoted)
    return bytes(ETHER / IP(src=source, dst=destination, ttl=ttl) / icmp / quoted)
