# SPDX-License-Identifier: Apache-2.0
"""A plain asyncio proxy on uvloop, one process per core sharing the ports by SO_REUSEPORT: see uvloop_relay.py."""

import importlib.metadata
import sys

from bench.lab import BACKENDS, NODE, PORTS
from bench.peers.base import CORES, HERE, Side


class UvloopProxy(Side):
    name = "uvloop"
    label = "uvloop proxy"
    udp = False

    @classmethod
    def version(cls) -> str:
        return f"uvloop {importlib.metadata.version('uvloop')}, Python {sys.version.partition(' ')[0]}"

    def start(self) -> None:
        argv = (sys.executable, str(HERE / "uvloop_relay.py"), NODE, ",".join(map(str, PORTS)), ",".join(BACKENDS))
        for _ in range(CORES):
            self.daemon(*argv)
