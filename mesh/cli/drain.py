# SPDX-License-Identifier: Apache-2.0
"""`mesh drain` and `mesh undrain`: stop and resume new connections to a backend or a node."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.exit import Exit
from mesh.cli.output import Json, duration, echo_json, few

KIND: Final = click.Choice(["backend", "node"])
FOLLOWS: Final = "follows"
NOT_TOLD: Final = ("no agent", "down or silent")  # nodes that cannot follow: nothing is wrong with the drain
POLL: Final = 1.0  # seconds between looks; agents count once a second


def _named(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("is empty")
    return value


LOCAL: Final = click.option("--local", is_flag=True, help="On this node only, instead of on all nodes of the swarm.")


@click.command()
@click.argument("kind", type=KIND)
@click.argument("name", callback=_named)
@LOCAL
@click.option("--wait", is_flag=True, help="Wait until no connection to it is left.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds for --wait."
)
@daemon_options
def drain(kind: str, name: str, local: bool, wait: bool, timeout: float, state_dir: Path, as_json: bool) -> None:
    """Stop new connections to a backend, or to all backends of a node. Open connections stay.

    NAME is a name, an id, or the beginning of an id. The drain applies to all nodes of the swarm, whichever node is
    asked, until `mesh undrain`; it survives restarts. The answer names the nodes that follow, and those that do not.
    --wait counts TCP connections, and UDP sessions where the proxy engine forwards.

    \b
    Exit code: 0 if all nodes with an agent follow, and with --wait no connection is left; 1 if not.
    Example:   mesh drain backend web.3
               mesh drain node worker-3 --wait --timeout 600
               mesh drain node worker-3 --local
    """
    answer = call(state_dir, "/drain", body={"kind": kind, "name": name, "local": local})
    if not as_json:
        _show(answer, name)
    left: Json = {}
    if wait:
        left = _wait(state_dir, str(answer["kind"]), str(answer["id"]), timeout, quiet=as_json)
    if as_json:
        echo_json({**answer, "left": left} if wait else answer)
    if not _all_follow(answer) or (wait and (left["connections"] or left["untold"])):
        sys.exit(Exit.NOT_READY)


@click.command()
@click.argument("kind", type=KIND)
@click.argument("name", callback=_named)
@LOCAL
@daemon_options
def undrain(kind: str, name: str, local: bool, state_dir: Path, as_json: bool) -> None:
    """Resume new connections to a backend or a node that was drained: on all nodes, or with --local on this one.

    The answer says if it still gets none, and why: a weight of 0, a failed probe, a drain that is left.

    \b
    Exit code: 0 if all nodes with an agent follow, 1 if not.
    Example:   mesh undrain backend web.3
    """
    answer = call(state_dir, "/undrain", body={"kind": kind, "name": name, "local": local})
    if as_json:
        echo_json(answer)
    else:
        _show(answer, name)
    if not _all_follow(answer):
        sys.exit(Exit.NOT_READY)


def _all_follow(answer: Json) -> bool:
    return all(row["state"] in (FOLLOWS, *NOT_TOLD) for row in answer.get("nodes", ()))


def _show(answer: Json, name: str) -> None:
    """What was done, and where."""
    what = f"{answer['kind']} {answer.get('name') or answer.get('id') or name}"
    notes: list[str] = answer.get("notes", [])
    if answer["drained"]:
        said = "gets no new connections"
    else:
        said = "is not drained any more" if notes else "gets new connections again"
    on = " on this node" if answer.get("scope") == "node" else ""
    click.echo(f"{what} {said}{on}")
    rows: dict[str, list[str]] = defaultdict(list)
    for row in answer.get("nodes", ()):
        rows[row["state"]].append(row["node"])
    for state, nodes in sorted(rows.items(), key=lambda item: item[0] != FOLLOWS):
        click.echo(f"  {few(sorted(nodes), 20)}: {state}")
    for note in notes:
        click.echo(f"  {note}")


def _wait(state_dir: Path, kind: str, identity: str, timeout: float, *, quiet: bool) -> Json:
    """Until no connection is left, twice in a row, or the time is over; what is left then."""
    began, said, calm = time.monotonic(), None, 0
    while True:
        left = _left(call(state_dir, "/drains"), kind, identity)
        if left != said and not quiet:
            untold = f"; {few(left['untold'])} did not tell" if left["untold"] else ""
            click.echo(f"{left['connections']} connections left{untold}")
        said = left
        calm = 0 if left["connections"] or left["untold"] else calm + 1
        if calm == 2 or time.monotonic() - began + POLL > timeout:
            if calm < 2 and not quiet:
                click.echo(f"connections may be left after {duration(timeout)}", err=True)
            return left if calm == 2 or left["connections"] or left["untold"] else {**left, "untold": ["this node"]}
        time.sleep(POLL)


def _left(answer: Json, kind: str, identity: str) -> dict[str, Any]:
    """Connections to a drained thing, and nodes that do not tell theirs."""
    for each in answer["drained"]:
        if (each["kind"], each["id"]) == (kind, identity):
            return {"connections": each["connections"], "untold": each["untold"]}
    return {"connections": 0, "untold": ["this node: it is not drained any more"]}
