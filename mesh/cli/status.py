# SPDX-License-Identifier: Apache-2.0
"""`mesh status`: whether this node, or the whole cluster, serves what it should."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from mesh.cli.client import call, daemon_options
from mesh.cli.exit import DaemonUnreachableError, Exit
from mesh.cli.output import Json, duration, each_target, echo_json, echo_table, few


@click.command()
@click.option("--cluster", is_flag=True, help="Compare all nodes of the swarm (on a manager).")
@click.option(
    "--wait",
    type=float,
    metavar="SECONDS",
    help="Wait at most so long until a daemon answers, is ready, and traffic is ok.",
)
@daemon_options
def status(state_dir: Path, as_json: bool, cluster: bool, wait: float | None) -> None:
    """Show whether the node is ready, how traffic fares, what is served, and every problem.

    \b
    ready      the daemon serves everything that it should
    traffic    ok: new connections go to all tasks; degraded: they are served, but not by all tasks, by Docker's own
               mesh, or without a rule that was asked for; failing: those of some service are not served
    Exit code: 0 if ready and traffic is ok, 5 if it is degraded, 1 if failing or not ready (reasons are printed);
               with --cluster 0 if all nodes agree and say so of themselves, 5 or 1 if not.
    Example:   mesh status --wait 30 && echo all is well
    """
    if cluster:
        _status_of_cluster(call(state_dir, "/cluster"), as_json=as_json)
        return
    state, ready = _state_and_readiness(state_dir, time.monotonic() + (wait or 0.0))
    verdict = ready["traffic"]["verdict"]
    if as_json:
        summary = {key: value for key, value in state.items() if key != "services"}
        echo_json({"ready": ready["ready"], "reasons": ready["reasons"], **summary})
    else:
        nodes = call(state_dir, "/nodes")["nodes"]
        _print_status(state, ready, nodes)
    if not ready["ready"] or verdict == "failing":
        sys.exit(Exit.NOT_READY)
    if verdict != "ok":
        sys.exit(Exit.DEGRADED)


def _state_and_readiness(state_dir: Path, deadline: float) -> tuple[Json, Json]:
    """As they are once all is well, or at the deadline (monotonic); until then a daemon may also be about to start."""
    while True:
        late = time.monotonic() >= deadline
        try:
            state = call(state_dir, "/state")
            ready = call(state_dir, "/readyz", accept=(503,))
        except DaemonUnreachableError:
            if late:
                raise
        else:
            if late or (ready["ready"] and ready["traffic"]["verdict"] == "ok"):
                return state, ready
        time.sleep(0.2)


def _status_of_cluster(found: Json, *, as_json: bool) -> None:
    if as_json:
        echo_json(found)
    else:
        rows: list[tuple[object, ...]] = []
        for node in found["nodes"]:
            heard = "never" if node["age"] is None else f"{duration(node['age'])} ago"
            up = "yes" if node["up"] else "NO"
            rows.append((node["name"], node["address"], up, node["engine"], node["mesh"], node["generation"], heard))
        echo_table(rows, "NODE", "ADDRESS", "UP", "ENGINE", "MESH", "GENERATION", "HEARD", empty="no nodes")
        tables = {frontend for node in found["nodes"] for frontend in node["digests"]}
        click.echo()
        agree = f"All nodes agree on {len(tables)} table{'s' * (len(tables) != 1)}."
        for line in [*(found["differences"] or [agree]), *found["not_well"]]:
            click.echo(line)
    failing = any(node["traffic"] and node["traffic"]["verdict"] == "failing" for node in found["nodes"])
    if found["differences"] or failing:
        sys.exit(Exit.NOT_READY)
    if found["not_well"]:
        sys.exit(Exit.DEGRADED)


def _drained(state: Json, nodes: list[Json]) -> list[str]:
    """What an operator drained, by name where the name is known."""
    backends = {target["backend"]: target["name"] for _, _, target in each_target(state["services"])}
    names = {node["id"]: node["name"] for node in nodes}
    here = state["drained"].get("here", ())
    things = [("node", names, each) for each in state["drained"]["nodes"]]
    things += [("backend", backends, each) for each in state["drained"]["backends"]]
    return [
        f"{kind} {known.get(each) or each}" + (" (on this node only)" if each in here else "")
        for kind, known, each in things
    ]


def _traffic(state: Json) -> str:
    if state.get("waiting"):
        return "not known yet"
    verdict: str = state["traffic"]["verdict"]
    return verdict if verdict == "ok" else verdict.upper()


def _print_status(state: Json, ready: Json, nodes: list[Json]) -> None:
    provider, generation, apply = state["provider"], state["generation"], state["apply"]
    age = provider["age_seconds"]
    read = "nothing read yet" if age is None else f"read {duration(age)} ago"
    source = [provider["kind"], "connected" if provider["connected"] else "AWAY", read]
    if provider.get("doorbell"):
        source.append(f"changes by {provider['doorbell']}")
    ports = [(service["name"], frontend) for service in state["services"] for frontend in service["frontends"]]
    served = sum(1 for _, frontend in ports if frontend["served"])
    backends = {target["backend"] for _, _, target in each_target(state["services"])}
    idle = [f"{name} ({f['frontend']})" for name, f in ports if not any(t["weight"] for t in f["targets"])]
    rows: list[tuple[str, str]] = [
        ("ready", "yes" if ready["ready"] else "NO"),
        ("traffic", _traffic(state)),
        ("daemon", f"mesh {state['version']}, pid {state['pid']}, up {duration(time.time() - state['started'])}"),
        ("engine", f"{state['engine']} ({state['engine_reason']})" if state["engine_reason"] else state["engine"]),
        ("source", ", ".join(source)),
        ("serving", f"{len(state['services'])} services, {served} of {len(ports)} ports, {len(backends)} backends"),
        ("generation", f"{generation['applied']} applied of {generation['desired']}"),
        ("applies", f"{apply['count']}, {apply['failed']} failed"),
    ]
    if away := [node["name"] or node["id"] for node in nodes if not node["up"]]:
        rows.append(("nodes", f"{len(nodes) - len(away)} of {len(nodes)} up; down or silent: {few(away)}"))
    if idle:
        rows.append(("no backend", f"{few(idle)}: new connections fail; `mesh backends NAME` says why"))
    if drained := _drained(state, nodes):
        rows.append(("drained", ", ".join(drained)))
    if state["stopping"]:
        rows.append(("stopping", "waiting for connections to end"))
    for title, text in rows:
        click.echo(f"{title:<11}{text}")
    errors = [error for error in (provider["error"], apply["last_error"]) if error]
    critical = state.get("critical", [])
    parts = {
        "Not ready:": ready["reasons"],
        "Traffic:": state["traffic"]["reasons"],
        "Errors:": errors,
        "Critical:": critical,
        "Problems:": [problem for problem in state["problems"] if problem not in critical],
    }
    for title, lines in parts.items():
        if lines:
            click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"  - {line}")
