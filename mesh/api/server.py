# SPDX-License-Identifier: Apache-2.0
"""The sockets of the control API: HTTP on a TCP address, and the CLI's control socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from mesh.api.app import make_app
from mesh.api.view import AgentView
from mesh.errors import ConfigError, MeshError
from mesh.listener import HTTP, Bounds, Listener, http_protocol, origin_of
from mesh.netaddr import split_host_port

CONTROL: Final = "mesh.sock"
SOCKET_PATH: Final = 107  # bytes of a socket's path at most, unix(7)
SHUTDOWN: Final = 1.0  # seconds that requests under way have
KEEPALIVE: Final = 75.0  # seconds after which a connection without a request is closed; Prometheus asks every minute
BOUNDS: Final = Bounds(per_owner=HTTP // 2, total=HTTP)  # an owner is an address

log = structlog.get_logger("mesh")


def parse_listen(text: str) -> tuple[str, int]:
    """`127.0.0.1:9550`, `[::1]:9550` or `:9550` (every address) as host and port.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        return split_host_port(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is not an address and a port", where="http_listen", remedy="such as 127.0.0.1:9550"
        ) from error


def _caller(transport: asyncio.Transport) -> str:
    return origin_of(transport.get_extra_info("peername")[0])


class Servers:
    """Both servers, over one view.

    Args:
        listen: address and port of HTTP; empty: none.
        hosts: names and addresses by which HTTP may be called besides the node's own.
    """

    def __init__(self, view: AgentView, listen: str, state_dir: Path, hosts: Sequence[str] = ()) -> None:
        self._view = view
        self._listen = listen
        self._hosts = hosts
        self._listener: Listener | None = None
        self._control = state_dir / CONTROL
        self._runners: list[web.AppRunner] = []
        self._owns_socket = False

    async def start(self) -> None:
        """Open both.

        Raises:
            MeshError: an address is taken; the message names it and the remedy.
        """
        if self._listen:
            host, port = parse_listen(self._listen)
            runner = await self._runner(control=False)
            self._listener = Listener(http_protocol(runner, keepalive=KEEPALIVE), _caller, bounds=BOUNDS)
            try:
                self._listener.start(host, port)
            except OSError as error:
                raise MeshError(
                    f"cannot listen: {os.strerror(error.errno).lower() if error.errno else error}",
                    where=f"http_listen = {self._listen}",
                    remedy='`ss -ltnp` names the listener; set --http-listen to another address, or to "" for none',
                ) from error
        runner = await self._runner(control=True)
        new = self._control.with_suffix(".new")
        try:
            await web.UnixSite(runner, str(new)).start()
            new.chmod(0o600)
            new.rename(self._control)  # at once in place of a dead daemon's
        except OSError as error:
            remedy = "set state_dir to a directory with a shorter path" if len(str(new)) > SOCKET_PATH else ""
            raise MeshError(
                f"cannot listen: {error.strerror or error}", where=str(self._control), remedy=remedy
            ) from error
        self._owns_socket = True

    async def _runner(self, *, control: bool) -> web.AppRunner:
        runner = web.AppRunner(
            make_app(self._view, control=control, hosts=self._hosts),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=SHUTDOWN,
        )
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def stop(self, *, keep_socket: bool = False) -> None:
        """Close both. `keep_socket`: the path of the control socket is a successor's now."""
        if self._owns_socket and not keep_socket:
            with contextlib.suppress(OSError):
                self._control.unlink()
        if self._listener is not None:
            self._listener.stop()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
