# SPDX-License-Identifier: Apache-2.0
"""The part of the report about a large swarm (bench.scale)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

ROLES: Final = ("manager", "worker")
TEXT: Final = """\
A manager's agent and a worker's in a simulated swarm: real agents, engines, relay and certificates, each in a network
namespace; the Engines' answers (of real size), Watch and the other nodes' agents are simulated. A task that is replaced
makes three changes: it is told to stop, another starts on another node, its container ends. All other nodes' agents
report to the manager, and every third takes its inventory from it, as with three managers. Staleness: from the change
in the swarm to the applied table. Times are p50 / p99 / most; CPU is of all threads, 1 is one core.
"""
TENFOLD: Final = """\
The rows with ten times the changes, and with six times the nodes, services and tasks, show which limit comes first.
It is the manager's one event loop, at 1,000 nodes if agents and simulation share two cores: each change is written to
every subscriber, and each agent reports every second. A late loop takes no agent for failed, because the
acknowledgements of an agent's kernel count. The manager's memory is next: each agent reports all its tables, so with
more services every agent costs more, too. Reading is no limit: only the tasks that Watch has announced are read, and
all of them (23.5 MB for 10,000) every 30 s; an answer may have 256 MiB, which is 110,000 tasks, and take 10 s. The
engines have room for 65,534 backends (MESH_MAX_BACKENDS): a larger plan is rejected and reported, and the last
applied state stays. Possible changes: workers that relay inventory and reports for other workers, digests that agree
kept once for all nodes, and larger maps, since owners have 31 bits already.
"""
HEADERS: Final = ("", "CPU, cores", "MiB", "kB/s, network", "apply, ms", "staleness, ms", "scrape, ms", "start, s")


def milliseconds(values: Mapping[str, float]) -> str:
    """Three percentiles."""
    return " / ".join(f"{values[key] * 1e3:,.0f}" for key in ("p50", "p99", "max")) if values.get("p50") else ""


def cells(row: Mapping[str, Any], role: str) -> list[str]:
    """One agent as a row of the report's table."""
    size = row["size"]
    what = (
        f"{role}, {row['engine']} engine: {size['nodes']:,} nodes, {size['tasks']:,} tasks, {size['rate']:g} changes/s"
    )
    if "failed" in row:
        return [what, row["failed"].splitlines()[0]]
    agent = row["agents"][role]
    late = agent["staleness"]
    untold = f", {late['untold']} of {late['changes']} never" if late["untold"] else ""
    return [
        what,
        f"{agent['cpu']:.2f}",
        f"{agent['memory'] / 2**20:,.0f}",
        f"{(agent['uplink'] + agent['loopback']) / 1e3:,.0f}",
        milliseconds(agent["apply"]),
        milliseconds(late) + untold,
        milliseconds(agent["scrape"]),
        f"{agent['start']:.1f}",
    ]


def rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The report's table."""
    return [cells(row, role) for row in found for role in ROLES]
