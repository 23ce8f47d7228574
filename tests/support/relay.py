# SPDX-License-Identifier: Apache-2.0
"""A relay server in this process with certificates as a swarm gives them, and callers of any kind."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path

import aiohttp

from bench import scale_certificates
from mesh import __version__
from mesh.cluster import wire
from mesh.cluster.credentials import CredentialsWatch, Files, load
from mesh.cluster.relay_server import RelayServer
from mesh.config.keys import Config
from mesh.model import Inventory, Node
from tests.support.polling import until


class Authority(scale_certificates.Authority):
    """A swarm's CA, and nodes' files as Swarm lays them out, each in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def node(self, name: str, *life: datetime, role: str = "swarm-manager") -> Files:
        self.write(self.directory / name / "swarm" / "certificates", name, role, *life)
        return Files.of(Config(docker_data_root=str(self.directory / name)))


def swarm_of(*nodes: str) -> Inventory:
    """The inventory of a swarm with these nodes and no service."""
    return Inventory(nodes=tuple(Node(node, node, None) for node in sorted(nodes)), source="swarm")


@contextlib.asynccontextmanager
async def serving(
    files: Files, *nodes: str, on_report: Callable[[str, wire.Report], None] = lambda node, report: None
) -> AsyncIterator[RelayServer]:
    """A manager's relay server that listens, and knows a swarm of `nodes`; of none: it does not know the swarm."""
    server = RelayServer(CredentialsWatch(files), 0, on_report=on_report)
    if nodes:
        server.know(swarm_of(*nodes))
    task = asyncio.create_task(server.run())
    try:
        await until(lambda: server.port != 0, "the relay listens")
        yield server
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def calling(port: int, context: ssl.SSLContext) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A connection to a manager's relay that has said hello and heard it."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"https://127.0.0.1:{port}/v1/relay",
            ssl=context,
            server_hostname="swarm-manager",
            max_msg_size=wire.MAX_MESSAGE,
        ) as socket,
    ):
        await socket.send_bytes(wire.encode(wire.Hello(wire.VERSION, wire.OLDEST, __version__)))
        assert isinstance(wire.decode(await socket.receive_bytes()), wire.Hello)
        yield socket


def context_of(files: Files) -> ssl.SSLContext:
    """A caller's, with a node's certificate."""
    return load(files).client
