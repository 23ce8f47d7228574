# SPDX-License-Identifier: Apache-2.0
"""nftables DNAT with conntrack: what kube-proxy's nftables mode and published container ports do."""

import shutil

from bench.peers.base import Side, first_line

# As long as a connection exists nothing expires; after its end the entries of a run must not fill the table (whose size
# belongs to the host) for the next.
TIMEOUTS = ("time_wait", "close", "fin_wait", "last_ack", "close_wait")


class Nft(Side):
    name = "nft"
    label = "nft DNAT"

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
