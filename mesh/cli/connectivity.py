# SPDX-License-Identifier: Apache-2.0
"""`mesh connectivity-test`: every node calls every task through every node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.exit import Exit
from mesh.cli.output import Json, echo_json, echo_table

WAIT: Final = 45.0  # seconds for the daemon, which asks all nodes
ASKED: Final = "asked"
SHOWN: Final = 40  # failures that are listed


@click.command("connectivity-test", short_help="Every node calls every task through every node.")
@click.argument("services", nargs=-1, metavar="[SERVICE]...")
@daemon_options
def connectivity_test(services: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """Have every node's agent call the published TCP ports of every node, once for each task; from any node.

    Prints a matrix: a row for each calling node, a column for each called one, calls that were answered of those that
    were made. Then each failure, with the task that the tables give the call to. A node makes 600 calls at most, 32 at
    a time, in 25 seconds; where there are more tasks they are chosen by lot. A call is a TCP connection that is closed
    a second later; the tasks see them. UDP ports are not tried. A call that the task has not taken within a second, or
    that a proxy gave to another task instead, is a failure. A node's calls of itself are drawn anew, so no task is
    named, unless a proxy gave the call to it.

    A task that is masked on the called node, because no path from there to the task's node is proven, gets no call:
    another task answers in its place. Such tasks are named with the path, and count as failures.

    Nodes without an agent, and of builds that do not know the test, are named and do not count as failures.

    \b
    Exit code: 0 all calls were answered; 1 some were not, a task is masked, or an agent cannot be asked; 4 there is no
               such service.
    Example:   mesh connectivity-test
               mesh connectivity-test web --json | jq '.nodes[].rows[].failed[]'
    """
    answer = call(state_dir, "/connectivity", body={"services": list(services)}, seconds=WAIT)
    if as_json:
        echo_json(answer)
    else:
        _show(answer)
    if not answer["ok"]:
        sys.exit(Exit.NOT_READY)


def _show(answer: Json) -> None:
    names = {node["id"]: node["name"] for node in answer["nodes"]}
    asked = [node for node in answer["nodes"] if node["state"] == ASKED]
    through = [node for node in names if any(row["through"] == node for each in asked for row in each["rows"])]
    table: list[tuple[object, ...]] = [(each["name"], *(_cell(each, node) for node in through)) for each in asked]
    if through:
        echo_table(table, "FROM \\ THROUGH", *(names[node] for node in through), empty="")
    else:
        click.echo("No TCP port with a task is published: nothing was called.")
    failures = [line for each in asked for row in each["rows"] for line in _failures(each["name"], names, row)]
    for line in failures[:SHOWN]:
        click.echo(line)
    if len(failures) > SHOWN:
        click.echo(f"and {len(failures) - SHOWN} more like these (--json has all)")
    for line in (line for each in asked for line in _masked(each)):
        click.echo(line)
    for node in answer["nodes"]:
        if node["state"] != ASKED:
            remedy = f" ({node['remedy']})" if node["remedy"] else ""
            click.echo(f"{node['name']}: {node['state']}{remedy}")
    if denied := sorted({row["service"] for each in asked for row in each["rows"] if row["denied"]}):
        click.echo(f"not called, since their source rules keep nodes out: {', '.join(denied)}")
    if left := sum(row["left_out"] for each in asked for row in each["rows"]):
        click.echo(f"{left} tasks were left out by lot, or cannot be chosen by a client (mesh.affinity=client-ip)")


def _cell(node: Json, through: str) -> str:
    rows = [row for row in node["rows"] if row["through"] == through]
    asked, answered = sum(row["asked"] for row in rows), sum(row["answered"] for row in rows)
    return f"{answered}/{asked}" + (" FAILED" if answered < asked else "") if asked else "-"


def _failures(source: str, names: dict[str, str], row: Json) -> list[str]:
    """One line for each task that a call through a node did not reach."""
    where = f"{source} -> {names.get(row['through'], row['through'])} {row['frontend']} ({row['service']})"
    return [
        f"{where}: {each['said']}, {each['calls']} of {row['asked']} calls"
        + (f", given to {each['name'] or each['backend']}" if each["backend"] else "")
        for each in row["failed"]
    ]


def _masked(node: Json) -> list[str]:
    """One line for the tasks of a service that get nothing from a node, for one reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in node["masked"]:
        found.setdefault((each["service"], each["why"]), []).append(each["name"] or each["backend"])
    return [
        f"{node['name']} gives no new connections to {', '.join(tasks)} ({service}): masked there, {why}"
        for (service, why), tasks in found.items()
    ]
