# SPDX-License-Identifier: Apache-2.0
"""Packets as questions to programs and to other nodes: headers without options, checksums left zero. Pure."""

from __future__ import annotations

from typing import Final

from mesh import _linux
from mesh.model import Address, Protocol

ETHER_TYPE: Final = {4: _linux.ETH_P_IP, 6: _linux.ETH_P_IPV6}
"""EtherType by IP version."""
IP_SIZE: Final = {4: _linux.IPV4.size, 6: _linux.IPV6.size}
"""Bytes of an IP header by version."""
SYN: Final = 0x02
ACK: Final = 0x10
_TTL: Final = 64
_VERSION_WORDS: Final = 4 << 4 | _linux.IPV4.size // 4
_TCP_WORDS: Final = _linux.TCP.size // 4 << 4


def tcp(source: int, destination: int, flags: int, *, acknowledged: int = 0, window: int = 0) -> bytes:
    """A TCP segment without data, from and to these ports. `flags`: SYN, ACK."""
    return _linux.TCP.pack(
        _linux.Tcp(
            source=source,
            destination=destination,
            acknowledged=acknowledged,
            words=_TCP_WORDS,
            flags=flags,
            window=window,
        )
    )


def udp(source: int, destination: int) -> bytes:
    """An empty UDP datagram, from and to these ports."""
    return _linux.UDP.pack(_linux.Udp(source=source, dest=destination, len=_linux.UDP.size))


def ip(source: Address, destination: Address, protocol: Protocol, payload: bytes) -> bytes:
    """An IP packet of the addresses' version."""
    if source.version == 4:
        header = _linux.IPV4.pack(
            _linux.Ipv4(
                version_words=_VERSION_WORDS,
                length=_linux.IPV4.size + len(payload),
                ttl=_TTL,
                protocol=protocol,
                source=source.packed,
                destination=destination.packed,
            )
        )
    else:
        header = _linux.IPV6.pack(
            _linux.Ipv6(
                version_flow=6 << 28,
                length=len(payload),
                protocol=protocol,
                hop_limit=_TTL,
                source=source.packed,
                destination=destination.packed,
            )
        )
    return header + payload
