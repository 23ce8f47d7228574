# SPDX-License-Identifier: Apache-2.0
"""A provider with something to serve where there is no swarm: a few HTTP backends of its own, on loopback."""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from mesh.config.keys import DEFAULT_STATE_DIR, Config
from mesh.errors import ProviderError
from mesh.model import Backend, Inventory, Node, Protocol, PublishedPort, Service
from mesh.providers.base import ProviderStatus, Publish

BACKENDS: Final = 5
FIRST_PORT: Final = 8080
PORTS_TRIED: Final = 100
SERVICE: Final = "demo"
ADDRESSES: Final = tuple(ipaddress.IPv4Address("127.0.9.1") + i for i in range(BACKENDS))

log = structlog.get_logger("mesh.providers.demo")


class DemoProvider:
    """Starts its backends, publishes them once, and prints how to look at them.

    Args:
        config: for the addresses in what is printed.
        port: the published port; 0: 8080, or the next that is free.
    """

    def __init__(self, config: Config, *, port: int = 0) -> None:
        self._config = config
        self._port = port
        self._published = False
        self._error = ""

    def reload(self) -> None:
        """Nothing to read again."""

    def status(self) -> ProviderStatus:
        """Its source is itself, so what it published is never old."""
        age = 0.0 if self._published else None
        return ProviderStatus("demo", connected=self._published, age_seconds=age, error=self._error)

    async def run(self, publish: Publish) -> None:
        async with AsyncExitStack() as stack:
            try:
                target = await self._start(stack)
                published = self._port or _free_port(["0.0.0.0"], FIRST_PORT)  # noqa: S104
            except (OSError, ProviderError) as error:
                self._error = f"demo: the backends cannot start: {error}"
                log.error("demo cannot start", error=str(error))
                await asyncio.Event().wait()
                return
            self._published = True
            publish(_inventory(published, target))
            print(_welcome(published, self._config), flush=True)
            await asyncio.Event().wait()

    async def _start(self, stack: AsyncExitStack) -> int:
        """Start the backends, all on one port. Returns it."""
        target = _free_port([str(address) for address in ADDRESSES], 18080)
        for index, address in enumerate(ADDRESSES):
            runner = web.AppRunner(_backend(f"demo.{index + 1}"), access_log=None, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, str(address), target).start()
        return target


def _backend(name: str) -> web.Application:
    """A backend that says its name; `/slow` takes two seconds for it, to see connections that last."""

    async def hello(request: web.Request) -> web.Response:
        if request.path == "/slow":
            await asyncio.sleep(2)
        host, port = request.transport.get_extra_info("sockname")[:2] if request.transport else ("", 0)
        return web.Response(text=f"Hello from {name} at {host}:{port}\n")

    app = web.Application()
    app.router.add_get("/{path:.*}", hello)
    return app


def _free_port(addresses: Sequence[str], first: int) -> int:
    """The first port from `first` on that nobody holds at any of these IPv4 addresses.

    Raises:
        ProviderError: there is none among the next PORTS_TRIED.
    """
    for port in range(first, first + PORTS_TRIED):
        if all(_free(address, port) for address in addresses):
            return port
    raise ProviderError(f"ports {first} to {first + PORTS_TRIED - 1} are all taken", where="demo", remedy="free one")


def _free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _inventory(published: int, target: int) -> Inventory:
    port = PublishedPort(published, target, Protocol.TCP)
    return Inventory(
        services=(Service(SERVICE, SERVICE, (port,)),),
        backends=tuple(
            Backend(f"demo-{i + 1}", SERVICE, "local", address, name=f"demo.{i + 1}")
            for i, address in enumerate(ADDRESSES)
        ),
        nodes=(Node("local", socket.gethostname()),),
        source="demo",
    )


def _command() -> str:
    """How this program is called from here: `mesh` where that finds it, else as it was started."""
    started = Path(sys.argv[0])
    if started.name != "mesh":
        return f"{sys.executable} -m mesh"
    found = shutil.which("mesh")
    return "mesh" if found and Path(found).resolve() == started.resolve() else str(started)


def _welcome(published: int, config: Config) -> str:
    command = _command()
    state_dir = "" if config.state_dir == str(DEFAULT_STATE_DIR) else f" --state-dir {config.state_dir}"
    lines = [
        f"There is no swarm here, so mesh serves a demo: {BACKENDS} backends of its own behind port {published}. Try",
        "",
        f"  curl http://127.0.0.1:{published}/",
        f"  for i in $(seq 20); do curl -s http://127.0.0.1:{published}/; done | sort | uniq -c",
        f"  {command} status{state_dir}",
        f"  {command} backends{state_dir}",
        f"  {command} explain 127.0.0.1:40000 127.0.0.1:{published}{state_dir}",
        f"  {command} drain backend demo.1{state_dir}",
    ]
    if config.http_listen:
        lines.append(f"  curl http://{config.http_listen}/metrics")
    return "\n".join([*lines, "", "Ctrl-C stops it. With `docker swarm init` it serves your swarm instead.", ""])
