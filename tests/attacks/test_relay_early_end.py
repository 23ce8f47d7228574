# SPDX-License-Identifier: Apache-2.0
"""A manager, or somebody in its place, ends the connection before its hello, or never says it: the link dies for good
(item 11)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from mesh.cluster import relay_client
from mesh.cluster.credentials import CredentialsWatch
from mesh.cluster.relay_client import RelayProvider
from tests.support.polling import until
from tests.support.relay import Authority


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("close", "before its hello"),
        ("text", "before its hello"),
        ("hang", "no answer in time"),
        ("mute", "no answer in time"),
    ],
)
async def test_a_link_survives_a_manager_without_a_hello(
    tmp_path: Path, how: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how in ("hang", "mute"):
        monkeypatch.setattr(relay_client, "OPEN_TIMEOUT", 0.5)
    authority = Authority(tmp_path)
    calls = 0

    async def no_hello(request: web.Request) -> web.WebSocketResponse:
        nonlocal calls
        calls += 1
        socket = web.WebSocketResponse()
        if how == "hang":
            await asyncio.sleep(60)
        await socket.prepare(request)
        if how == "text":
            await socket.send_str("no hello")
        elif how == "mute":
            await asyncio.sleep(60)
        await socket.close()
        return socket

    app = web.Application()
    app.router.add_get("/v1/relay", no_hello)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=authority.server("m1")).start()

    async def managers() -> list[tuple[str, int]]:
        return [("127.0.0.1", int(runner.addresses[0][1]))]

    agent = RelayProvider(CredentialsWatch(authority.node("n1", role="swarm-worker")), managers)
    task = asyncio.create_task(agent.run(lambda inventory: None))
    try:
        await until(lambda: calls >= 3, "it calls again and again")
        await until(lambda: said in agent.status().error, "why")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()
