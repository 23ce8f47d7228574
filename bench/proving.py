# SPDX-License-Identifier: Apache-2.0
"""The daemon with the static provider, where nodes prove: `python -m bench.proving run ...` as `mesh run ...`.

The static provider has no relay that hands out keys; what real agents have agreed on is given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final

from mesh.agent import wiring
from mesh.cli.main import main
from mesh.cluster.ask import Answer
from mesh.cluster.provider import DrainHooks, Tables
from mesh.datapath.proof import Proof
from mesh.model import EngineKind
from mesh.providers.base import Provider
from mesh.reconcile.loop import Reconciler

KEY: Final = (7, bytes(range(16)))  # number and secret
NODES: Final = frozenset({IPv4Address("10.90.0.1"), IPv4Address("10.90.0.254")})  # of bench/two_nodes.py
PROOF: Final = Proof(
    keys=(KEY,), proving=NODES, checking=NODES, require=True, tunnel_proving=NODES, tunnel_checking=NODES
)


SINGLE: Final = wiring._single_source


def source_that_proves(provider: Provider) -> wiring.MakeSource:
    """What makes the same source, of a node that proves to others and demands that of them."""

    def make(
        engine: EngineKind,
        reconciler: Reconciler,
        tables: Tables,
        drains: DrainHooks,
        answers: Mapping[str, Answer],
    ) -> wiring.Source:
        reconciler.datapath.prove(PROOF)
        return replace(SINGLE(provider)(engine, reconciler, tables, drains, answers), proof=lambda: PROOF)

    return make


if __name__ == "__main__":
    wiring._single_source = source_that_proves
    main()
