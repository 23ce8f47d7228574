# SPDX-License-Identifier: Apache-2.0
"""Who may hand flows over names a client that the task's service denies, or another service's frontend (issue 12, 1).

The node of the task applies mesh.allow and mesh.deny of the task's own service again.
"""

from __future__ import annotations

import pytest

from tests.attacks.two_nodes import (
    ALLOWED,
    DENIED,
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
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]
B = NODES["b"][0]


def test_the_peer_port_denies_it_by_tcp(two_nodes: TwoNodes) -> None:
    assert ask_peer(two_nodes.a, B, header(ALLOWED)) == b"\x06"
    before = two_nodes.total(two_nodes.b, "peer_denied")
    assert ask_peer(two_nodes.a, B, header(DENIED)) == b"\x16"  # PEER_NO and Failure.DENIED
    assert two_nodes.total(two_nodes.b, "peer_denied") == before + 1


def test_the_peer_port_denies_it_by_udp(two_nodes: TwoNodes) -> None:
    assert send(two_nodes.a, B, PEER, head(ALLOWED) + b"x", patience=5).startswith(b"task")
    before = two_nodes.total(two_nodes.b, "peer_denied")
    assert send(two_nodes.a, B, PEER, head(DENIED) + b"x", patience=0.3) == b""
    assert two_nodes.total(two_nodes.b, "peer_denied") == before + 1


def test_a_nodes_own_processes_are_no_clients(two_nodes: TwoNodes) -> None:
    """Source rules do not apply to them, on whatever node the task is; a node says so by a loopback address."""
    assert ask_peer(two_nodes.a, B, header("127.0.0.1")) == b"\x06"
    assert send(two_nodes.a, B, PEER, head("127.0.0.1") + b"x", patience=5).startswith(b"task")


@pytest.mark.parametrize("packet", [through_tunnel, syn_through_tunnel])
def test_the_tunnel_denies_it(two_nodes: TwoNodes, packet: object) -> None:
    if two_nodes.engine != "kernel":
        return  # it has no tunnel
    assert callable(packet)
    before = two_nodes.verdict(two_nodes.b, "tunnel_rx"), two_nodes.verdict(two_nodes.b, "denied")
    send(two_nodes.a, B, TUNNEL, packet(ALLOWED))
    wait_for(lambda: two_nodes.verdict(two_nodes.b, "tunnel_rx") == before[0] + 1, "the client that is admitted")
    send(two_nodes.a, B, TUNNEL, packet(DENIED))
    wait_for(lambda: two_nodes.verdict(two_nodes.b, "denied") == before[1] + 1, "the other one")
    assert two_nodes.verdict(two_nodes.b, "tunnel_rx") == before[0] + 1


def test_rules_that_change_hold_at_once(two_nodes: TwoNodes) -> None:
    try:
        two_nodes.rules(deny=[f"{ALLOWED}/32"])
        assert ask_peer(two_nodes.a, B, header(ALLOWED)) == b"\x16"
        assert ask_peer(two_nodes.a, B, header(DENIED)) == b"\x06"
    finally:
        two_nodes.rules()
    assert ask_peer(two_nodes.a, B, header(ALLOWED)) == b"\x06"
