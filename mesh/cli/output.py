# SPDX-License-Identifier: Apache-2.0
"""How commands print: JSON, tables, durations, addresses, and the targets of a state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
import msgspec
from tabulate import tabulate

from mesh.netaddr import join_host_port

Json = dict[str, Any]


def echo_json(value: object) -> None:
    """Print as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def echo_table(rows: list[tuple[object, ...]], *headers: str, empty: str) -> None:
    """Print rows as a table, or say that there are none."""
    click.echo(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True) if rows else empty)


def duration(seconds: float) -> str:
    """A duration in the one unit that suits it."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def few(items: Sequence[str], most: int = 5) -> str:
    """The first items as one text, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def id_shown(identity: str) -> str:
    """As much of an id as people read; Docker shows as much."""
    return identity[:12]


def node_shown(target: Json) -> str:
    """A target's node by its name, else the beginning of its id."""
    return str(target.get("node_name") or id_shown(target["node"]))


def address_port(target: Json) -> str:
    """ADDRESS:PORT, IPv6 in brackets."""
    return join_host_port(target["address"], target["port"])


def own_address_port(target: Json) -> str:
    """ADDRESS:PORT of a task on its own node; `?` for an address that this has not told."""
    return join_host_port(target.get("own_address", target["address"]) or "?", target["port"])


def way_shown(target: Json) -> str:
    """How this node gets to a target."""
    path = str(target.get("path", "here"))
    way = {"tunnel": "by tunnel", "peer": "by peer port"}.get(path, path)
    return f"{way} to {target['via']}" if target.get("via") else way


def each_target(services: Iterable[Json]) -> Iterator[tuple[Json, Json, Json]]:
    """Every target in the `services` of `GET /state`, with its service and its frontend."""
    for service in services:
        for frontend in service["frontends"]:
            for target in frontend["targets"]:
                yield service, frontend, target
