# SPDX-License-Identifier: Apache-2.0
"""Tries the ways by which flows go to other nodes, all the time: of what a firewall swallows nobody tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from mesh.config.keys import Config
from mesh.datapath.paths.peer_probe import LEAST, NOBODY, ask_stream, path_mtu
from mesh.datapath.paths.tunnel_probe import NO_RIGHT, ask_tunnel
from mesh.model import EngineKind, Node, Problem

EVERY: Final = 30.0  # seconds between two trials of a node
AGAIN: Final = 5.0  # seconds until a node that failed is tried again
FAILURES: Final = 2  # trials in a row until a way is said to fail: an agent may just be starting
AT_ONCE: Final = 4  # nodes that are tried at the same time, and in a second

Nodes = Callable[[], tuple[str, Sequence[Node]]]

log = structlog.get_logger("mesh")


@dataclass(slots=True)
class _Known:
    """What is known of the ways to one node."""

    due: float = 0.0  # monotonic
    bad: dict[str, int] = field(default_factory=dict)  # trials that failed in a row, by way
    problems: dict[str, Problem] = field(default_factory=dict)  # by way


class PathMonitor:
    """The ways from this node to all others that have an agent: the tunnel between kernel engines, the peer port.

    Args:
        engine: how this node forwards.
        nodes: this node's id, and all nodes.
        pause: factor of all waits.
    """

    def __init__(self, config: Config, engine: EngineKind, nodes: Nodes, *, pause: float = 1.0) -> None:
        self._config = config
        self._engine = engine
        self._nodes = nodes
        self._pause = pause
        self._known: dict[str, _Known] = {}

    @property
    def problems(self) -> list[Problem]:
        """What does not work now, sorted."""
        found = [problem for known in list(self._known.values()) for problem in list(known.problems.values())]
        return sorted(found, key=str)

    async def run(self) -> None:
        """Try until cancelled."""
        while True:
            own, nodes = self._nodes()
            here = next((node for node in nodes if node.id == own), None)
            others = {n.id: n for n in nodes if n.id != own and n.up and n.engine and n.address is not None}
            for gone in self._known.keys() - others.keys():
                del self._known[gone]
            for node in others:
                self._known.setdefault(node, _Known())
            now = time.monotonic()
            due = sorted((known.due, node) for node, known in self._known.items() if known.due <= now)
            if here is not None:
                await asyncio.gather(*(self._try(here, others[node]) for _, node in due[:AT_ONCE]))
            await asyncio.sleep(self._pause)

    async def _try(self, here: Node, node: Node) -> None:
        found = await self._obstacles(here, node)
        known = self._known.get(node.id)
        if known is None:
            return
        for way, obstacle in found.items():
            known.bad[way] = known.bad.get(way, 0) + 1 if obstacle else 0
            if obstacle and known.bad[way] >= FAILURES:
                if way not in known.problems:
                    log.warning("a way to a node fails", node=node.name, way=way, found=obstacle)
                known.problems[way] = self._problem(node, way, obstacle)
            elif not obstacle and way in known.problems:
                del known.problems[way]
                log.info("a way to a node works again", node=node.name, way=way)
        for way in known.problems.keys() - found.keys():
            del known.problems[way]
        known.due = time.monotonic() + self._pause * (AGAIN if any(found.values()) else EVERY)

    async def _obstacles(self, here: Node, node: Node) -> dict[str, str]:
        """Why each way does not work, empty where it does."""
        address, config = node.address, self._config
        assert address is not None
        found = {f"peer port TCP {config.peer_port}": await ask_stream(address, config.peer_port)}
        if not (self._engine == node.engine == EngineKind.KERNEL):
            reach = await asyncio.to_thread(path_mtu, address, config.peer_port, LEAST[address.version])
            found[f"peer port UDP {config.peer_port}"] = reach.obstacle
        elif here.address is not None and here.address.version == address.version:
            obstacle = await asyncio.to_thread(ask_tunnel, address, here.address, config.tunnel_port)
            if obstacle != NO_RIGHT:
                found[f"tunnel UDP {config.tunnel_port}"] = obstacle
        return found

    def _problem(self, node: Node, way: str, obstacle: str) -> Problem:
        tunnel = way.startswith("tunnel")
        means = "connections to its backends hang" if tunnel else "its backends may not be reached from here"
        if obstacle == NOBODY:
            remedy = "is mesh running there, with the same ports? `mesh check --cluster` here, `mesh status` there"
        else:
            remedy = f"let {way.split(' ', 1 if tunnel else 2)[-1]} through between all nodes, both ways; "
            remedy += "`mesh check --cluster` tries each way"
        return Problem(f"node {node.name} ({node.address}), {way}", f"{obstacle}: {means}", remedy)
