# SPDX-License-Identifier: Apache-2.0
"""A client chooses source ports whose flows fall into one bucket of the proxy engine's UDP session table (item 15).

The table was chained by the public hash of docs/HASHING.md: every datagram then walks along all of the attacker's
sessions. A hash by a secret key leaves nothing to choose.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from ipaddress import ip_address

from mesh._maglev import hash_flow
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.netaddr import pack
from tests.support.fastpath_bench import UdpServer, engine, udp
from tests.support.polling import wait_for

BUCKETS = 1024  # of the table, for that many sessions
SESSIONS = 400
TARGET = "127.0.0.1"


def colliding(port: int) -> Iterator[tuple[str, int]]:
    """Addresses and ports of a client whose flows have the same public hash, as far as the table uses it."""
    called = pack(ip_address(TARGET))
    for host in itertools.count(1):
        address = f"127.1.{host >> 8}.{host & 255}"
        source = pack(ip_address(address))
        for sport in range(20000, 30000):
            if not hash_flow(source, sport, called, port, 17) % BUCKETS:
                yield address, sport


def chained(datapath: ProxyDatapath) -> int:
    assert datapath._engine is not None
    return datapath._engine.totals()["udp_chained"]


def test_chosen_ports_do_not_make_long_chains() -> None:
    server, front = UdpServer("a"), udp()
    with engine(threads=1, udp_max_sessions=BUCKETS) as mesh:
        mesh.serve({front: {"a": server.where}})
        for source in itertools.islice(colliding(front.port), SESSIONS):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(source)
                sock.sendto(b"x", (TARGET, front.port))
        wait_for(lambda: mesh.counters(front).packets_in >= SESSIONS * 0.9)
        assert chained(mesh.datapath) < SESSIONS * SESSIONS / 20  # in one chain: half the square
    server.close()
