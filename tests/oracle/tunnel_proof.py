# SPDX-License-Identifier: Apache-2.0
"""Proofs in the tunnel, written from bpf/include/mesh/geneve.h: what they are of, and what they are."""

from __future__ import annotations

import ipaddress
import time

from tests.oracle.siphash import siphash

EPOCH = 33  # bits of Unix time in nanoseconds that an epoch leaves out
ICMP = {4: 1, 6: 58}


def _mapped(address: str) -> bytes:
    ip = ipaddress.ip_address(address)
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed


def key_between(secret: bytes, sender: str, receiver: str) -> bytes:
    """The key of one direction, 16 bytes."""
    ends = _mapped(sender) + _mapped(receiver)
    return b"".join(siphash(secret, bytes([4, half]) + ends).to_bytes(8, "little") for half in (0, 1))


def subject(packet: bytes, error: int = 0) -> bytes:
    """What decides about an IP packet: addresses, ports, protocol, whether an ICMP error quotes it, version, 0."""
    version = packet[0] >> 4
    if version == 4:
        rest, protocol = packet[packet[0] % 16 * 4 :], packet[9]
        ends, later = packet[12:20], int.from_bytes(packet[6:8], "big") & 0x1FFF
    else:
        rest, protocol, ends, later = packet[40:], packet[6], packet[8:40], 0
        if protocol == 44 and packet[40] in (6, 17):  # a fragment
            rest, protocol, later = packet[48:], packet[40], int.from_bytes(packet[42:44], "big") & 0xFFF8
    if protocol == ICMP[version]:
        return subject(rest[8:], 1)
    ports = bytes(4) if later else rest[:4]
    return ends + ports + bytes([protocol, error, version, 0])


def now() -> int:
    """The epoch."""
    return time.time_ns() >> EPOCH


def proof(key: tuple[int, bytes], sender: str, receiver: str, packet: bytes, ident: bytes, epoch: int) -> bytes:
    """12 bytes that prove an IP packet with this option."""
    number, secret = key
    message = subject(packet) + ident + (epoch % 2**32).to_bytes(4, "big")
    mac = siphash(key_between(secret, sender, receiver), message)
    return (number % 65536).to_bytes(2, "big") + (epoch % 65536).to_bytes(2, "big") + mac.to_bytes(8, "little")
