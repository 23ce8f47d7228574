# SPDX-License-Identifier: Apache-2.0
"""Reads a scenario file: an inventory, and what changes in it step by step.

about = "one sentence"
config = {panic_threshold = 0.5}             # keys of the daemon's configuration
[nodes]                                      # `here` is the node whose maps are printed
here = {address = "192.0.2.11"}
there = {address = "192.0.2.21", engine = "kernel"}
[services.web]
ports = ["8080:80/tcp"]                      # [ADDRESS ]PUBLISHED:TARGET/PROTOCOL
labels = {affinity = "client-ip"}            # service labels without `mesh.`
[backends."web.1"]
service = "web"
address = "172.31.0.11"                      # on `here`; a backend with `node` has none
[[then]]                                     # one more state, applied after the ones before
what = "web.1 is drained"
drained = ["web.1"]                          # all that are drained from here on; also drained_nodes
down = []                                    # all that probes find down from here on; also nodes_down
remove = ["web.2"]                           # services and backends that are gone
calm = true                                  # before the change: every transition ends, as after a long calm
[then.backends."web.3"]                      # that are new or other; also [then.services.X]
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesh.model import (
    ANY_ADDRESS,
    Backend,
    Health,
    HealthView,
    Inventory,
    Node,
    Protocol,
    PublishedPort,
    Service,
)
from mesh.providers.labels import parse_options
from mesh.reconcile.eligibility import Drained

HERE: Final = "here"
TABLE_SIZE: Final = "1021"  # the smallest, unless a scenario says otherwise: reading a table back is quick
PORT: Final = re.compile(r"(?:(?P<address>\S+) )?(?P<published>\d+):(?P<target>\d+)/(?P<protocol>tcp|udp)")
SETS: Final = ("drained", "drained_nodes", "down", "nodes_down")


@dataclass(frozen=True, slots=True)
class Stage:
    """One state of the world, and whether all transitions end before it is applied."""

    what: str
    calm: bool
    inventory: Inventory
    health: HealthView
    drained: Drained


@dataclass(frozen=True, slots=True)
class Scenario:
    """A file of this directory."""

    name: str
    about: str
    config: Mapping[str, Any]
    stages: tuple[Stage, ...]


def load(path: Path) -> Scenario:
    """The scenario of a file."""
    raw = tomllib.loads(path.read_text())
    return Scenario(path.stem, raw["about"], raw.get("config", {}), tuple(_stages(raw)))


def _stages(raw: dict[str, Any]) -> Iterator[Stage]:
    nodes, services, backends = raw["nodes"], dict(raw["services"]), dict(raw.get("backends", {}))
    sets: dict[str, list[str]] = {name: [] for name in SETS}
    for change in ({"what": "as described", **{k: raw[k] for k in SETS if k in raw}}, *raw.get("then", [])):
        unknown = change.keys() - {"what", "remove", "calm", "services", "backends", *SETS}
        assert not unknown, f"unknown keys in a step: {unknown}"
        services |= change.get("services", {})
        backends |= change.get("backends", {})
        for gone in change.get("remove", []):
            assert (services if gone in services else backends).pop(gone, None), f"{gone} is not there"
        sets |= {name: change[name] for name in SETS if name in change}
        yield Stage(
            change["what"],
            change.get("calm", False),
            Inventory(
                tuple(_service(name, row) for name, row in sorted(services.items())),
                tuple(_backend(name, row) for name, row in sorted(backends.items())),
                tuple(_node(name, row, up=name not in sets["nodes_down"]) for name, row in sorted(nodes.items())),
            ),
            HealthView(dict.fromkeys(sets["down"], Health.DOWN)),
            Drained(frozenset(sets["drained"]), frozenset(sets["drained_nodes"])),
        )


def _node(name: str, row: Mapping[str, Any], *, up: bool) -> Node:
    address = ipaddress.ip_address(row["address"])
    return Node(name, name, address, up, row.get("weight", 1), row.get("engine", "kernel"))


def _service(name: str, row: Mapping[str, Any]) -> Service:
    options, problems = parse_options({"table-size": TABLE_SIZE} | row.get("labels", {}), str)
    assert not problems, problems
    return Service(name, name, tuple(map(_port, row["ports"])), options)


def _port(text: str) -> PublishedPort:
    match = PORT.fullmatch(text)
    assert match, f"{text!r} is not [ADDRESS ]PUBLISHED:TARGET/PROTOCOL"
    address = ipaddress.ip_address(match["address"]) if match["address"] else ANY_ADDRESS
    return PublishedPort(int(match["published"]), int(match["target"]), Protocol[match["protocol"].upper()], address)


def _backend(name: str, row: Mapping[str, Any]) -> Backend:
    node = row.get("node", HERE)
    address = ipaddress.ip_address(row["address"]) if node == HERE else None
    return Backend(name, row["service"], node, address, name=name, weight=row.get("weight", 1), local=node == HERE)
