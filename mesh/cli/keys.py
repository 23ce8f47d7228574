# SPDX-License-Identifier: Apache-2.0
"""`mesh keys`: the swarm's keys by which nodes prove themselves, and a new one."""

from __future__ import annotations

from pathlib import Path

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.output import Json, duration, echo_json, echo_table, few, id_shown


@click.group(invoke_without_command=True)
@daemon_options
@click.pass_context
def keys(ctx: click.Context, state_dir: Path, as_json: bool) -> None:
    """The swarm's keys by which nodes prove to each other that they are nodes. Secrets are not shown.

    \b
    in use      nodes prove by it
    accepted    the one before it: what is proven by it is taken
    waiting     made, and in use once all agents have it; MISSING: those that have not (on managers)

    \b
    `mesh keys rotate`, on a manager, makes another one now. Managers do so every key_period seconds, and when a node
    is removed from the swarm.
    Example:    mesh keys
                mesh keys rotate
    """
    ctx.obj = state_dir
    if ctx.invoked_subcommand is None:
        _show(call(state_dir, "/keys"), as_json=as_json)


@keys.command()
@daemon_options
def rotate(state_dir: Path, as_json: bool) -> None:
    """Make another key of the swarm now. On a manager.

    It is in use once all agents that are connected have it, seconds later. The key before it stays accepted until the
    next one: rotate twice to have the present key end, the second time once the new key is in use.
    A node without an agent gets no new keys: after two its flows to and from other nodes end.
    """
    _show(call(state_dir, "/keys/rotate", body={}), as_json=as_json)


def _show(answer: Json, *, as_json: bool) -> None:
    if as_json:
        echo_json(answer)
        return
    rows: list[tuple[object, ...]] = [
        (key["id"], key["state"], duration(key["age_seconds"]), few([id_shown(node) for node in key["missing"]]))
        for key in answer["keys"]
    ]
    echo_table(rows, "KEY", "STATE", "AGE", "MISSING", empty="No key yet: a manager makes the first one.")
