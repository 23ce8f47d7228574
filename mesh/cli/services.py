# SPDX-License-Identifier: Apache-2.0
"""`mesh services` and `mesh backends`: what is published, and by whom it is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from mesh.cli.client import call, daemon_options, end_if_waiting
from mesh.cli.exit import DaemonRefusedError
from mesh.cli.output import (
    Json,
    each_target,
    echo_json,
    echo_table,
    few,
    id_shown,
    node_shown,
    own_address_port,
    way_shown,
)
from mesh.model import ServiceOptions
from mesh.options import to_plain

LEAST: Final = 0.1  # seconds in which rates are counted
WAIT: Final = 5.0  # seconds for the daemon, besides
LEFT: Final = "mesh.enable=false: left to Docker's own mesh"


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


@click.command()
@click.argument("names", nargs=-1, metavar="[SERVICE]...")
@daemon_options
def services(names: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """List published services, their ports, and how many backends accept new connections.

    \b
    TAKING NEW   backends that get new connections, of all that are known
    TRANSITION   slots whose earlier connections stay with a previous owner (at first: Docker's mesh)
    Example:     mesh services web
    """
    state = call(state_dir, "/state")
    end_if_waiting(state, state["services"])
    chosen = _selected(state, names)
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
    """The options to show in a table: those that differ from the default, but for what has columns of its own."""
    usual = to_plain(ServiceOptions())
    for key, value in options.items():
        if value != usual.get(key) and not isinstance(value, dict) and key != "table_size":
            yield key.replace("_", "-"), few(value, 3) if isinstance(value, list) else value


@click.command()
@click.argument("names", nargs=-1, metavar="[SERVICE]...")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 10),
    default=1.0,
    show_default=True,
    help="For how long new and failed connections are counted; 0: not at all.",
)
@daemon_options
def backends(names: tuple[str, ...], seconds: float, state_dir: Path, as_json: bool) -> None:
    """List every backend with its health, its share of new connections, and what it has to do.

    \b
    ADDRESS      the task's own, as its node reaches it; `mesh probe BACKEND` has that node call it
    PATH         how this node gets there: here, through the tunnel or by the peer port of the task's node
    TAKES NEW    whether it gets new connections; if not, why: drained, draining (it stops), down, node down, …
    WEIGHT       0: it keeps its connections and gets no new ones
    SHARE        share of the slots, which is its share of new connections
    OPEN         connections (proxy engine: and UDP sessions) that this node has to it now
    NEW/S        connections and UDP flows that this node gave to it, per second
    FAILED/S     those that it refused or did not answer (proxy engine: any that failed at it)
    Example:     mesh backends web
                 mesh backends --json | jq '.[] | select(.health == "down") | .name'
    """
    state = call(state_dir, "/state")
    end_if_waiting(state, state["services"])
    chosen = _selected(state, names)
    busy = _rates(state_dir, seconds) if seconds else {}
    flat = [
        {
            "service": service["name"],
            "frontend": frontend["frontend"],
            "table_size": frontend["table_size"],
            **target,
            **busy.get((frontend["frontend"], target["backend"]), {}),
        }
        for service, frontend, target in each_target(chosen)
    ]
    if as_json:
        echo_json(flat)
        return
    rows: list[tuple[object, ...]] = [
        (
            b["service"],
            b["frontend"],
            b["name"] or b["backend"],
            id_shown(b["backend"]),
            node_shown(b),
            own_address_port(b),
            way_shown(b),
            b["health"] + (f" ({b['health_reason']})" if b["health_reason"] and b["health"] == "down" else ""),
            b["taking"],
            b["weight"],
            f"{100 * b['slots'] / (b['table_size'] or 1):.1f} %",
            *(_busy(b) if seconds else ()),
        )
        for b in flat
    ]
    headers = ["SERVICE", "PORT", "BACKEND", "ID", "NODE", "ADDRESS", "PATH", "HEALTH", "TAKES NEW", "WEIGHT", "SHARE"]
    headers += ["OPEN", "NEW/S", "FAILED/S"] if seconds else []
    without = [_without(service, state["provider"]["kind"]) for service in chosen if not any(each_target([service]))]
    if rows:
        echo_table(rows, *headers, empty="")
    for line in without if names or not rows else []:
        click.echo(line)
    if not rows and not without:
        click.echo("No service is published.")


def _rates(state_dir: Path, seconds: float) -> dict[tuple[str, str], Json]:
    """What each backend has to do, by frontend and id."""
    found = call(state_dir, "/rates", query={"seconds": f"{max(seconds, LEAST):g}"}, seconds=seconds + WAIT)["backends"]
    return {(row.pop("frontend"), row.pop("backend")): row for row in found}


def _busy(backend: Json) -> Iterator[str]:
    """The columns; of a backend of several frontends under one of them."""
    yield str(backend.get("open", "-"))
    for name in ("new_per_second", "failed_per_second"):
        yield f"{backend[name]:.1f}" if name in backend else "-"


def _without(service: Json, source: str) -> str:
    """Why a service has no backend, as far as this node knows."""
    if not service["frontends"]:
        return f"{service['name']}: {LEFT}."
    who = "the static file names none" if source == "static" else f"`docker service ps {service['name']}` says why"
    return f"{service['name']}: no backend is reachable, so new connections fail; {who}."
