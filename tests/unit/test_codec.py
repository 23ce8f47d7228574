# SPDX-License-Identifier: Apache-2.0
"""mesh.datapath.kernel.codec: every struct there and back, and network order against bytes written by hand."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import _bpf
from mesh.datapath.kernel import codec
from mesh.model import Flow, Frontend, Protocol

u32 = st.integers(0, 2**32 - 1)
ports = st.integers(0, 65535)
protocols = st.sampled_from(Protocol)
addresses = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6).filter(lambda a: a.ipv4_mapped is None),  # type: ignore[arg-type]
)
backends = st.builds(
    codec.BackendSlot,
    address=addresses,
    port=ports,
    protocol=st.sampled_from([6, 17]),
    state=st.sampled_from([0, 1, 2]),
    epoch=u32,
    ifindex=u32,
    bridge=u32,
    mac=st.binary(min_size=6, max_size=6),
    version=st.sampled_from([0, 4, 6]),
    seed=st.binary(min_size=8, max_size=8),
)


@given(addresses)
def test_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    data = codec.pack_address(address)
    assert len(data) == 16
    assert codec.unpack_address(data) == address


def test_addresses_by_hand() -> None:
    assert codec.pack_address(ipaddress.ip_address("1.2.3.4")).hex() == "00000000000000000000ffff01020304"
    assert codec.pack_address(ipaddress.ip_address("fd00::1")).hex() == "fd000000000000000000000000000001"
    with pytest.raises(ValueError, match="16 bytes"):
        codec.unpack_address(b"1234")


@given(ports)
def test_ports_are_network_order(port: int) -> None:
    assert struct.pack("=H", codec.be16(port)) == struct.pack(">H", port)
    assert codec.be16(codec.be16(port)) == port


@given(st.integers(0, 255), st.integers(0, codec.ARENA_SLOTS - 1), u32)
def test_tables(arena: int, offset: int, size: int) -> None:
    table = codec.Table(arena, offset, size)
    assert codec.table_of(codec.table_word(table)) == table


@given(u32, u32)
def test_options(flags: int, acl: int) -> None:
    assert codec.options_of(codec.options_word(flags, acl)) == (flags, acl)


def test_frontend_words_are_the_structs_bytes() -> None:
    words = struct.pack("=QQ", codec.table_word(codec.Table(1, 2, 1021)), codec.options_word(3, 4))
    assert words == codec.FRONTEND.pack(1 << 20 | 2, 1021, 3, 4)


@given(st.builds(Frontend, addresses, ports, protocols))
def test_frontend_keys(frontend: Frontend) -> None:
    data = codec.pack_frontend_key(frontend)
    assert len(data) == 24
    assert codec.unpack_frontend_key(data) == frontend


@given(backends)
def test_backends(backend: codec.BackendSlot) -> None:
    data = codec.pack_backend(backend)
    assert len(data) == 64
    assert codec.unpack_backend(data) == backend
    port, protocol, state = struct.unpack_from(">HBB", data, codec.BACKEND_STATE_OFFSET)
    assert (port, protocol, state) == (backend.port, backend.protocol, backend.state)


@given(u32, st.one_of(addresses.map(ipaddress.ip_network), st.sampled_from(["10.0.0.0/8", "fd00::/8", "::/0"])))
def test_source_rules(acl: int, network: object) -> None:
    net = ipaddress.ip_network(str(network))
    assert codec.unpack_acl_key(codec.pack_acl_key(acl, net)) == (acl, net)


def test_source_rules_count_the_mapped_prefix() -> None:
    key = codec.pack_acl_key(7, ipaddress.ip_network("10.1.0.0/16"))
    assert struct.unpack("=II", key[:8]) == (32 + 96 + 16, 7)


@given(st.builds(Flow, addresses, ports, addresses, ports, protocols))
def test_flows(flow: Flow) -> None:
    data = codec.pack_flow(flow)
    assert len(data) == 40
    assert codec.unpack_flow(data) == flow


@given(st.builds(codec.Note, u32, u32, u32, st.integers(0, 2**31 - 1), st.booleans()))
def test_notes(note: codec.Note) -> None:
    assert codec.unpack_note(codec.pack_note(note)) == note


@given(st.integers(0, 2**64 - 1), st.ip_addresses(v=4), u32, ports)
def test_config(cookie: int, hairpin: ipaddress.IPv4Address, settings: int, port: int) -> None:
    other = ipaddress.ip_address("100::8")
    config = codec.ConfigSlot(cookie, hairpin, other, settings, port, 1000)
    data = codec.pack_config(config)
    assert len(data) == 48
    assert codec.unpack_config(data) == config


@given(st.builds(codec.NodeSlot, addresses, u32, u32, u32))
def test_nodes(node: codec.NodeSlot) -> None:
    data = codec.pack_node(node)
    assert len(data) == 40
    assert codec.unpack_node(data) == node


def test_what_a_backend_is_called_between_nodes() -> None:
    assert codec.pack_id(bytes(range(32)), 0x1234, 6).hex() == "0001020304050607123406" + "00"


def test_port_index() -> None:
    assert codec.port_index(80, Protocol.TCP) == 80
    assert codec.port_index(53, Protocol.UDP) == 65536 + 53


def test_structs_have_the_contracts_sizes() -> None:
    sizes = {name: getattr(codec, name.upper()).size for name in _bpf.LAYOUT}
    assert sizes == _bpf.LAYOUT
    assert _bpf.VERDICTS[0][0] == "FORWARD"
