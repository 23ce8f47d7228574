# SPDX-License-Identifier: Apache-2.0
"""A container without privileges sends what only nodes send, since Docker gives it its node's address (issue 12, 1).

It must not reach a node: neither the peer port, by TCP or UDP, nor the tunnel, with requests or with forged replies.
"""

from __future__ import annotations

import socket

import pytest

from tests.attacks.two_nodes import (
    NODES,
    PEER,
    TUNNEL,
    TwoNodes,
    ask_peer,
    head,
    header,
    send,
    syn_through_tunnel,
    through_tunnel,
)
from tests.support.lab.netns import Namespace
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def kept(two_nodes: TwoNodes) -> TwoNodes:
    return two_nodes


def is_dropped(nodes: TwoNodes, node: Namespace, before: int) -> None:
    wait_for(lambda: nodes.dropped(node) > before, "counted where it was dropped")


@pytest.mark.parametrize("family", [4, 6])
def test_a_header_over_tcp_reaches_no_peer_port(kept: TwoNodes, family: int) -> None:
    address, before = NODES["b"][family == 6], kept.dropped(kept.a)
    assert ask_peer(kept.attackers["a"], address, header()) == b""
    is_dropped(kept, kept.a, before)


@pytest.mark.parametrize("family", [4, 6])
def test_a_datagram_reaches_no_peer_port(kept: TwoNodes, family: int) -> None:
    address, before = NODES["b"][family == 6], kept.dropped(kept.a)
    assert send(kept.attackers["a"], address, PEER, head() + b"attack", patience=0.5) == b""
    is_dropped(kept, kept.a, before)


@pytest.mark.parametrize("data", [through_tunnel(), syn_through_tunnel(), bytes(100)], ids=["udp", "syn", "noise"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_tunnelled_packet_reaches_no_node(kept: TwoNodes, family: int, data: bytes) -> None:
    address, before = NODES["b"][family == 6], kept.dropped(kept.a)
    seen = kept.verdict(kept.b, "tunnel_rx"), kept.verdict(kept.b, "tunnel_invalid")
    send(kept.attackers["a"], address, TUNNEL, data)
    is_dropped(kept, kept.a, before)
    assert (kept.verdict(kept.b, "tunnel_rx"), kept.verdict(kept.b, "tunnel_invalid")) == seen


def test_its_own_node_is_closed_to_it_as_well(kept: TwoNodes) -> None:
    assert ask_peer(kept.attackers["b"], NODES["b"][0], header(), patience=0.5) == b""
    assert ask_peer(kept.attackers["b"], "172.31.0.1", header(), patience=0.5) == b""


def test_the_same_ports_elsewhere_are_open_to_it(kept: TwoNodes) -> None:
    """Only nodes' addresses are kept from containers: others may use these ports for what they like."""
    before = kept.dropped(kept.a)
    with kept.client.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((kept.client.address, TUNNEL))
    with sock:
        sock.settimeout(5)
        kept.a.run("nft", "add", "rule", "inet", "docker", "postrouting", "oifname", "eth0", "masquerade")
        send(kept.attackers["a"], kept.client.address, TUNNEL, b"hello")
        assert sock.recv(100) == b"hello"
    assert kept.dropped(kept.a) == before
