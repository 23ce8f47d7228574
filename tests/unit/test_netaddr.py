# SPDX-License-Identifier: Apache-2.0
"""mesh.netaddr: addresses as 16 bytes, HOST:PORT as text, and which addresses are this host's."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import netaddr
from mesh.model import Address

ports = st.integers(0, 65535)
addresses = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6).filter(lambda a: a.ipv4_mapped is None),  # type: ignore[union-attr, arg-type]
)
names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True)
TEXTS = ["fd00::7", "[fd00::7]", "[fd00::7]:", "fd00::7:80x", "[fd00::7:80", "a]:80", "h:-1", "h:65536", "h:٣", "h:1_0"]


@given(addresses)
def test_packed_and_back(address: Address) -> None:
    data = netaddr.pack(address)
    assert len(data) == netaddr.SIZE
    assert netaddr.unpack(data) == address
    same = ipaddress.IPv6Address(f"::ffff:{address}" if address.version == 4 else str(address))
    assert data == socket.inet_pton(socket.AF_INET6, str(same))
    assert (same in netaddr.MAPPED) == (address.version == 4)
    assert netaddr.unmap(same) == netaddr.unmap(address) == address


@pytest.mark.parametrize("size", [0, 4, 15, 17])
def test_an_address_is_sixteen_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"16 bytes, not {size}"):
        netaddr.unpack(bytes(size))


@given(addresses, st.integers(0, 128))
def test_prefixes_of_packed_addresses(address: Address, bits: int) -> None:
    network = ipaddress.ip_network((address, min(bits, address.max_prefixlen)), strict=False)
    length = netaddr.prefix_length(network)
    assert netaddr.network_of(netaddr.unpack(netaddr.pack(network.network_address)), length) == network
    packed = ipaddress.IPv6Network((netaddr.pack(network.network_address), length))  # raises if bits lie beyond
    assert packed.subnet_of(netaddr.MAPPED) == (address.version == 4)


def test_a_wide_prefix_at_the_mapped_addresses() -> None:
    mapped = ipaddress.IPv6Network("::ffff:0:0/95", strict=False)
    address = netaddr.unpack(netaddr.pack(mapped.network_address))
    assert netaddr.network_of(address, 95) == mapped


@given(st.one_of(addresses, names), ports)
def test_host_port_and_back(host: Address | str, port: int) -> None:
    text = netaddr.join_host_port(host, port)
    assert netaddr.split_host_port(text) == (str(host), port)
    assert netaddr.split_host_port(text, default=1) == (str(host), port)
    assert netaddr.split_host_port(str(host), default=port) == (str(host), port)
    if not isinstance(host, str):
        assert netaddr.split_address_port(text) == (host, port)


def test_every_address() -> None:
    assert netaddr.split_host_port(":80") == ("", 80)
    with pytest.raises(ValueError, match="address"):
        netaddr.split_address_port(":80")


@given(st.one_of(st.text(max_size=12), st.text("[]:.0123fg", max_size=12)), st.none() | ports)
def test_whatever_is_read_says_the_same_again(text: str, default: int | None) -> None:
    try:
        host, port = netaddr.split_host_port(text, default)
    except ValueError:
        return
    assert 0 <= port < 65536
    assert "[" not in host and "]" not in host
    assert netaddr.split_host_port(netaddr.join_host_port(host, port)) == (host, port)


@pytest.mark.parametrize("text", ["", "host", *TEXTS])
def test_no_host_and_port(text: str) -> None:
    with pytest.raises(ValueError):
        netaddr.split_host_port(text)


def test_without_port_ipv6_needs_no_brackets() -> None:
    assert netaddr.split_host_port("fd00::7", 80) == ("fd00::7", 80)
    assert netaddr.split_host_port("[fd00::7]", 80) == ("fd00::7", 80)
    with pytest.raises(ValueError, match="not a port"):
        netaddr.split_host_port("host:", 80)


@pytest.mark.parametrize("text", ["[192.0.2.7]:80", "fd00::7:80", "web:80", "192.0.2.7"])
def test_no_address_and_port(text: str) -> None:
    with pytest.raises(ValueError):
        netaddr.split_address_port(text)


def test_mine() -> None:
    assert netaddr.is_mine(ipaddress.ip_address("127.0.0.9"))
    assert netaddr.is_mine(ipaddress.ip_address("::1"))
    assert not netaddr.is_mine(ipaddress.ip_address("192.0.2.77"))
    assert not netaddr.is_mine(ipaddress.ip_address("2001:db8::77"))
