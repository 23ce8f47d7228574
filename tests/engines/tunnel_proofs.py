# SPDX-License-Identifier: Apache-2.0
"""What holds of two nodes however they are joined; run here over tun devices and in the guest over WireGuard."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

import pytest

from mesh.datapath.paths.tunnel_probe import ask_tunnel
from tests.engines.kernel_plane import Connection, datagram, refused
from tests.engines.tunnel_pair import MEGABYTE, UDP, A, B, Pair
from tests.support.polling import wait_for
from tests.support.sockets import IP_MTU_DISCOVER, assert_echo, omitting

IP_PMTUDISC_DO = 2


def flows_keep_the_clients_address(
    pair: Pair, back: str, mtu: int, megabytes: int = 5, key: tuple[int, bytes] | None = None
) -> None:
    """Connections, bulk in both directions, datagrams, refusals: by the tunnel, there and back. With a key both nodes
    demand proofs."""
    pair.set_mtu(mtu)
    pair.ensure(back)
    pair.serve("there")
    pair.wait_ways(mtu)
    for node, own, other in ((pair.a, A, B), (pair.b, B, A)):
        with node.entered():  # as agents try the path
            to, at = ip_address(other), ip_address(own)
            wait_for(lambda to=to, at=at: not ask_tunnel(to, at, 6084, key), f"{other} answers trials", timeout=30)
    before = pair.verdicts(pair.a), pair.verdicts(pair.b)
    connection = Connection(pair.client, pair.a.address)
    assert (connection.backend, connection.seen) == ("there", pair.client.address)
    connection.echo(100_000)
    connection.close()
    pair.transfer(up=megabytes * MEGABYTE, down=megabytes * MEGABYTE)
    assert datagram(pair.client, pair.a.address, UDP) == f"there {pair.client.address}"
    for takes in (1500, 1300):
        large_datagrams_arrive(pair, takes)
    pair.serve()
    assert refused(pair.client, pair.a.address)
    after = pair.verdicts(pair.a), pair.verdicts(pair.b)
    near, far = (
        {name: new.get(name, 0) - old.get(name, 0) for name in new} for new, old in zip(after, before, strict=True)
    )
    replies = (near["tunnel_reply_rx"], far["tunnel_reply_tx"]) if back == "tunnel" else (far["tunnel_direct"],)
    assert min(near["tunnel_tx"], far["tunnel_rx"], *replies) > 100
    assert not far.get("tunnel_unproven") and not far.get("tunnel_invalid")


def large_datagrams_arrive(pair: Pair, takes: int) -> None:
    """Whole ones and fragments without DF that the tunnel, or the client's links to the nodes, do not take."""
    links = pair.client, pair.a, pair.b
    for end in links:
        end.ip("link", "set", "eth0", "mtu", str(takes))
    try:
        with pair.client.entered(), omitting() as client:
            client.connect((pair.a.address, UDP))
            for size in (1272, 1300, 1372, 1400, 1472, 4000, 9000):
                assert_echo(client, size)
    finally:
        for end in links:
            end.ip("link", "set", "eth0", "mtu", "1500")


def a_packet_that_is_too_large_is_answered(pair: Pair) -> None:
    """By ICMP to the client, though the node reaches the other one by a device that would take more than is said."""
    pair.set_mtu(1420)
    pair.ensure("tunnel")
    pair.serve("there")
    pair.wait_ways(1420)
    with pair.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        sock.connect((pair.a.address, UDP))
        sock.send(bytes(1400))

        def told() -> bool:
            with pytest.raises(OSError) as caught:
                sock.send(bytes(1400))
                sock.send(bytes(1400))
            return caught.value.errno == errno.EMSGSIZE

        wait_for(told)
    pair.client.ip("route", "flush", "cache")
