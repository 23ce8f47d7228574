# SPDX-License-Identifier: Apache-2.0
"""Whoever has a node's address, but not the swarm's key, sends requests and replies through the tunnel (issue 12, 1).

Here a process in the node's own network namespace, which is all that a container with NET_RAW or a host beside the
nodes can be at most. Packet by packet: tests/bpf/test_tunnel_proof.py.
"""

from __future__ import annotations

import socket

import pytest

from mesh.datapath.base import BackendKey
from mesh.datapath.proxy.peers import tag_of
from tests.attacks.two_nodes import ALLOWED, KEY, NODES, OTHER, TCP_PORT, TUNNEL, TwoNodes, send
from tests.bpf.tunnel import REPLY, identity, wrapped
from tests.engines.kernel_plane import TARGET
from tests.oracle import tunnel_proof as oracle
from tests.support.frames import segment
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.only("kernel")]  # the proxy engine has no tunnel


def packet(
    frame: bytes, ident: bytes, source: str, destination: str, key: tuple[int, bytes] | None, late: int
) -> bytes:
    """The datagram's payload."""
    made = oracle.proof(key, source, destination, frame[14:], ident, oracle.now() - late) if key else b""
    return wrapped(frame, source, destination, ident, made)[42:]


def nothing_passes(nodes: TwoNodes, sender: str, frame: bytes, ident: bytes, good: str) -> None:
    """Send it without a proof, by another key, too late, and then as a node does."""
    other = "b" if sender == "a" else "a"
    caller, victim = getattr(nodes, sender), getattr(nodes, other)
    source, destination = NODES[sender][0], NODES[other][0]
    before = nodes.verdict(victim, good), nodes.verdict(victim, "tunnel_unproven")
    forged: list[tuple[tuple[int, bytes] | None, int]] = [(None, 0), (OTHER, 0), (KEY, 20)] * 6
    for key, late in forged:
        send(caller, destination, TUNNEL, packet(frame, ident, source, destination, key, late))
    wait_for(lambda: nodes.verdict(victim, "tunnel_unproven") == before[1] + len(forged), "all are counted")
    assert nodes.verdict(victim, good) == before[0]
    (line,) = (p for p in nodes.drivers[other].problems() if "proof" in p)
    assert line.startswith(f"node {source}: packets through the tunnel have its address and not its proof")
    send(caller, destination, TUNNEL, packet(frame, ident, source, destination, KEY, 0))
    wait_for(lambda: nodes.verdict(victim, good) == before[0] + 1, "what is proven passes")


def test_no_request_passes_without_a_proof(proving: TwoNodes) -> None:
    """To the node of a task."""
    task = identity(TARGET, 6, tag_of(BackendKey("task", TARGET, 6))[:8])
    call = bytes(segment(ALLOWED, 40000, NODES["a"][0], TCP_PORT, "A", b"attack"))
    nothing_passes(proving, "a", call, task, "tunnel_rx")


def test_no_reply_passes_without_a_proof(proving: TwoNodes) -> None:
    """To a client, in the name of the node that it called."""
    client, called = proving.client, proving.a.address
    client.ip("address", "replace", f"{ALLOWED}/32", "dev", "eth0")
    proving.a.ip("route", "replace", f"{ALLOWED}/32", "via", client.address)
    with client.entered(), socket.create_connection((called, TCP_PORT), PATIENCE, (ALLOWED, 0)) as sock:
        assert sock.recv(100)  # the task's greeting: it says nothing more
        answer = bytes(segment(called, TCP_PORT, ALLOWED, sock.getsockname()[1], "A", b"forged"))
        nothing_passes(proving, "b", answer, REPLY, "tunnel_reply_rx")
