# SPDX-License-Identifier: Apache-2.0
"""The sockets of the control API: HTTP on a TCP address, and the CLI's control socket."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from mesh.api.app import make_app
from mesh.api.view import AgentView
from mesh.errors import ConfigError, MeshError
from mesh.netaddr import split_host_port

CONTROL: Final = "mesh.sock"
SOCKET_PATH: Final = 107  # bytes of a socket's path at most, unix(7)
SHUTDOWN: Final = 1.0  # seconds that requests under way have

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


class Servers:
    """Both servers, over one view."""

    def __init__(self, view: AgentView, listen: str, state_dir: Path) -> None:
        self._view = view
        self._listen = listen
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
            try:
                await web.TCPSite(runner, host or None, port).start()
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
            make_app(self._view, control=control), access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN
        )
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def stop(self, *, keep_socket: bool = False) -> None:
        """Close both. `keep_socket`: the path of the control socket is a successor's now."""
        if self._owns_socket and not keep_socket:
            with contextlib.suppress(OSError):
                self._control.unlink()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
