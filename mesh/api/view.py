# SPDX-License-Identifier: Apache-2.0
"""The contract between the agent and the control API: what can be read and changed from outside."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.datapath.base import Stats
from mesh.model import Flow

Json = Mapping[str, Any]


class Verdict(enum.Enum):
    """How new connections fare on this node."""

    OK = "ok"
    DEGRADED = "degraded"  # all are served, but not by all that should serve, by Docker's own mesh, or without a rule
    FAILING = "failing"  # those of some service are not served


@dataclass(frozen=True, slots=True)
class Traffic:
    """The verdict, and one sentence for each service that is not well, the worst first."""

    verdict: Verdict
    reasons: tuple[str, ...]


class AgentView(Protocol):
    """Read and change a running agent. Called on the event loop, which no method may block.

    But for `state` and `ready`: these take their time, and any thread may call them.
    """

    def state(self) -> Json:
        """Everything `GET /state` answers; the schema is in docs/OPERATIONS.md. Never changed by either side; a
        service, and the list of all, that is as before is the same object as before.

        Keys: version, abi, pid, started (Unix seconds), engine, engine_reason,
        provider {kind, connected, age_seconds,
        error, doorbell, certificate_expires (Unix seconds; null: none is used), left (this node has left the cluster)},
        generation {desired, applied}, apply {count, failed, last_seconds, last_error},
        node {id, name},
        guard {holds, held} (mass removals held back so far; backends held now), probes {ok, failed},
        problems [str], critical [str] (those of the problems that keep clients out, or leave a rule unapplied),
        paths_down (problems with paths to other nodes), paths_refused (those with nodes that refuse the peer port),
        paths [{node, node_name, path, state}], traffic {verdict (ok, degraded, failing), reasons [str]},
        services [{id, name, ports [str], options, replicas (asked for; null: not known, or one for each
        node), frontends (none where mesh.enable is false)
        [{frontend, table_size, tracked_slots, digest, panic, served, targets [{backend, name, node, node_name, address,
        own_address (where its own node reaches it; empty: not told), port, weight, intent, taking (why it gets new
        connections or not), health, health_reason, slots, local, via (address of the node that runs it, empty: this
        one), masked (why this node sends it nothing, empty: it does), path (here, tunnel, peer)}]}]}],
        drained {backends [id], nodes [id], here [id] (those on this node only)}, stopping (bool),
        waiting (what it waits for until it knows what to serve; empty: it knows).
        """

    async def cluster(self) -> Json:
        """All nodes side by side, as a manager knows them: nodes [{id, name, address, up, engine, mesh, generation,
        age (seconds since its agent was heard; null: never), digests {frontend: digest}, traffic (as in `state`; null:
        it did not say)}], differences [str], not_well [str] (what its own agent says of a node, one sentence each).

        Raises:
            mesh.errors.MeshError: this node does not know; the remedy says who does.
        """

    def nodes(self) -> Json:
        """The cluster's nodes as this one knows them, whatever its role: node (own id), nodes [{id, name, address, up,
        engine, agent, paths {path: state}}]; address and engine are empty while nobody has told them. agent: here,
        answers, gone (nobody listens on its peer port), silent (no answer there), none (no agent has ever told of
        itself); empty: not tried yet. Paths are those from this node (tunnel, peer, peer-udp), states unproven, up,
        down. waiting: as in `state`.
        """

    def traffic(self) -> Traffic:
        """How new connections fare on this node, and which services are not well."""

    def ready(self) -> tuple[bool, Sequence[str]]:
        """Whether the node serves what it should, and the reasons where it does not."""

    async def stats(self) -> Stats:
        """The engine's counters now, read off the event loop."""

    async def rates(self, seconds: float) -> Json:
        """How much each backend has to do on this node, by two looks with so many seconds between: backends
        [{frontend, backend, open, new_per_second, failed_per_second}]. Several frontends may have one backend, which is
        then under one of them.

        Raises:
            mesh.errors.MeshError: so many seconds are too few, or too many.
        """

    async def explain(self, flow: Flow) -> Json:
        """Where a flow goes, and why: frontend, service, hash, table_size, slot, current, previous, tracked, backend,
        reasons [str], next [backend...]; or {"error", "remedy"} where the port is not ours.

        program {verdict, hash, slot, owner, backend}: what the loaded program says to the same question, null with an
        engine that runs none; agree: whether it says what the tables say, null without a program.
        """

    async def probe(self, name: str) -> Json:
        """Have a backend's own node probe it now; the name as in `set_drained`. Answers backend, name, node, node_name,
        node_address, address (its own), ports [{port, published [str], ok, said, seconds, by}], ok, error and remedy
        (why its node cannot say), path {by (here, tunnel, peer, empty), proven, masked, states {path: state}}.

        Raises:
            mesh.errors.MeshError: no backend, or more than one, has that name.
        """

    async def connectivity(self, services: Sequence[str]) -> Json:
        """Have every node call every task through every node; services by name or id, none: all. Answers ok, nodes
        [{id, name, state ("asked", or why not), remedy, rows [{through (node id), service, frontend, asked, answered,
        failed [{backend, name, said, calls}], left_out, denied}], masked [{service, backend, name, why}]}].

        Raises:
            mesh.errors.MeshError: this daemon serves one node only, or no service has that name.
        """

    async def set_drained(self, kind: str, name: str, drained: bool, *, local: bool = False) -> Json:
        """Drain or undrain a `backend` or `node` by id, unique id prefix or name. Kept across restarts.

        On all nodes, unless `local` or where the provider serves one node only. Answers kind, id, name, drained,
        scope ("cluster", "node"), nodes [{node, state ("follows", or why not)}] (empty for this node only),
        notes [str] (why it still gets no new connections; services that are left without a backend).

        Raises:
            mesh.errors.MeshError: nothing, or more than one thing, has that name.
        """

    async def drains(self) -> Json:
        """What is drained, and what is left of it: drained [{kind, id, name, scope, connections (on all nodes that
        tell, with scope "node" on this one), untold [names of nodes that do not tell]}], nodes (see `set_drained`).
        """

    def keys(self) -> Json:
        """The swarm's keys, the newest first, without their secrets: keys [{id, state ("in use": nodes prove by it,
        "accepted": as before, "waiting": not in use until all agents have it), age_seconds, missing [ids of nodes whose
        agents do not have it, on a manager]}], manager (bool: whether `rotate_keys` can be asked here).

        Raises:
            mesh.errors.MeshError: this daemon serves one node only.
        """

    def rotate_keys(self) -> Json:
        """Make another key of the swarm now; answers as `keys`. The one in use stays accepted until the next.

        Raises:
            mesh.errors.MeshError: this node is no manager, or the last new key is not in use yet.
        """

    async def stop(self, *, release: bool) -> None:
        """Stop as SIGTERM does; `release` also hands the ports back."""
