# SPDX-License-Identifier: Apache-2.0
"""Streams arrive byte for byte, half-closes and resets arrive as what they are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.engines.topology import STREAM, Topology
from tests.support.peers import Stream
from tests.support.polling import wait_for

pytestmark = pytest.mark.root

MEGABYTE = 1_000_000
_tags = (f"t{n}" for n in itertools.count())


class Call:
    """A stream through the mesh; `ends` gives the client's and the server's report."""

    def __init__(self, topology: Topology, *options: str, family: int = 4) -> None:
        self.tag = next(_tags)
        self.topology = topology
        address = topology.node.address if family == 4 else topology.node.address6
        self.stream = Stream(topology.client, address, STREAM, self.tag, *options)

    def server_reports(self) -> list[dict[str, Any]]:
        return [r for host in self.topology.hosts.values() for r in host.streams.reports(self.tag)]

    def ends(self) -> tuple[dict[str, Any], dict[str, Any]]:
        client = self.stream.wait()
        (server,) = wait_for(self.server_reports, f"server's report of {self.tag}")
        return client, server


def assert_complete(call: Call, up: int, down: int) -> None:
    client, server = call.ends()
    assert client == {"tag": call.tag, "end": "complete", "sent": up, "received": down, "corrupt_at": -1}
    assert server == {"tag": call.tag, "end": "complete", "sent": down, "received": up, "corrupt_at": -1}


@pytest.mark.parametrize("family", [4, 6])
def test_hundred_megabytes_each_way_at_once(topology: Topology, family: int) -> None:
    call = Call(topology, "-u", str(100 * MEGABYTE), "-d", str(100 * MEGABYTE), family=family)
    assert_complete(call, 100 * MEGABYTE, 100 * MEGABYTE)


@pytest.mark.parametrize("size", [0, 1, 127, 65521, 65536, 65537, 1_048_577])
def test_sizes(topology: Topology, size: int) -> None:
    assert_complete(Call(topology, "-u", str(size), "-d", str(size)), size, size)


def test_client_closes_its_half_first(topology: Topology) -> None:
    """The server sends nothing before it has seen the end of the client's stream."""
    assert_complete(Call(topology, "-W", "-u", str(MEGABYTE), "-d", str(20 * MEGABYTE)), MEGABYTE, 20 * MEGABYTE)


def test_server_closes_its_half_first(topology: Topology) -> None:
    assert_complete(Call(topology, "-w", "-u", str(20 * MEGABYTE), "-d", str(MEGABYTE)), 20 * MEGABYTE, MEGABYTE)


def test_half_close_without_a_byte(topology: Topology) -> None:
    assert_complete(Call(topology, "-w", "-u", "10", "-d", "0"), 10, 0)
    assert_complete(Call(topology, "-W", "-u", "0", "-d", "10"), 0, 10)


def test_slow_reader_holds_the_server_back(topology: Topology) -> None:
    """While the client does not read, the server cannot get rid of its bytes; the other direction goes on."""
    size = 100 * MEGABYTE
    call = Call(topology, "-s", "-u", str(10 * MEGABYTE), "-d", str(size))
    others = [Call(topology, "-u", str(MEGABYTE), "-d", str(MEGABYTE)) for _ in range(4)]
    for other in others:
        assert_complete(other, MEGABYTE, MEGABYTE)
    assert not call.server_reports()
    call.stream.resume()
    assert_complete(call, 10 * MEGABYTE, size)


def test_reset_by_the_client_reaches_the_server(topology: Topology) -> None:
    client, server = Call(topology, "-x", str(MEGABYTE), "-d", str(50 * MEGABYTE)).ends()
    assert client["end"] == "we reset"
    assert server["end"] == "reset"
    assert client["corrupt_at"] == -1


def test_reset_by_the_server_reaches_the_client(topology: Topology) -> None:
    client, server = Call(topology, "-X", str(MEGABYTE), "-u", str(50 * MEGABYTE)).ends()
    assert server["end"] == "we reset"
    assert client["end"] == "reset"
    assert server["corrupt_at"] == -1


def test_many_streams_at_once(topology: Topology) -> None:
    calls = [Call(topology, "-u", str(3 * MEGABYTE), "-d", str(2 * MEGABYTE)) for _ in range(40)]
    for call in calls:
        assert_complete(call, 3 * MEGABYTE, 2 * MEGABYTE)
