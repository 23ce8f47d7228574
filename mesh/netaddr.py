# SPDX-License-Identifier: Apache-2.0
"""Addresses as bytes and as text: the one place that packs them, reads HOST:PORT, and tells this host's own.

An address in a struct is always 16 bytes, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2).
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mesh.model import Address, Network

SIZE: Final = 16  # bytes of a packed address
_MAPPED: Final = bytes(10) + b"\xff\xff"
MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
"""Where IPv4 lies among the packed addresses."""


def pack(address: Address) -> bytes:
    """16 bytes in network order, IPv4 as IPv4-mapped."""
    packed = address.packed
    return packed if len(packed) == SIZE else _MAPPED + packed


def unpack(data: bytes) -> Address:
    """The address of 16 bytes; an IPv4-mapped one is IPv4.

    Raises:
        ValueError: not 16 bytes.
    """
    if len(data) != SIZE:
        raise ValueError(f"an address is {SIZE} bytes, not {len(data)}")
    return ipaddress.IPv4Address(data[12:]) if data.startswith(_MAPPED) else ipaddress.IPv6Address(data)


def unmap(address: Address) -> Address:
    """The address itself; of an IPv4-mapped one, the IPv4 address."""
    return (address.ipv4_mapped if address.version == 6 else None) or address


def prefix_length(network: Network) -> int:
    """Length of a network's prefix on packed addresses, in bits."""
    return network.prefixlen + (MAPPED.prefixlen if network.version == 4 else 0)


def network_of(address: Address, length: int) -> Network:
    """The network of an address and the length of its prefix on packed addresses; inverse of `prefix_length`."""
    if address.version == 4 and length >= MAPPED.prefixlen:
        return ipaddress.IPv4Network((address, length - MAPPED.prefixlen))
    return ipaddress.IPv6Network((int.from_bytes(pack(address), "big"), length))


def split_host_port(text: str, default: int | None = None) -> tuple[str, int]:
    """`web:80`, `192.0.2.7:80`, `[2001:db8::7]:80` or `:80` as host, without brackets, and port.

    Args:
        default: the port where the text has none; then IPv6 may stand without brackets. None: it has to have one.

    Raises:
        ValueError: it is none of these, or the port is not in 0 to 65535.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if default is not None and (not colon or (":" in host and not bracketed)):
        host, port = text, str(default)
        bracketed = host.startswith("[") and host.endswith("]")
    elif not colon:
        raise ValueError(f"{text!r} has no port")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(f"{port!r} is not a port")
    bare = host[1:-1] if bracketed else host
    if "[" in bare or "]" in bare or (":" in bare and not bracketed and default is None):
        raise ValueError(f"{host!r} is not a host; IPv6 stands in brackets")
    return bare, int(port)


def split_address_port(text: str) -> tuple[Address, int]:
    """`192.0.2.7:80` or `[2001:db8::7]:80` as address and port; names are not looked up.

    Raises:
        ValueError: it is neither.
    """
    host, port = split_host_port(text)
    address = ipaddress.ip_address(host)
    if (address.version == 6) != text.startswith("["):
        raise ValueError(f"{text!r}: IPv6, and nothing else, stands in brackets")
    return address, port


def join_host_port(host: Address | str, port: int) -> str:
    """HOST:PORT, IPv6 in brackets."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def of_proc(text: str) -> tuple[Address, int]:
    """`0100007F:1F90` of /proc/net/tcp (proc(5)) as address and port: words in the machine's order, hexadecimal."""
    address, _, port = text.partition(":")
    packed = b"".join(int(address[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(address), 8))
    return unmap(ipaddress.ip_address(packed)), int(port, 16)


def usable(address: Address) -> Address | None:
    """The address, if other nodes can call it: no loopback, unspecified, multicast or link-local one."""
    bad = address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local
    return None if bad else address


def source_towards(address: Address) -> Address | None:
    """This host's address by which it calls another one, without any traffic; None: there is no route."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:
            return None
        return ipaddress.ip_address(probe.getsockname()[0])


def is_mine(address: Address) -> bool:
    """Whether an address is this host's own: the kernel itself takes it as a source, without any traffic."""
    return address.is_loopback or source_towards(address) == address
