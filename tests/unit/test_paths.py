# SPDX-License-Identifier: Apache-2.0
"""Ways to other nodes that fail are said to, and not any more once they work: over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

from mesh.config.keys import Config
from mesh.datapath.paths.monitor import PathMonitor
from mesh.model import Node
from tests.support.polling import until
from tests.support.ports import free_port

HERE = Node("n1", "one", ipaddress.ip_address("127.0.0.1"), engine="proxy")
THERE = Node("n2", "two", ipaddress.ip_address("127.0.0.1"), engine="proxy")


class _Answers(asyncio.DatagramProtocol):
    """Answers questions as the peer port does (mesh/fastpath/proto.pyx)."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data[:14] + b"\1\0" + data[16:32], addr)


@asynccontextmanager
async def peer_port(port: int) -> AsyncIterator[None]:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"\0")
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", port)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(_Answers, local_addr=("127.0.0.1", port))
    yield
    server.close()
    transport.close()


@asynccontextmanager
async def trying(port: int, *nodes: Node) -> AsyncIterator[tuple[PathMonitor, list[Node]]]:
    known = [HERE, *nodes]
    ways = PathMonitor(Config(peer_port=port), "proxy", lambda: ("n1", known), pause=0.001)
    task = asyncio.create_task(ways.run())
    try:
        yield ways, known
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_way_that_fails_is_named_until_it_works() -> None:
    port = free_port()
    async with trying(port, THERE) as (ways, nodes):
        await until(lambda: len(ways.problems) == 2)
        tcp, udp = map(str, ways.problems)
        assert tcp.startswith(f"node two (127.0.0.1), peer port TCP {port}: nobody listens") and "mesh check" in tcp
        assert udp.startswith(f"node two (127.0.0.1), peer port UDP {port}: nobody listens")
        async with peer_port(port):
            await until(lambda: not ways.problems)
        await until(lambda: len(ways.problems) == 2)
        nodes[1] = replace(THERE, up=False)  # told by others
        await until(lambda: not ways.problems)


async def test_nodes_without_agent_or_address_are_not_tried() -> None:
    others = (replace(THERE, engine=""), replace(THERE, id="n3", address=None), replace(THERE, id="n4", up=False))
    async with trying(free_port(), *others, replace(THERE, id="n5", name="five")) as (ways, _):
        await until(lambda: ways.problems)
        assert all("node five" in str(problem) for problem in ways.problems)
