# SPDX-License-Identifier: Apache-2.0
"""Frames of a source that may not call, whole ones and others."""

from __future__ import annotations

from random import Random

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

SOURCE6 = "2001:db8:77::1"


def whole(source_mac: str, mac: str, source: str, node: str, node6: str, port: int) -> list[bytes]:
    """Frames whose source a rule can judge."""
    ether = Ether(src=source_mac, dst=mac)
    packets = [
        IP(src=source, dst=node) / TCP(sport=1000, dport=port, flags="S"),
        IP(src=source, dst=node) / TCP(sport=1000, dport=port, flags="A") / Raw(bytes(1000)),
        IP(src=source, dst=node) / TCP(sport=1000, dport=port, flags="R", chksum=1),
        IP(src=source, dst=node, options=[b"\x01\x01\x01\x00"]) / TCP(sport=1000, dport=port),
        IP(src=source, dst=node) / UDP(sport=1000, dport=port) / Raw(bytes(1400)),
        IPv6(src=SOURCE6, dst=node6) / TCP(sport=1000, dport=port, flags="S"),
        IPv6(src=SOURCE6, dst=node6) / UDP(sport=1000, dport=port) / Raw(b"x"),
    ]
    return [bytes(ether / packet) for packet in packets]


def broken(source_mac: str, mac: str, source: str, node: str, node6: str, port: int) -> list[bytes]:
    """Frames that contradict themselves, or whose ports nobody can know; and what is cut off anywhere."""
    ether = Ether(src=source_mac, dst=mac)
    tcp = TCP(sport=1000, dport=port)
    packets = [
        IP(src=source, dst=node) / TCP(sport=1000, dport=port, dataofs=3),
        IP(src=source, dst=node, len=1400) / tcp,
        IP(src=source, dst=node, ihl=3) / tcp,
        IP(src=source, dst=node, version=6) / tcp,
        IP(src=source, dst=node, flags="MF") / tcp,
        IP(src=source, dst=node, proto=6, frag=100) / Raw(bytes(tcp)),
        IPv6(src=SOURCE6, dst=node6, plen=4000) / tcp,
        IPv6(src=SOURCE6, dst=node6) / IPv6ExtHdrFragment(nh=6, m=1) / tcp,
        Dot1Q(vlan=4000) / IP(src=source, dst=node) / tcp,
        Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3) / IP(src=source, dst=node) / tcp,
    ]
    frames = [bytes(ether / packet) for packet in packets]
    complete = bytes(ether / IP(src=source, dst=node) / tcp)
    frames += [complete[:length] for length in range(15, len(complete))]
    random = Random(1)
    return frames + [complete[:14] + random.randbytes(random.randrange(1, 1400)) for _ in range(100)]
