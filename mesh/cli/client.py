# SPDX-License-Identifier: Apache-2.0
"""The daemon's control socket as a function call, and the options that every command with a daemon shares."""

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
    """--state-dir and --json."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        envvar="MESH_STATE_DIR",
        default=DEFAULT_STATE_DIR,
        show_default=True,
        help="State directory of the daemon to talk to; its socket mesh.sock is there.",
    )(function)


def call(
    state_dir: Path,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    accept: tuple[int, ...] = (),
) -> Json:
    """One request to the daemon: GET, or POST where there is a body. Returns the JSON object that it answers.

    Args:
        accept: statuses from 400 on that are answers all the same, not refusals.

    Raises:
        DaemonUnreachableError: nobody answers on the socket.
        DaemonRefusedError: the daemon says that it cannot do this, and why.
    """
    return asyncio.run(_call(state_dir / "mesh.sock", path, query or {}, body, accept))


async def _call(socket: Path, path: str, query: Mapping[str, str], body: Json | None, accept: tuple[int, ...]) -> Json:
    method = "GET" if body is None else "POST"
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
    try:
        async with (
            aiohttp.ClientSession(
                "http://mesh", connector=aiohttp.UnixConnector(str(socket)), timeout=timeout
            ) as session,
            session.request(method, path, params=query, json=body) as response,
        ):
            answer = msgspec.json.decode(await response.read(), type=Json)
    except (OSError, aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
        raise _unreachable(socket, error) from error
    if response.status >= 400 and response.status not in accept:
        raise DaemonRefusedError(str(answer.get("error", response.reason)), remedy=str(answer.get("remedy", "")))
    return answer


def _unreachable(socket: Path, error: Exception) -> DaemonUnreachableError:
    """Why nobody answered, and what to do about it."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(error, TimeoutError):
        message, remedy = f"the daemon did not answer within {_TIMEOUT:g} s", "look at its log"
    elif isinstance(error, msgspec.DecodeError):
        message, remedy = "what answers there is not the daemon", "name its directory by --state-dir"
    elif isinstance(cause, PermissionError) or (socket.exists() and not os.access(socket, os.W_OK)):
        message, remedy = "no permission to talk to the daemon", "run this as root"
    else:
        message, remedy = "no daemon answers there", "start it with `mesh run`, or name its directory by --state-dir"
        if _forwards(socket.parent):
            message += ", but what it has in the kernel forwards on, by the tables of before"
            remedy = "`mesh run` keeps them in step again, `mesh stop --release` takes it off"
    return DaemonUnreachableError(message, where=str(socket), remedy=remedy)


def _forwards(state_dir: Path) -> bool:
    """Whether a kernel engine's programs are there, as far as this user may see."""
    try:
        from mesh.datapath.kernel import cleanup  # noqa: PLC0415 -- absent where it was built without libbpf

        remains = cleanup.find(load({"state_dir": str(state_dir)}))
    except (ImportError, ConfigError):
        return False
    return remains is not None and remains.programs
