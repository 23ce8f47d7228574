# SPDX-License-Identifier: Apache-2.0
"""A node that was removed from the swarm uses its certificate, valid for months, at the relay (item 8).

Swarm ends its own connections to such a node. The relay has to: it would be told the whole inventory, and could drain
nodes and services for everybody.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from mesh.cluster import wire
from mesh.cluster.credentials import CredentialsWatch
from mesh.cluster.relay_client import RelayProvider
from tests.support.polling import until
from tests.support.relay import Authority, calling, context_of, serving, swarm_of

DRAIN = wire.Report({}, drains={"node:m1": wire.Drain(1, True)}, follower=wire.Follower())
ENDED = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)


async def test_a_removed_node_is_let_in_no_more(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    removed = context_of(authority.node("removed", role="swarm-worker"))
    reports: list[str] = []
    async with serving(
        authority.node("m1"), "m1", "member", on_report=lambda node, report: reports.append(node)
    ) as server:
        with pytest.raises(aiohttp.ClientError):
            async with calling(server.port, removed) as socket:
                await socket.send_bytes(wire.encode(DRAIN))
                await asyncio.sleep(0.2)
        async with calling(server.port, context_of(authority.node("member", role="swarm-worker"))) as socket:
            await socket.send_bytes(wire.encode(DRAIN))
            await until(lambda: bool(reports), "a member's report")
        assert reports == ["member"]


@pytest.mark.parametrize("revoked", [False, True], ids=["removed", "revoked"])
async def test_its_open_connections_end(tmp_path: Path, revoked: bool) -> None:
    authority = Authority(tmp_path)
    names = ("leaves", "stays")
    async with serving(authority.node("m1"), "m1", *names) as server:
        leaves, stays = (context_of(authority.node(name, role="swarm-worker")) for name in names)
        async with calling(server.port, leaves) as gone, calling(server.port, stays) as here:
            await until(lambda: len(server.nodes) == 2, "both are connected")
            if revoked:
                server.block(frozenset({"leaves"}))
            else:
                server.know(swarm_of("m1", "stays"))
            assert (await asyncio.wait_for(gone.receive(), 5)).type in ENDED
            await until(lambda: set(server.nodes) == {"stays"}, "it is forgotten")
            await here.send_bytes(wire.encode(wire.Subscribe()))
            assert isinstance(wire.decode(await here.receive_bytes()), wire.Snapshot)


async def test_nobody_is_told_or_believed_before_the_nodes_are_known(tmp_path: Path) -> None:
    """A manager that starts has read nothing: it cannot tell a member from a node that was removed."""
    authority = Authority(tmp_path)
    async with serving(authority.node("m1")) as server:
        caller = context_of(authority.node("n1", role="swarm-worker"))
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with calling(server.port, caller):
                pass
        assert caught.value.status == 503
        server.know(swarm_of("m1", "n1"))
        async with calling(server.port, caller):
            await until(lambda: set(server.nodes) == {"n1"}, "it is let in")


async def test_a_manager_that_was_removed_is_not_believed(tmp_path: Path) -> None:
    """Its certificate still says manager; the agents of others know better by their Engines."""
    authority = Authority(tmp_path)
    managers = {"m1"}
    async with serving(authority.node("m1"), "m1", "n1") as server:

        async def addresses() -> list[tuple[str, int]]:
            return [("127.0.0.1", server.port)]

        watch = CredentialsWatch(authority.node("n1", role="swarm-worker"))
        agent = RelayProvider(watch, addresses, is_manager=managers.__contains__)
        managers.clear()
        task = asyncio.create_task(agent.run(lambda inventory: None))
        try:
            await until(lambda: "no manager any more" in agent.status().error, "the refusal")
            assert not agent.status().connected
            managers.add("m1")
            await until(lambda: agent.status().connected, "a manager's word")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
