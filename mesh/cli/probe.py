# SPDX-License-Identifier: Apache-2.0
"""`mesh probe`: whether a backend answers on its own node, and whether this node gets there."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.exit import Exit
from mesh.cli.output import Json, duration, echo_json, id_shown
from mesh.netaddr import join_host_port

WAIT = 15.0  # seconds for the daemon, which asks another one


@click.command(short_help="Whether a backend answers on its own node, and the path there.")
@click.argument("name", metavar="BACKEND")
@daemon_options
def probe(name: str, state_dir: Path, as_json: bool) -> None:
    """Have the node of a backend probe it now, at its own address, as its health is probed; from any node.

    BACKEND is a name, an id, or the beginning of an id. Also says whether the path from this node to that one is
    proven. With mesh.health=off a TCP connection is tried. UDP ports cannot be probed.

    \b
    Exit code: 0 all its TCP ports answer and the path is proven; 1 not; 4 there is no such backend.
    Example:   mesh probe web.3
               mesh probe web.3 --json | jq '.ports[] | select(.ok | not)'
    """
    answer = call(state_dir, "/probe", body={"name": name}, seconds=WAIT)
    if as_json:
        echo_json(answer)
    else:
        _show(answer)
    if not answer["ok"] or not answer["path"]["proven"]:
        sys.exit(Exit.NOT_READY)


def _show(answer: Json) -> None:
    name = answer["name"] or id_shown(answer["backend"])
    address = f", address {answer['address']}" if answer["address"] else ""
    node = answer["node_name"] + (f" ({answer['node_address']})" if answer["node_address"] else "")
    click.echo(f"{name} ({id_shown(answer['backend'])}) on node {node}{address}")
    if answer["error"]:
        remedy = f" ({answer['remedy']})" if answer["remedy"] else ""
        click.echo(f"  {answer['node_name']} cannot say whether it answers: {answer['error']}{remedy}")
    elif not answer["ports"]:
        click.echo("  it has no TCP port that could be probed")
    for row in answer["ports"]:
        said = f"answers, {duration(row['seconds'])}" if row["ok"] else row["said"]
        place = join_host_port(answer["address"], row["port"])
        click.echo(f"  {place} ({row['by']}; published as {', '.join(row['published'])}): {said}")
    click.echo(f"  path from here: {_path(answer['path'], answer['node_name'])}")


def _path(path: Json, node: str) -> str:
    if path["by"] == "here":
        return "this is its node"
    states = ", ".join(f"{name} {state}" for name, state in path["states"].items()) or "none has been tried"
    if path["proven"]:
        return f"{path['by']}, proven ({states})"
    return f"NOT proven ({path['masked'] or f'no path to {node}'}; {states})"
