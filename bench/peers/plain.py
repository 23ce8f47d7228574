# SPDX-License-Identifier: Apache-2.0
"""Plain routing, no balancer: the client calls the backends, drawn by lot, and the node routes. The yardstick."""

from bench.lab import BACKENDS
from bench.peers.base import Side, first_line


class Plain(Side):
    name = "plain"
    label = "plain routing"
    sockets = False

    @classmethod
    def version(cls) -> str:
        return first_line("uname", "-sr")

    def targets(self, port: int) -> list[str]:
        return [f"{address}:{port}" for address in BACKENDS]
