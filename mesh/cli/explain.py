# SPDX-License-Identifier: Apache-2.0
"""`mesh explain`: where a new connection goes, and why."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mesh.api.endpoint import parse_endpoint
from mesh.cli.client import call, daemon_options
from mesh.cli.exit import Exit
from mesh.cli.output import Json, echo_json, node_shown, own_address_port, way_shown
from mesh.errors import MeshError


def _endpoint(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        parse_endpoint(value)
    except MeshError as error:
        raise click.BadParameter(str(error)) from None
    return value


@click.command()
@click.argument("source", metavar="SRC:PORT", callback=_endpoint)
@click.argument("destination", metavar="DST:PORT", callback=_endpoint)
@click.option("--proto", type=click.Choice(["tcp", "udp"]), default="tcp", show_default=True, help="Protocol.")
@daemon_options
def explain(source: str, destination: str, proto: str, state_dir: Path, as_json: bool) -> None:
    """Explain which backend a new connection gets: its slot, its backend, the next choices, and the reasons.

    SRC:PORT is the client's address as this node sees it. DST:PORT is what the client calls: an address of this node
    and a published port. Write IPv6 addresses in brackets. With the kernel engine the loaded program is asked too
    (line `program`); a disagreement is reported.

    \b
    Exit code: 0 a backend gets it; 1 none does, or tables and program disagree; 4 nothing is published there.
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


def describe(backend: Json) -> str:
    """A backend of an explanation in a few words."""
    name = backend.get("name") or backend.get("backend") or backend.get("id")
    where = f" at {own_address_port(backend)}" if backend.get("address") else ""
    where += f" on node {node_shown(backend)}" if backend.get("node") else ""
    return f"{name}{where}" + (f", {way_shown(backend)}" if backend.get("path", "here") != "here" else "")


def _previous(answer: Json) -> str:
    """The slot's previous owner."""
    if answer["previous_backend"]:
        return describe(answer["previous_backend"])
    owner = str(answer["previous"])
    return "whoever served the port before mesh" if owner == "pass" else owner


def _print_explanation(answer: Json) -> None:
    rows = [
        ("service", f"{answer['service']} ({answer['frontend']})"),
        ("backend", describe(answer["backend"]) if answer["backend"] else "none"),
        ("slot", f"{answer['slot']} of {answer['table_size']} (hash {answer['hash']:#010x})"),
    ]
    if answer["program"] is None:
        rows.append(("program", "none: this engine's threads use these tables themselves"))
    else:
        rows.append(("program", _program_says(answer["program"], agree=answer["agree"])))
    if answer.get("previous") not in (None, answer.get("current")):
        rows.append(("previous", f"{_previous(answer)}: keeps the connections it has"))
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
