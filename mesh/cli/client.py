# SPDX-License-Identifier: Apache-2.0
"""Calls the daemon through its control socket; the options that every such command shares."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import click
import msgspec

from mesh.cli.exit import DaemonRefusedError, DaemonUnreachableError
from mesh.cli.output import Json
from mesh.config.keys import DEFAULT_STATE_DIR
from mesh.config.load import load
from mesh.errors import ConfigError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_TIMEOUT: Final = 10.0


def daemon_options(function: _Function) -> _Function:
    """Add --state-dir and --json to a command."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        envvar="MESH_STATE_DIR",
        default=DEFAULT_STATE_DIR,
        show_default=True,
        help="State directory of the daemon; its control socket is mesh.sock in it.",
    )(function)


def call(
    state_dir: Path,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    accept: tuple[int, ...] = (),
    seconds: float = _TIMEOUT,
) -> Json:
    """Send one request to the daemon, POST if there is a body, else GET. Returns the JSON object of the response.

    Args:
        accept: HTTP statuses of 400 and above that count as a response, not as a refusal.
        seconds: for the response.

    Raises:
        DaemonUnreachableError: no daemon answers on the socket.
        DaemonRefusedError: the daemon refused the request; the message says why.
    """
    return asyncio.run(_call(state_dir / "mesh.sock", path, query or {}, body, accept, seconds))


async def _call(
    socket: Path, path: str, query: Mapping[str, str], body: Json | None, accept: tuple[int, ...], seconds: float
) -> Json:
    method = "GET" if body is None else "POST"
    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with (
            aiohttp.ClientSession(
                "http://mesh", connector=aiohttp.UnixConnector(str(socket)), timeout=timeout
            ) as session,
            session.request(method, path, params=query, json=body) as response,
        ):
            answer = msgspec.json.decode(await response.read(), type=Json)
    except TimeoutError as error:
        raise DaemonUnreachableError(
            f"the daemon did not answer within {seconds:g} s", where=str(socket), remedy="look at its log"
        ) from error
    except msgspec.DecodeError as error:
        raise DaemonUnreachableError(
            "something other than the daemon answers", where=str(socket), remedy="set --state-dir to its directory"
        ) from error
    except (OSError, aiohttp.ClientError) as error:
        raise _unreachable(socket) from error
    if response.status >= 400 and response.status not in accept:
        raise DaemonRefusedError(str(answer.get("error", response.reason)), remedy=str(answer.get("remedy", "")))
    return answer


def _unreachable(socket: Path) -> DaemonUnreachableError:
    """Why no daemon answered, and what to do about it."""
    if socket.exists() and not os.access(socket, os.W_OK):
        return DaemonUnreachableError("no permission to talk to the daemon", where=str(socket), remedy="run as root")
    message, remedy = "no daemon answers there", "start it with `mesh run`, or set --state-dir to its directory"
    if forwards := holds(socket.parent):
        message += f", but its eBPF programs still forward by the last tables {forwards}"
        remedy = "`mesh run` brings the tables up to date, `mesh stop --release` removes the programs"
    return DaemonUnreachableError(message, where=str(socket), remedy=remedy)


def holds(state_dir: Path) -> str:
    """Until when the kernel engine's pinned programs forward; empty: there are none, as far as this user can see."""
    try:
        from mesh.datapath.kernel import cleanup  # noqa: PLC0415 -- absent where it was built without libbpf

        stale = cleanup.find(load({"state_dir": str(state_dir)}))
    except (ImportError, ConfigError):
        return ""
    return stale.holds() if stale is not None and stale.programs else ""
