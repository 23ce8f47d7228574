# SPDX-License-Identifier: Apache-2.0
"""Whoever has a node's address, but not the swarm's key, hands flows over at the peer port (issue 12, 1).

Here a process in the node's own network namespace. Nothing is served without a proof, with another key's, with a
proof of another flow, or with one that was recorded and is older than the window. A forged answer:
tests/engines/test_peer_proof.py.
"""

from __future__ import annotations

import ipaddress
import time

import pytest

from mesh.datapath import proof
from tests.attacks.two_nodes import ALLOWED, KEY, NODES, OTHER, PEER, TwoNodes, ask_peer, head, header, send

pytestmark = [pytest.mark.root, pytest.mark.bpf]

LATE = 2 * proof.WINDOW


def mapped(address: str) -> bytes:
    return bytes(10) + b"\xff\xff" + ipaddress.ip_address(address).packed


def proven(key: tuple[int, bytes], *, ago: float = 0.0, client: str = ALLOWED) -> bytes:
    """A header with a proof, for a flow of this client."""
    plain = header()
    value, ports = plain[-11:], plain[24:28]
    made = proof.write(key, proof.TCP, value + mapped(client) + mapped("192.0.2.12") + ports, int(time.time() - ago))
    length = int.from_bytes(plain[14:16], "big") + 19
    return plain[:14] + length.to_bytes(2, "big") + plain[16:] + b"\xe1\0\x10" + made


def proven_head(key: tuple[int, bytes], *, ago: float = 0.0) -> bytes:
    body = head()[4:]
    return b"MUD2" + body + proof.write(key, proof.UDP, body, int(time.time() - ago))


@pytest.mark.parametrize("family", [4, 6])
def test_no_connection_without_a_proof(proving: TwoNodes, family: int) -> None:
    address, before = NODES["b"][family == 6], proving.total(proving.b, "peer_unproven")
    assert ask_peer(proving.a, address, proven(KEY)) == b"\x06"
    forged = [
        header(),
        proven(OTHER),
        proven(KEY, client="198.51.100.8"),
        proven(KEY, ago=LATE),
        proven(KEY, ago=-LATE),
    ]
    for data in forged:
        assert ask_peer(proving.a, address, data) == b""
    assert proving.total(proving.b, "peer_unproven") == before + len(forged)


@pytest.mark.parametrize("family", [4, 6])
def test_no_datagram_without_a_proof(proving: TwoNodes, family: int) -> None:
    address, before = NODES["b"][family == 6], proving.total(proving.b, "peer_unproven")
    assert b"task" in send(proving.a, address, PEER, proven_head(KEY) + b"x", patience=5)
    forged = [head(), proven_head(OTHER), proven_head(KEY, ago=LATE)]
    for data in forged:
        assert send(proving.a, address, PEER, data + b"x", patience=0.2) == b""
    assert proving.total(proving.b, "peer_unproven") == before + len(forged)
