# SPDX-License-Identifier: Apache-2.0
"""The demo's own backends, and the demo as a stranger meets it: `mesh run` on a machine without Docker."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest

from mesh.config.keys import Config
from mesh.model import Inventory
from mesh.providers.demo import BACKENDS, DemoProvider


async def test_publishes_backends_that_answer(capsys: pytest.CaptureFixture[str]) -> None:
    provider = DemoProvider(Config(state_dir="/tmp/demo"))
    published: asyncio.Future[Inventory] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(provider.run(published.set_result))
    inventory = await asyncio.wait_for(published, 30)
    port = inventory.services[0].ports[0]
    assert len({(b.address, port.target) for b in inventory.backends}) == BACKENDS
    async with aiohttp.ClientSession() as session:
        for backend in inventory.backends:
            async with session.get(f"http://{backend.address}:{port.target}/") as answer:
                assert (await answer.text()).startswith(f"Hello from {backend.name} at {backend.address}:")
    status = provider.status()
    assert status.connected and status.age_seconds is not None and not status.error
    await asyncio.sleep(0)
    shown = capsys.readouterr().out
    for command in (
        f"curl http://127.0.0.1:{port.published}/",
        " status --state-dir /tmp/demo",
        " explain 127.0.0.1:40000",
    ):
        assert command in shown
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with socket.socket() as probe:
        assert probe.connect_ex((str(inventory.backends[0].address), port.target)) != 0


async def test_two_demos_keep_out_of_each_others_way() -> None:
    ports = []
    tasks = []
    for _ in range(2):
        published: asyncio.Future[Inventory] = asyncio.get_running_loop().create_future()
        tasks.append(asyncio.create_task(DemoProvider(Config()).run(published.set_result)))
        ports.append((await asyncio.wait_for(published, 30)).services[0].ports[0])
    assert ports[0].target != ports[1].target
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_next_free_port_is_taken() -> None:
    published: asyncio.Future[Inventory] = asyncio.get_running_loop().create_future()
    with socket.socket() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            first.bind(("0.0.0.0", 8080))
        except OSError:
            pass  # somebody else has it, which serves as well
        else:
            first.listen()
        task = asyncio.create_task(DemoProvider(Config()).run(published.set_result))
        inventory = await asyncio.wait_for(published, 30)
    assert inventory.services[0].ports[0].published > 8080
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
