# SPDX-License-Identifier: Apache-2.0
"""`mesh nodes`: the nodes of the cluster, and how this one reaches them."""

from __future__ import annotations

from pathlib import Path

import click

from mesh.cli.client import call, daemon_options, end_if_waiting
from mesh.cli.output import echo_json, echo_table


@click.command()
@daemon_options
def nodes(state_dir: Path, as_json: bool) -> None:
    """Show every node of the cluster, on any node: whether it is up, its engine, and whether the paths to it work.

    \b
    UP           NO: Docker has lost the node, or nobody hears of it
    AGENT        whether mesh runs there: answers, GONE (nobody listens on its peer port), silent (no answer), none;
                 where it is gone, the kernel engine's programs forward by the last tables, for `orphan_timeout`
    A path is `up` once it has been shown to work, `down` while it does not, `unproven` before its first trial.
    Tasks behind a node to which no path is up get no new connections from here while others can serve.
    Example:   mesh nodes --json | jq '.nodes[] | select(.paths.tunnel == "down") | .name'
    """
    found = call(state_dir, "/nodes")
    if as_json:
        echo_json(found)
        return
    end_if_waiting(found, found["nodes"])
    rows: list[tuple[object, ...]] = []
    for node in found["nodes"]:
        here = node["id"] == found["node"]
        paths = "this node" if here else ", ".join(f"{path} {state}" for path, state in node["paths"].items()) or "-"
        agent = node.get("agent", "")
        up = "yes" if node["up"] else "NO"
        shown = agent.upper() if agent == "gone" else agent or "-"
        rows.append((node["name"], node["address"], up, shown, node["engine"] or "-", paths))
    headers = ("NODE", "ADDRESS", "UP", "AGENT", "ENGINE", "PATHS FROM HERE")
    echo_table(rows, *headers, empty="This daemon serves one node only.")
