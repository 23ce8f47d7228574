# SPDX-License-Identifier: Apache-2.0
"""The nouns: status, services, backends, and explain. They only read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mesh.api.app import parse_endpoint
from mesh.cli.client import call, daemon_options
from mesh.cli.exit import DaemonRefusedError, Exit
from mesh.cli.output import _ID_SHOWN, Json, address_port, duration, echo_json, echo_table, node_shown
from mesh.errors import MeshError
from mesh.model import ServiceOptions
from mesh.options import to_plain

LEFT = "mesh.enable=false: left to Docker's own mesh"


@click.command(short_help="Is it well, and what is wrong.")
@click.option("--cluster", is_flag=True, help="All nodes side by side, and where they differ (on a manager).")
@daemon_options
def status(state_dir: Path, as_json: bool, cluster: bool) -> None:
    """Is it well: engine, source of services, what is served, and what is wrong.

    \b
    Exit code: 0 if the node serves all that it should, 1 if not (the reasons are printed);
               with --cluster 0 if all nodes agree.
    Example:   mesh status --json | jq .ready
    """
    if cluster:
        _status_of_cluster(call(state_dir, "/cluster"), as_json=as_json)
        return
    state = call(state_dir, "/state")
    ready = call(state_dir, "/readyz", accept=(503,))
    if as_json:
        summary = {key: value for key, value in state.items() if key != "services"}
        echo_json({"ready": ready["ready"], "reasons": ready["reasons"], **summary})
    else:
        nodes = call(state_dir, "/nodes")["nodes"]
        _print_status(state, ready, nodes)
    if not ready["ready"]:
        sys.exit(Exit.NOT_READY)


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
        for line in found["differences"] or [f"All nodes agree on {len(tables)} tables."]:
            click.echo(line)
    if found["differences"]:
        sys.exit(Exit.NOT_READY)


def _drained(state: Json, nodes: list[Json]) -> list[str]:
    """What an operator drained, by name where somebody knows one."""
    backends = {target["backend"]: target["name"] for _, _, target in _targets(state["services"])}
    names = {node["id"]: node["name"] for node in nodes}
    found = [f"node {names.get(node) or node}" for node in state["drained"]["nodes"]]
    return found + [f"backend {backends.get(backend) or backend}" for backend in state["drained"]["backends"]]


def _targets(services: list[Json]) -> Iterator[tuple[Json, Json, Json]]:
    """Each target with its service and frontend."""
    for service in services:
        for frontend in service["frontends"]:
            for target in frontend["targets"]:
                yield service, frontend, target


def _few(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _print_status(state: Json, ready: Json, nodes: list[Json]) -> None:
    provider, generation, apply = state["provider"], state["generation"], state["apply"]
    age = provider["age_seconds"]
    read = "nothing read yet" if age is None else f"read {duration(age)} ago"
    source = [provider["kind"], "connected" if provider["connected"] else "AWAY", read]
    if provider.get("doorbell"):
        source.append(f"changes by {provider['doorbell']}")
    ports = [(service["name"], frontend) for service in state["services"] for frontend in service["frontends"]]
    served = sum(1 for _, frontend in ports if frontend["served"])
    backends = {target["backend"] for _, _, target in _targets(state["services"])}
    idle = [f"{name} ({f['frontend']})" for name, f in ports if not any(t["weight"] for t in f["targets"])]
    rows: list[tuple[str, str]] = [
        ("ready", "yes" if ready["ready"] else "NO"),
        ("daemon", f"mesh {state['version']}, pid {state['pid']}, up {duration(time.time() - state['started'])}"),
        ("engine", f"{state['engine']} ({state['engine_reason']})" if state["engine_reason"] else state["engine"]),
        ("source", ", ".join(source)),
        ("serving", f"{len(state['services'])} services, {served} of {len(ports)} ports, {len(backends)} backends"),
        ("generation", f"{generation['applied']} applied of {generation['desired']}"),
        ("applies", f"{apply['count']}, {apply['failed']} failed"),
    ]
    if away := [node["name"] or node["id"] for node in nodes if not node["up"]]:
        rows.append(("nodes", f"{len(nodes) - len(away)} of {len(nodes)} up; down or silent: {_few(away)}"))
    if idle:
        rows.append(("no backend", f"{_few(idle)}: new connections fail; `mesh backends NAME` says why"))
    if drained := _drained(state, nodes):
        rows.append(("drained", ", ".join(drained)))
    if state["stopping"]:
        rows.append(("stopping", "waiting for connections to end"))
    for title, text in rows:
        click.echo(f"{title:<11}{text}")
    errors = [error for error in (provider["error"], apply["last_error"]) if error]
    for title, lines in (("Not ready:", ready["reasons"]), ("Errors:", errors), ("Problems:", state["problems"])):
        if lines:
            click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"  - {line}")


def _selected(state: Json, names: tuple[str, ...]) -> list[Json]:
    """The services named (name, or the beginning of an id), or all."""
    services: list[Json] = state["services"]
    if not names:
        return services
    chosen = [s for s in services if s["name"] in names or s["id"].startswith(tuple(filter(None, names)))]
    for name in names:
        if not name or not any(s["name"] == name or s["id"].startswith(name) for s in chosen):
            raise DaemonRefusedError(f"no service {name!r} is published", remedy="`mesh services` lists them")
    return chosen


@click.command(short_help="What is published.")
@click.argument("names", nargs=-1, metavar="[SERVICE]...")
@daemon_options
def services(names: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """What is published: services, their ports, and how many backends take new connections.

    \b
    TAKING NEW   backends that new connections can be given to, of all that are known
    TRANSITION   slots of the table whose connections from before stay with an earlier owner (first: Docker's mesh)
    Example:     mesh services web
    """
    chosen = _selected(call(state_dir, "/state"), names)
    if as_json:
        echo_json(chosen)
        return
    rows: list[tuple[object, ...]] = []
    for service in chosen:
        if not service["frontends"]:
            rows.append((service["name"], ", ".join(service["ports"]), "", "", LEFT))
        for frontend in service["frontends"]:
            targets = frontend["targets"]
            eligible = sum(1 for target in targets if target["weight"] > 0)
            notes = [] if frontend["served"] else ["NOT SERVED, see mesh status"]
            notes += [] if eligible else ["NO BACKEND, see mesh backends"]
            notes += ["every backend is down: all are used"] if frontend["panic"] else []
            notes += [f"{key}={value}" for key, value in _unusual(service["options"])]
            transition = f"{frontend['tracked_slots']}/{frontend['table_size']}"
            taking = f"{eligible}/{len(targets)}"
            rows.append((service["name"], frontend["frontend"], taking, transition, "; ".join(notes)))
    echo_table(rows, "SERVICE", "PORT", "TAKING NEW", "TRANSITION", "NOTES", empty="No service is published.")


def _unusual(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options worth a word in a table: those that have not their default, but for what has columns of its own."""
    usual = to_plain(ServiceOptions())
    for key, value in options.items():
        if value != usual.get(key) and not isinstance(value, dict) and key != "table_size":
            yield key.replace("_", "-"), _few(value, 3) if isinstance(value, list) else value


@click.command(short_help="Who serves: health, share of new connections.")
@click.argument("names", nargs=-1, metavar="[SERVICE]...")
@daemon_options
def backends(names: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """Who serves: every backend with its health, and its share of new connections.

    \b
    TAKES NEW    whether it gets new connections; if not, why: drained, draining (it stops), down, node down, …
    WEIGHT 0     keeps the connections it has
    SHARE        of the slots, hence of new connections
    Example:     mesh backends web
                 mesh backends --json | jq '.[] | select(.health == "down") | .name'
    """
    state = call(state_dir, "/state")
    chosen = _selected(state, names)
    flat = [
        {"service": service["name"], "frontend": frontend["frontend"], "table_size": frontend["table_size"], **target}
        for service, frontend, target in _targets(chosen)
    ]
    if as_json:
        echo_json(flat)
        return
    rows: list[tuple[object, ...]] = [
        (
            b["service"],
            b["frontend"],
            b["name"] or b["backend"],
            b["backend"][:_ID_SHOWN],
            node_shown(b),
            address_port(b) + (f" by {b['way']}" if b["way"] != "here" else ""),
            b["health"] + (f" ({b['health_reason']})" if b["health_reason"] and b["health"] == "down" else ""),
            b["taking"],
            b["weight"],
            f"{100 * b['slots'] / (b['table_size'] or 1):.1f} %",
        )
        for b in flat
    ]
    headers = ("SERVICE", "PORT", "BACKEND", "ID", "NODE", "ADDRESS", "HEALTH", "TAKES NEW", "WEIGHT", "SHARE")
    without = [_without(service, state["provider"]["kind"]) for service in chosen if not any(_targets([service]))]
    if rows:
        echo_table(rows, *headers, empty="")
    for line in without if names or not rows else []:
        click.echo(line)
    if not rows and not without:
        click.echo("No service is published.")


def _without(service: Json, source: str) -> str:
    """Why a service has no backend, as far as is known here."""
    if not service["frontends"]:
        return f"{service['name']}: {LEFT}."
    who = "the static file names none" if source == "static" else f"`docker service ps {service['name']}` says why"
    return f"{service['name']}: no backend that could be reached is known, so new connections fail; {who}."


def _endpoint(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        parse_endpoint(value)
    except MeshError as error:
        raise click.BadParameter(str(error)) from None
    return value


@click.command(short_help="Where a connection goes, and why.")
@click.argument("source", metavar="SRC:PORT", callback=_endpoint)
@click.argument("destination", metavar="DST:PORT", callback=_endpoint)
@click.option("--proto", type=click.Choice(["tcp", "udp"]), default="tcp", show_default=True, help="Protocol.")
@daemon_options
def explain(source: str, destination: str, proto: str, state_dir: Path, as_json: bool) -> None:
    """Where a new connection goes, and why: its slot, its backend, and the next choices.

    SRC:PORT is the client's address as this node sees it, DST:PORT what the client calls: an address of this node
    and a published port. IPv6 in brackets.
    With the kernel engine the loaded program is asked as well (line `program`), and it is said if it disagrees.

    \b
    Exit code: 0 a backend takes it; 1 none does, or tables and program disagree; 4 nothing is published there.
    Example:   mesh explain 192.0.2.7:40000 192.0.2.1:8080
               mesh explain '[2001:db8::7]:40000' '[2001:db8::1]:53' --proto udp
    """
    query = {"source": source, "destination": destination, "protocol": proto}
    answer = call(state_dir, "/explain", query=query)
    if as_json:
        echo_json(answer)
    else:
        _print_explanation(answer)
    if not answer.get("backend") or answer.get("agree") is False:
        sys.exit(Exit.NOT_READY)


def describe(backend: object) -> str:
    """A backend of an explanation in a few words."""
    if not isinstance(backend, dict):
        return "whoever served the port before mesh" if backend == "pass" else str(backend or "none")
    name = backend.get("name") or backend.get("backend") or backend.get("id")
    where = f" at {address_port(backend)}" if backend.get("address") else ""
    where += f" by {backend['way']}" if backend.get("way", "here") != "here" else ""
    return f"{name}{where}" + (f" on node {node_shown(backend)}" if backend.get("node") else "")


def _print_explanation(answer: Json) -> None:
    rows = [
        ("service", f"{answer['service']} ({answer['frontend']})"),
        ("backend", describe(answer["backend"])),
        ("slot", f"{answer['slot']} of {answer['table_size']} (hash {answer['hash']:#010x})"),
    ]
    if answer["program"] is None:
        rows.append(("program", "none: this engine's threads use these tables themselves"))
    else:
        rows.append(("program", _program_says(answer["program"], agree=answer["agree"])))
    if answer.get("previous") not in (None, answer.get("current")):
        rows.append(
            ("previous", f"{describe(answer['previous_backend'] or answer['previous'])}: keeps the connections it has")
        )
    rows += [("next" if i == 0 else "", f"{i + 1}. {describe(choice)}") for i, choice in enumerate(answer["next"])]
    for title, text in rows:
        click.echo(f"{title:<10}{text}")
    for reason in answer["reasons"]:
        click.echo(f"  - {reason}")
    if answer["agree"] is False:
        click.echo(
            "\nTHE LOADED PROGRAM AND THE TABLES DISAGREE: packets go where the program says. "
            "Restart the daemon, which reads the maps back and repairs them, and report this."
        )


def _program_says(program: Json, *, agree: bool) -> str:
    """What the loaded program says, in a few words."""
    owner = describe(program["backend"]) if program["backend"] else program["owner"]
    place = f"slot {program['slot']}, hash {program['hash']:#010x}"
    return f"{'agrees' if agree else 'DISAGREES'}: {program['verdict']}, {owner} ({place})"
