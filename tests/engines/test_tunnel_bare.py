# SPDX-License-Identifier: Apache-2.0
"""Two nodes that reach each other by a link without Ethernet, as in a swarm over WireGuard: the tunnel goes through it.

Here by tun devices; tests/guest has WireGuard itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.engines import tunnel_proofs
from tests.engines.tunnel_pair import A, B, Pair
from tests.support.lab.netns import Lab, Namespace
from tests.support.lab.tun import tun, wire

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Lab() as lab, contextlib.ExitStack() as stack:

        def join(a: Namespace, b: Namespace) -> None:
            stack.enter_context(wire(tun(a, A, device="wire"), tun(b, B, device="wire")))

        made = Pair(lab, join)
        made.ensure()
        yield made
        made.close()


@pytest.mark.parametrize("mtu", [1500, 1420])
@pytest.mark.parametrize("back", ["tunnel", "direct"])
def test_flows_keep_the_clients_address(pair: Pair, back: str, mtu: int) -> None:
    tunnel_proofs.flows_keep_the_clients_address(pair, back, mtu)


def test_a_packet_that_is_too_large_is_answered(pair: Pair) -> None:
    tunnel_proofs.a_packet_that_is_too_large_is_answered(pair)
