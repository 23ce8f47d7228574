# SPDX-License-Identifier: Apache-2.0
"""`mesh drain` and `mesh undrain`: stop and resume new connections to a backend or a node."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.output import echo_json

KIND: Final = click.Choice(["backend", "node"])


def _named(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("is empty")
    return value


@click.command(short_help="Stop new connections to a backend or a node.")
@click.argument("kind", type=KIND)
@click.argument("name", callback=_named)
@daemon_options
def drain(kind: str, name: str, state_dir: Path, as_json: bool) -> None:
    """Stop new connections to a backend, or to all backends of a node. Open connections stay.

    NAME is a name, an id, or the beginning of an id. The drain applies to this node, until `mesh undrain`, and
    survives restarts. To drain a node for the whole swarm, use `docker node update --label-add mesh.weight=0 NODE`.

    \b
    Example:   mesh drain backend web.3
               mesh drain node worker-3
    """
    _set_drained("/drain", kind, name, state_dir, as_json)


@click.command(short_help="Resume new connections to a backend or a node.")
@click.argument("kind", type=KIND)
@click.argument("name", callback=_named)
@daemon_options
def undrain(kind: str, name: str, state_dir: Path, as_json: bool) -> None:
    """Resume new connections to a backend or a node that was drained.

    \b
    Example:   mesh undrain backend web.3
    """
    _set_drained("/undrain", kind, name, state_dir, as_json)


def _set_drained(path: str, kind: str, name: str, state_dir: Path, as_json: bool) -> None:
    answer = call(state_dir, path, body={"kind": kind, "name": name})
    if as_json:
        echo_json(answer)
        return
    what = "gets no new connections" if path == "/drain" else "gets new connections again"
    click.echo(f"{kind} {answer.get('name') or answer.get('id') or name} {what}")
