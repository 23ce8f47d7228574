# SPDX-License-Identifier: Apache-2.0
"""`mesh nodes`: the nodes of the cluster, and how this one reaches them."""

from __future__ import annotations

from pathlib import Path

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.output import echo_json, echo_table


@click.command()
@daemon_options
def nodes(state_dir: Path, as_json: bool) -> None:
    """Show every node of the cluster, on any node: whether it is up, its engine, and whether the paths to it work.

    \b
    A path is `up` once it has been shown to work, `down` while it does not, `unproven` before its first trial.
    Tasks behind a node to which no path is up get no new connections from here while others can serve.
    Example:   mesh nodes --json | jq '.nodes[] | select(.paths.tunnel == "down") | .name'
    """
    found = call(state_dir, "/nodes")
    if as_json:
        echo_json(found)
        return
    rows: list[tuple[object, ...]] = []
    for node in found["nodes"]:
        here = node["id"] == found["node"]
        paths = "this node" if here else ", ".join(f"{path} {state}" for path, state in node["paths"].items()) or "-"
        rows.append((node["name"], node["address"], "yes" if node["up"] else "NO", node["engine"] or "no agent", paths))
    echo_table(rows, "NODE", "ADDRESS", "UP", "ENGINE", "PATHS FROM HERE", empty="This daemon serves one node only.")
