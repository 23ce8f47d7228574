# SPDX-License-Identifier: Apache-2.0
"""When the daemon calls itself ready: not before what it knows is served."""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path

from mesh.api.state import Facts, View
from mesh.config.keys import Config
from mesh.health.monitor import Monitor
from mesh.model import Backend, EngineKind, Inventory, Protocol, PublishedPort, Service
from mesh.providers.demo import DemoProvider
from mesh.reconcile.loop import Reconciler
from tests.support.memory import MemoryDatapath
from tests.support.polling import until


async def stop(release: bool) -> None: ...


async def test_not_ready_between_the_first_inventory_and_its_apply(tmp_path: Path) -> None:
    config = Config()
    reconciler = Reconciler(MemoryDatapath(), config)
    await reconciler.open()
    monitor = Monitor(reconciler.set_health)
    view = View(Facts(EngineKind.UNKNOWN, "", tmp_path, 0.0), reconciler, DemoProvider(config), monitor, stop)
    assert not view.ready()[0]
    reconciler.publish(
        Inventory(
            services=(Service("s", "web", (PublishedPort(80, 8080, Protocol.TCP),)),),
            backends=(Backend("b", "s", "n", ipaddress.ip_address("192.0.2.1")),),
        )
    )
    assert not view.ready()[0]
    running = asyncio.create_task(reconciler.run())
    while not reconciler.in_step:
        assert not view.ready()[0] or reconciler.applied.frontends
        await asyncio.sleep(0)
    assert view.ready() == (True, [])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_ready_with_nothing_to_serve(tmp_path: Path) -> None:
    reconciler = Reconciler(MemoryDatapath(), Config())
    await reconciler.open()
    view = View(Facts(EngineKind.UNKNOWN, "", tmp_path, 0.0), reconciler, DemoProvider(Config()), Monitor(print), stop)
    running = asyncio.create_task(reconciler.run())
    reconciler.publish(Inventory())
    await until(lambda: view.ready()[0], "ready")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_not_ready_while_something_of_ours_is_away(tmp_path: Path) -> None:
    """Somebody has flushed our nftables table, or detached a hook."""
    datapath = MemoryDatapath()
    reconciler = Reconciler(datapath, Config())
    await reconciler.open()
    view = View(Facts(EngineKind.UNKNOWN, "", tmp_path, 0.0), reconciler, DemoProvider(Config()), Monitor(print), stop)
    running = asyncio.create_task(reconciler.run())
    reconciler.publish(Inventory())
    await until(lambda: view.ready()[0], "ready")
    datapath.away = ["nftables table inet mesh_1 was removed by somebody else"]
    assert view.ready() == (False, datapath.away)
    datapath.away = []
    assert view.ready()[0]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
