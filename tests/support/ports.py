# SPDX-License-Identifier: Apache-2.0
"""Ports for tests: outside the range of the kernel's own source ports, which a client of another test may hold."""

from __future__ import annotations

import random
import socket
from pathlib import Path


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """A port that nothing holds over IPv4 or IPv6 at the moment, for a socket of this kind."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(10_000, low), 100):
        with socket.socket(socket.AF_INET6, kind) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                probe.bind(("::", port))
            except OSError:
                continue
            return port
    raise OSError("of 100 ports none is free")
