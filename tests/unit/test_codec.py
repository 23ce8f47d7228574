# SPDX-License-Identifier: Apache-2.0
"""mesh.datapath.kernel.codec: keys and words there and back, and network order against bytes written by hand."""

from __future__ import annotations

import ipaddress
import random
import struct

from hypothesis import given
from hypothesis import strategies as st

from mesh import _abi
from mesh.datapath.kernel import codec
from mesh.model import Frontend, Network, Protocol

u32 = st.integers(0, 2**32 - 1)
ports = st.integers(0, 65535)
protocols = st.sampled_from(Protocol)
addresses = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6).filter(lambda a: a.ipv4_mapped is None),  # type: ignore[arg-type]
)
backends = st.builds(
    _abi.Backend,
    address=addresses,
    port=ports,
    protocol=protocols,
    state=st.sampled_from([_abi.BACKEND_FREE, _abi.BACKEND_ACTIVE, _abi.BACKEND_DRAINING]),
    epoch=u32,
    ifindex=u32,
    bridge=u32,
    mac=st.binary(min_size=6, max_size=6),
    version=st.sampled_from([0, 4, 6]),
    seed=st.binary(min_size=8, max_size=8),
)


@given(st.integers(0, 255), st.integers(0, _abi.ARENA_SLOTS - 1), u32, u32, u32)
def test_frontends(arena: int, offset: int, size: int, flags: int, acl: int) -> None:
    table = codec.Table(arena, offset, size)
    words = struct.pack("=QQ", *codec.frontend_words(table, flags, acl))
    assert codec.unpack_frontend(words) == (table, flags, acl)


def test_frontend_words_are_the_structs_bytes() -> None:
    words = struct.pack("=QQ", *codec.frontend_words(codec.Table(1, 2, 1021), 3, 4))
    assert words == struct.pack("=IIII", 1 << 20 | 2, 1021, 3, 4)


@given(st.builds(Frontend, addresses, ports, protocols))
def test_frontend_keys(frontend: Frontend) -> None:
    data = codec.pack_frontend_key(frontend)
    assert len(data) == 24
    assert codec.unpack_frontend_key(data) == frontend


@given(backends)
def test_backends(backend: _abi.Backend) -> None:
    data = _abi.BACKEND.pack(backend)
    assert len(data) == 64
    assert _abi.BACKEND.unpack(data) == backend
    port, protocol, state, epoch = struct.unpack_from(">HBBI", data, _abi.BACKEND_STATE_WORD)
    assert (port, protocol, state) == (backend.port, backend.protocol, backend.state)
    assert epoch.to_bytes(4, "big") == struct.pack("=I", backend.epoch)
    assert struct.pack("=Q", codec.word_at(data, _abi.BACKEND_STATE_WORD)) == data[16:24]


@given(u32, st.one_of(addresses.map(ipaddress.ip_network), st.sampled_from(["10.0.0.0/8", "fd00::/8", "::/0"])))
def test_source_rules(acl: int, network: object) -> None:
    net = ipaddress.ip_network(str(network))
    assert codec.unpack_acl_key(codec.pack_acl_key(acl, net)) == (acl, net)


def test_source_rules_count_the_mapped_prefix() -> None:
    key = codec.pack_acl_key(7, ipaddress.ip_network("10.1.0.0/16"))
    assert struct.unpack("=II", key[:8]) == (32 + 96 + 16, 7)


def test_flows_by_hand() -> None:
    flow = _abi.Flow(
        source=ipaddress.ip_address("1.2.3.4"),
        destination=ipaddress.ip_address("fd00::1"),
        source_port=0x1234,
        destination_port=0x5678,
        protocol=Protocol.UDP,
    )
    data = _abi.FLOW.pack(flow)
    assert data.hex() == "00000000000000000000ffff01020304" + "fd" + 14 * "00" + "01" + "12345678" + "11000000"
    assert _abi.FLOW.unpack(data) == flow


@given(st.builds(_abi.Note, u32, u32, u32, u32))
def test_notes(note: _abi.Note) -> None:
    assert _abi.NOTE.unpack(_abi.NOTE.pack(note)) == note


@given(st.integers(0, 2**64 - 1), st.ip_addresses(v=4), u32, ports)
def test_config(cookie: int, hairpin: ipaddress.IPv4Address, settings: int, port: int) -> None:
    config = _abi.Config(
        netns_cookie=cookie,
        hairpin=hairpin,
        hairpin6=ipaddress.ip_address("100::8"),
        settings=settings,
        tunnel_port=port,
        error_rate=1000,
    )
    data = _abi.CONFIG.pack(config)
    assert len(data) == 56
    assert _abi.CONFIG.unpack(data) == config


@given(st.builds(_abi.Node, source=addresses, ifindex=u32, mtu=u32, id=u32))
def test_nodes(node: _abi.Node) -> None:
    data = _abi.NODE.pack(node)
    assert len(data) == 176
    assert _abi.NODE.unpack(data) == node


def test_what_a_backend_is_called_between_nodes() -> None:
    assert codec.pack_id(bytes(range(32)), 0x1234, 6).hex() == "0001020304050607123406" + "00"


def test_port_index() -> None:
    assert codec.port_index(80, Protocol.TCP) == 80
    assert codec.port_index(53, Protocol.UDP) == 65536 + 53


@given(st.lists(u32, max_size=5), st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_plain_numbers(words: list[int], longs: list[int]) -> None:
    assert codec.unpack_u32s(b"".join(map(codec.pack_u32, words))) == words
    assert [codec.unpack_u32(codec.pack_u32(word)) for word in words] == words
    assert codec.unpack_u64s(struct.pack(f"={len(longs)}Q", *longs)) == longs


networks = st.one_of(
    st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.ip_addresses(v=4), st.integers(1, 32)),
    st.builds(
        lambda a, n: ipaddress.ip_network((a, n), strict=False),
        st.ip_addresses(v=6).filter(lambda a: a.ipv4_mapped is None),  # type: ignore[arg-type]
        st.integers(97, 128),
    ),
)


@given(u32, networks)
def test_network_keys(owner: int, network: Network) -> None:
    data = codec.pack_network_key(owner, network)
    assert len(data) == 24
    assert codec.unpack_network_key(data) == (owner, network)


@given(st.lists(networks, max_size=4), st.randoms(use_true_random=False))
def test_every_address_of_a_network_has_its_bit(found: list[Network], chance: random.Random) -> None:
    """mesh_backend.networks may say yes of others, never no of these."""
    bits = codec.network_bits(found)
    for network in found:
        address = network[chance.randrange(min(network.num_addresses, 2**63))]
        first, second = address.packed[:2]
        assert bits >> ((first ^ second) & 63) & 1


def test_bits_of_networks() -> None:
    assert codec.network_bits([]) == 0
    assert codec.network_bits([ipaddress.ip_network("10.0.1.0/24")]) == 1 << 10
    assert codec.network_bits([ipaddress.ip_network("fd00:18::/64")]) == 1 << (0xFD & 63)
    assert codec.network_bits([ipaddress.ip_network("10.0.0.0/15")]) == 1 << 10 | 1 << 11
    assert codec.network_bits([ipaddress.ip_network("0.0.0.0/0")]) == 2**64 - 1
