# SPDX-License-Identifier: Apache-2.0
"""Calls the daemon through its control socket; the options that every such command shares.

By the standard library's client: an asynchronous one takes longer to import than a command takes for all else.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sized
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import click
import msgspec

from mesh.cli.exit import DaemonRefusedError, DaemonUnreachableError, Exit
from mesh.cli.output import Json
from mesh.config.keys import DEFAULT_STATE_DIR
from mesh.config.load import load
from mesh.errors import ConfigError
from mesh.text import printable_all

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
    """Send one request to the daemon, POST if there is a body, else GET. Returns the JSON object of the response, whose
    texts, which may be a stranger's, are printable (mesh.text).

    Args:
        accept: HTTP statuses of 400 and above that count as a response, not as a refusal.
        seconds: for the response.

    Raises:
        DaemonUnreachableError: no daemon answers on the socket.
        DaemonRefusedError: the daemon refused the request; the message says why.
    """
    control = state_dir / "mesh.sock"
    try:
        target = f"{path}?{urlencode(query)}" if query else path
        status, reason, data = _exchange(control, target, body, seconds)
        answer: Json = printable_all(msgspec.json.decode(data, type=Json))
    except TimeoutError as error:
        raise DaemonUnreachableError(
            f"the daemon did not answer within {seconds:g} s", where=str(control), remedy="look at its log"
        ) from error
    except msgspec.DecodeError as error:
        raise DaemonUnreachableError(
            "something other than the daemon answers",
            where=str(control),
            remedy="set --state-dir to its directory",
        ) from error
    except (OSError, HTTPException) as error:
        raise _unreachable(control) from error
    if status >= 400 and status not in accept:
        raise DaemonRefusedError(str(answer.get("error", reason)), remedy=str(answer.get("remedy", "")))
    return answer


def end_if_waiting(answer: Json, found: Sized) -> None:
    """End the command, and say why, where nothing is to be shown because the daemon knows nothing yet."""
    if not found and (waiting := answer.get("waiting")):
        click.echo(f"mesh: {waiting}", err=True)
        sys.exit(Exit.NOT_READY)


def _exchange(path: Path, target: str, body: Json | None, seconds: float) -> tuple[int, str, bytes]:
    """One request through a socket: status, reason and body of the response."""
    connection = HTTPConnection("mesh")
    with closing(connection), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(seconds)
        sock.connect(str(path))
        connection.sock = sock
        if body is None:
            connection.request("GET", target)
        else:
            connection.request("POST", target, msgspec.json.encode(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.reason, response.read()


def _unreachable(path: Path) -> DaemonUnreachableError:
    """Why no daemon answered, and what to do about it."""
    if path.exists() and not os.access(path, os.W_OK):
        return DaemonUnreachableError("no permission to talk to the daemon", where=str(path), remedy="run as root")
    message, remedy = "no daemon answers there", "start it with `mesh run`, or set --state-dir to its directory"
    if forwards := holds(path.parent):
        message += f", but its eBPF programs still forward by the last tables {forwards}"
        remedy = "`mesh run` brings the tables up to date, `mesh stop --release` removes the programs"
    return DaemonUnreachableError(message, where=str(path), remedy=remedy)


def holds(state_dir: Path) -> str:
    """Until when the kernel engine's pinned programs forward; empty: there are none, as far as this user can see."""
    try:
        from mesh.datapath.kernel import cleanup  # noqa: PLC0415 -- absent where it was built without libbpf

        stale = cleanup.find(load({"state_dir": str(state_dir)}))
    except (ImportError, ConfigError):
        return ""
    return stale.holds() if stale is not None and stale.programs else ""
