# SPDX-License-Identifier: Apache-2.0
"""Two nodes, one of them behind a router that gives it another address: all call it by an address that it has not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines import tunnel_proofs
from tests.engines.tunnel_pair import A, B, Pair
from tests.support.lab.netns import Lab, Namespace, run, veth

pytestmark = [pytest.mark.root, pytest.mark.bpf]

KEY = (0x11110001, b"k" * 16)
INNER = "10.98.0.2"
ROUTER = f"""
table ip translation {{
  chain pre {{ type nat hook prerouting priority dstnat; iifname "outer" ip daddr {B} dnat to {INNER}; }}
  chain post {{ type nat hook postrouting priority srcnat; oifname "outer" ip saddr {INNER} snat to {B}; }}
}}
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Lab() as lab:

        def join(a: Namespace, b: Namespace) -> None:
            router = lab.namespace("router")
            veth(a, "wire", router, "outer")
            veth(b, "wire", router, "inner")
            for node, device, address in ((a, "wire", A), (router, "outer", B), (router, "inner", "10.98.0.1")):
                node.add_address(device, f"{address}/24")
            b.add_address("wire", f"{INNER}/24")
            b.ip("route", "add", "10.99.0.0/24", "via", "10.98.0.1")
            router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
            run(*router.command("nft", "-f", "-"), input=ROUTER)

        made = Pair(lab, join)
        made.ensure()
        yield made
        made.close()


def test_flows_to_and_from_a_node_behind_nat_are_proven(pair: Pair) -> None:
    """Keys between two nodes are made of the addresses by which they call each other."""
    for node, own, other in ((pair.a, A, B), (pair.b, B, A)):
        pair.drivers[node].prove(keys=[[KEY[0], KEY[1].hex()]], nodes=[other], own=own)
    tunnel_proofs.flows_keep_the_clients_address(pair, "tunnel", 1500, key=KEY)
    assert pair.drivers[pair.a].problems() == pair.drivers[pair.b].problems() == []
