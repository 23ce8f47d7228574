# SPDX-License-Identifier: Apache-2.0
"""The contract between the agent and a source of the inventory (swarm, static file, demo, relay)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.errors import MeshError
from mesh.model import HealthView, Inventory

Publish = Callable[[Inventory], None]


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """How a provider is doing now; the `provider` key of AgentView.state."""

    kind: str  # "swarm" | "static" | "demo" | "relay"
    connected: bool = False  # the last attempt to read was good
    age_seconds: float | None = None  # since the last good read; None: there was none yet
    error: str = ""  # why the last attempt failed, with place and remedy; empty when it was good
    doorbell: str = ""  # what announces changes: "watch" | "events" | "poll"
    problems: tuple[str, ...] = ()  # what else is wrong around it, with place and remedy; what was read stands
    certificate_expires: float | None = None  # Unix seconds: of this node's in the cluster; None: it uses none
    left: bool = False  # this node has left the cluster: what was read is not its own any more
    node_id: str = ""  # this node, by the inventory's id of it; empty while unknown, or where there are no nodes


class Provider(Protocol):
    """A source of the inventory. Implementations: swarm.SwarmProvider, static.StaticProvider."""

    async def run(self, publish: Publish) -> None:
        """Read, publish, and follow changes until cancelled.

        Every published inventory is complete, differs from the one before, and is handed over on the event loop;
        `publish` must not block. Nothing is published before the first complete read, and nothing while the source is
        away or answers what cannot be used: the last good state stands and `status` says how old it is. Never raises
        but CancelledError.
        """

    def reload(self) -> None:
        """Read again now (SIGHUP)."""

    def status(self) -> ProviderStatus:
        """How it is doing, without I/O."""


@dataclass(frozen=True, slots=True)
class Follower:
    """How a node's agent follows what is drained on all nodes.

    Attributes:
        follows: what it has in force is what this node has.
        held: connections that it has to drained things, by "backend:ID" or "node:ID".
    """

    follows: bool
    held: Mapping[str, int]


class EarlierBuildError(MeshError):
    """Another node's agent does not know what it is asked."""


class ClusterView(Protocol):
    """What a provider that serves all nodes of a cluster can do besides. Implementation: mesh.cluster.ClusterProvider.

    The composition root passes it on where there is one; a provider of one node has none.
    """

    def own_health(self, view: HealthView) -> None:
        """Take what this node's probes say, to be merged with what other nodes report. On the event loop."""

    def drain(self, key: str, drained: bool) -> None:
        """Drain, or undrain, "backend:ID" or "node:ID" on all nodes. On the event loop.

        Raises:
            MeshError: this node cannot keep it; nothing is changed.
        """

    def followers(self) -> Mapping[str, Follower]:
        """How the agents follow the drains, by node, this one among them; an agent of an earlier build is not."""

    async def ask(self, node: str, question: str, query: Mapping[str, str], seconds: float) -> Mapping[str, Any]:
        """Ask the agent of another node, by its id, something about that node; see mesh.api.reach.

        Raises:
            EarlierBuildError: its build does not know the question.
            MeshError: it cannot be asked within so many seconds, or refused; the message says why.
        """

    def keys(self) -> Mapping[str, Any]:
        """The swarm's keys, without their secrets: see mesh.api.view.AgentView.keys. On the event loop."""

    def rotate_keys(self) -> Mapping[str, Any]:
        """Make another key of the swarm now, and say what `keys` does. On the event loop.

        Raises:
            MeshError: this node is no manager, or the last new key is not in use yet.
        """

    def cluster(self) -> Mapping[str, Any]:
        """All nodes side by side, and where they differ: see mesh.api.view.AgentView.cluster.

        Raises:
            MeshError: this node is a worker, which is told services, but not of other agents.
        """
