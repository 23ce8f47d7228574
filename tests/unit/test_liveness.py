# SPDX-License-Identifier: Apache-2.0
"""Whether a silent node's host lives."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket

from mesh.cluster.liveness import TWICE, answers
from tests.support.ports import free_port

HERE = ipaddress.ip_address("127.0.0.1")


async def test_who_accepts_or_refuses_lives() -> None:
    with socket.create_server((str(HERE), 0)) as server:
        assert await answers(HERE, server.getsockname()[1])
    assert await answers(HERE, free_port())


async def test_who_lets_packets_vanish_does_not() -> None:
    """A full queue of accepted connections drops what starts, as a host without power does."""
    with socket.create_server((str(HERE), 0), backlog=0) as server, contextlib.ExitStack() as stack:
        fill(stack, server)
        assert not await answers(HERE, server.getsockname()[1])


async def test_one_packet_that_is_lost_makes_no_node_unreachable() -> None:
    with socket.create_server((str(HERE), 0), backlog=0) as server, contextlib.ExitStack() as stack:
        fill(stack, server)
        asking = asyncio.create_task(answers(HERE, server.getsockname()[1]))
        await asyncio.sleep(TWICE / 2)  # its first packet is gone, and the kernel repeats it in a second
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                stack.enter_context(server.accept()[0])
        assert await asking


def fill(stack: contextlib.ExitStack, server: socket.socket) -> None:
    """Connect until connections are not taken any more."""
    for _ in range(2):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(server.getsockname())
