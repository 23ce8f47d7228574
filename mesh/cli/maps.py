# SPDX-License-Identifier: Apache-2.0
"""`mesh maps`: what the kernel engine's pinned maps hold, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import click
from tabulate import tabulate

from mesh.cli.client import daemon_options
from mesh.cli.output import Json, address_port, echo_json
from mesh.config.load import load
from mesh.errors import DatapathError

INDENT: Final = "  "


@click.command()
@click.option("--bpf-fs", help="The bpf file system with the pins, as for `mesh run` (default: as configured).")
@daemon_options
def maps(bpf_fs: str | None, state_dir: Path, as_json: bool) -> None:
    """Print the maps by which the kernel engine's programs forward, with names: the truth when the daemon is in doubt.

    Reads the pinned maps themselves and changes nothing. It needs root and no daemon; names of services and backends
    come from the journal in the state directory. The order is fixed, so that two outputs can be compared with diff.

    \b
    frontends   a published port: its slot table and, per owner, the slots that give it new flows (CURRENT) and the
                slots in transition whose earlier flows stay with it (PREVIOUS). DIGEST is equal on nodes that have
                equal tables. Owner `pass`: left to whoever served the port before; `none`: no backend
    backends    WAY: here (a task's interface), own (an address of this node), tunnel, peer (another node's peer port),
                nowhere (no route)
    ids         backends of this node as other nodes call them in the tunnel
    networks    networks that a backend has itself: it sees clients with addresses there by SOURCE
    translated  flows whose client has another source than its task sees
    Example:    mesh maps
                mesh maps --json | jq '.frontends[] | select(.tracked_slots > 0)'
    """
    try:
        from mesh.datapath.kernel import dump  # noqa: PLC0415 -- absent where it was built without libbpf
    except ImportError as error:
        raise DatapathError("this build has no kernel engine", remedy="build it with libbpf and clang") from error
    given = {"state_dir": str(state_dir)} | ({"bpf_fs": bpf_fs} if bpf_fs else {})
    found = dump.read(load(given))
    if as_json:
        echo_json(found)
    else:
        click.echo(render(found), nl=False)


def render(found: Json) -> str:
    """The answer of mesh.datapath.kernel.dump.read as text, but for where tables lie, which depends on timing."""
    return "\n".join(line.rstrip() for line in _lines(found)) + "\n"


def _lines(found: Json) -> Iterator[str]:
    config = found["config"]
    ports = ", ".join(f"{port}/udp" for port in found["tunnel_ports"])
    yield "config"
    yield from _table(
        [
            ("network namespace", config["netns"]),
            ("return path", config["return_path"]),
            ("tunnel port", f"{config['tunnel_port']}, open: {ports or 'no'}"),
            ("ICMP errors", f"{config['error_rate']} per CPU and second"),
            ("hairpin", f"{config['hairpin']} {config['hairpin6']}"),
        ]
    )
    yield from ("", "addresses")
    yield from _table(((a["address"], a["kind"]) for a in found["addresses"]), "ADDRESS", "KIND")
    for frontend in found["frontends"]:
        yield ""
        yield from _frontend(frontend)
    if not found["frontends"]:
        yield from ("", "frontends", f"{INDENT}none")
    yield from ("", "backends")
    yield from _table(
        map(_backend, found["backends"]),
        *("ID", "NAME", "NODE", "ADDRESS", "STATE", "EPOCH", "PATH", "INTERFACE", "BRIDGE", "MAC", "SEED"),
    )
    yield from ("", "ids")
    ids = ((i["seed"], f"{i['port']}/{i['protocol']}", f"{i['owner']} {i['name']}") for i in found["ids"])
    yield from _table(ids, "SEED", "PORT", "BACKEND")
    yield from ("", "acl")
    yield from _table(
        ((rule["acl"], rule["source"], rule["action"]) for rule in found["acl"]), "ACL", "SOURCE", "ACTION"
    )
    if found["networks"]:
        yield from ("", "networks")
        networks = ((f"{n['owner']} {n['name']}", n["network"], n["source"]) for n in found["networks"])
        yield from _table(networks, "BACKEND", "NETWORK", "SOURCE")
    if found["translated"]:
        yield from ("", "translated")
        yield from _table(map(_translated, found["translated"]), "CLIENT", "CALLED", "SOURCE", "BACKEND")
    yield from ("", "nodes")
    nodes = (
        (
            *(n["id"], n["address"], n["source"], n["interface"], n["mtu"] or "no tunnel"),
            *(" ".join(n["keys"]) or "none", "sent" * n["proves"], "demanded" * n["demands"]),
        )
        for n in found["nodes"]
    )
    yield from _table(nodes, "ID", "ADDRESS", "SOURCE", "INTERFACE", "MTU", "KEYS", "PROOF SENT", "DEMANDED")


def _frontend(frontend: Json) -> Iterator[str]:
    yield f"frontend {frontend['id']}  {frontend['frontend']}  {frontend['service'] or '(no name)'}"
    yield from _table(
        [
            ("table", f"{frontend['table_size']} slots"),
            ("digest", frontend["digest"] or "the slots make no sense"),
            ("flags", ", ".join(frontend["flags"]) or "none"),
            ("acl", frontend["acl"] or "none"),
            ("transition", f"{frontend['tracked_slots']} slots"),
        ]
    )
    owners = ((o["owner"], o["name"], o["current"], o["previous"]) for o in frontend["owners"])
    yield from _table(owners, "OWNER", "NAME", "CURRENT", "PREVIOUS")


def _backend(row: Json) -> tuple[object, ...]:
    where = f"{address_port(row)}/{row['protocol']}"
    who = (row["id"], row["name"], row["node"], where, row["state"], row["epoch"])
    path = row["path"] + ("" if row["handed"] else ", not for own calls")
    return (*who, path, row["interface"], row["bridge"], row["mac"], row["seed"])


def _translated(row: Json) -> tuple[object, ...]:
    backend = f"{row['owner']} {row['name']}" + (", closed" if row["closed"] else "")
    return f"{row['client']}/{row['protocol']}", row["called"], row["source"], backend


def _table(rows: Iterable[tuple[object, ...]], *headers: str) -> Iterator[str]:
    """Indented rows; with headers, `none` where there is no row."""
    rows = list(rows)
    if not rows:
        yield f"{INDENT}none"
        return
    text = tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True)
    yield from (INDENT + line for line in text.splitlines())
