# SPDX-License-Identifier: Apache-2.0
"""Runs inside the guest: two nodes that reach each other by WireGuard only. test_stock_kernel starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines import tunnel_proofs
from tests.engines.tunnel_pair import A, B, Pair
from tests.support.lab.netns import Lab, Namespace, run, veth

PORT = 51820


def by_wireguard(a: Namespace, b: Namespace) -> None:
    """Join two nodes by devices `wire`, whose packets cross `under` encrypted."""
    veth(a, "under", b, "under")
    secrets = [run("wg", "genkey").stdout for _ in (a, b)]
    public = [run("wg", "pubkey", input=secret).stdout.strip() for secret in secrets]
    for number, (node, own, other) in enumerate(((a, A, B), (b, B, A))):
        node.add_address("under", f"192.168.99.{number + 1}/24")
        node.ip("link", "add", "wire", "type", "wireguard")
        peer = ["peer", public[1 - number], "allowed-ips", f"{other}/32", "endpoint", f"192.168.99.{2 - number}:{PORT}"]
        command = node.command("wg", "set", "wire", "listen-port", str(PORT), "private-key", "/proc/self/fd/0", *peer)
        run(*command, input=secrets[number])
        node.add_address("wire", f"{own}/24")
        node.ip("link", "set", "wire", "up")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Lab() as lab:
        made = Pair(lab, by_wireguard)
        made.ensure()
        yield made
        made.close()


def flows_over_wireguard(pair: Pair, back: str) -> tuple[int, int]:
    """Bytes that node a received and sent by WireGuard."""
    tunnel_proofs.flows_keep_the_clients_address(pair, back, 1420, megabytes=1)
    received, sent = map(int, pair.a.run("wg", "show", "wire", "transfer").stdout.split()[1:])
    return received, sent


def test_flows_over_wireguard_keep_the_clients_address(pair: Pair) -> None:
    assert min(flows_over_wireguard(pair, "tunnel")) > 1_000_000


def test_a_packet_that_is_too_large_for_wireguard_is_answered(pair: Pair) -> None:
    tunnel_proofs.a_packet_that_is_too_large_is_answered(pair)


def test_flows_over_wireguard_that_return_directly_keep_the_clients_address(pair: Pair) -> None:
    """After the others, for it starts the engines anew, which takes long in here."""
    assert flows_over_wireguard(pair, "direct")[1] > 1_000_000
