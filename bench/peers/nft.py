# SPDX-License-Identifier: Apache-2.0
"""nftables DNAT with conntrack: what kube-proxy's nftables mode and published container ports do."""

import shutil
from collections.abc import Sequence
from typing import Final

from bench.lab import BACKENDS, NODE
from bench.peers.base import Side, first_line

# As long as a connection exists nothing expires; after its end the entries of a run must not fill the table (whose size
# belongs to the host) for the next.
TIMEOUTS = ("time_wait", "close", "fin_wait", "last_ack", "close_wait")


IDLE_SERVICES: Final = 999
IDLE_BACKENDS: Final = 10


class Nft(Side):
    name = "nft"
    label = "nft DNAT"
    sockets = False
    changeable = True

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("nft") else "nft is not installed"

    @classmethod
    def version(cls) -> str:
        return first_line("nft", "--version")

    def start(self) -> None:
        self.lab.run("node", "nft", "-f", self.render("nft.nft"))
        for name in TIMEOUTS:
            self.lab.run("node", "sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_timeout_{name}=2")

    def stop(self) -> None:
        self.lab.run("node", "nft", "delete table ip bench")

    def change(self, step: int) -> None:
        """No new flows to one backend, in turn, in one transaction; every fifth step is all of them."""
        chosen = [address for i, address in enumerate(BACKENDS) if i != step % (len(BACKENDS) + 1)]
        self.lab.run("node", "nft", "-f", "-", stdin=f"flush chain ip bench service\n{rule('service', chosen)}")


def rule(chain: str, addresses: Sequence[str]) -> str:
    """The command that adds the choice among some backends to a chain."""
    choices = ", ".join(f"{i} : {address}" for i, address in enumerate(addresses))
    return f"add rule ip bench {chain} dnat to numgen random mod {len(addresses)} map {{ {choices} }}\n"


class NftWide(Nft):
    """The same beside 999 services of 10 backends."""

    name = "nft-1000"
    label = "nft DNAT, 1,000 services"
    only = ("connections", "requests")
    quick = False
    changeable = False

    def start(self) -> None:
        super().start()
        chains, rules, elements = [], [], []
        for n in range(IDLE_SERVICES):
            chains.append(f"add chain ip bench idle{n}\n")
            numbers = range(n * IDLE_BACKENDS, (n + 1) * IDLE_BACKENDS)
            rules.append(rule(f"idle{n}", [f"172.30.{1 + i // 250}.{1 + i % 250}" for i in numbers]))
            elements.append(f"{NODE} . tcp . {20000 + n} : goto idle{n}")
        text = "".join((*chains, *rules, f"add element ip bench services {{ {', '.join(elements)} }}\n"))
        self.lab.run("node", "nft", "-f", "-", stdin=text)
