# SPDX-License-Identifier: Apache-2.0
"""Nodes whose agents went silent: is it the agent or the node?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from mesh.model import Address
from mesh.supervisor import recorded

CONFIRM: Final = 0.4  # seconds that a silent node has to answer at all
TWICE: Final = 0.2  # seconds after which it is called again: the kernel repeats a first packet that is lost after one
STALL: Final = 0.2  # seconds over CONFIRM after which it is this process that did not get to run

log = structlog.get_logger("mesh.cluster")


async def _call(address: Address, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(str(address), port)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    writer.close()
    return True


async def answers(address: Address, port: int) -> bool:
    """Whether a host is alive: it accepts a connection or refuses it. One packet that is lost makes no difference."""
    while True:
        begun, calls = time.monotonic(), list[asyncio.Task[bool]]()
        try:
            for wait in (TWICE, CONFIRM - TWICE):
                calls.append(asyncio.create_task(_call(address, port)))
                done, _ = await asyncio.wait(calls, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return any(call.result() for call in done)
        finally:
            for call in calls:
                call.cancel()
        if time.monotonic() - begun <= CONFIRM + STALL:  # else the answer may be here already
            return False


class FailureDetector:
    """Watches those that went silent. `lost` are the ids of nodes that do not answer at all.

    Args:
        port: any TCP port; that it is refused is an answer too.
        address_of: a node's address, None once it has left the swarm.
        on_change: called whenever `lost` has changed.
    """

    def __init__(self, port: int, address_of: Callable[[str], Address | None], on_change: Callable[[], None]) -> None:
        self._port = port
        self._address_of = address_of
        self._on_change = on_change
        self._watched: dict[str, asyncio.Task[None]] = {}
        self.lost: set[str] = set()

    def on_node(self, node: str, here: bool) -> None:
        """A node's agent ended its connection without a word, or is back."""
        if here:
            if task := self._watched.pop(node, None):
                task.cancel()
            self._mark(node, lost=False)
        elif node not in self._watched:
            self._watched[node] = asyncio.create_task(self._watch(node))

    def forget(self) -> None:
        """Watch nobody any more."""
        for task in self._watched.values():
            task.cancel()
        self._watched.clear()
        self.lost.clear()

    async def _watch(self, node: str) -> None:
        while (address := self._address_of(node)) is not None:
            with recorded("failure detector"):
                self._mark(node, lost=not await answers(address, self._port))
            await asyncio.sleep(1.0)
        self.lost.discard(node)
        self._watched.pop(node, None)

    def _mark(self, node: str, *, lost: bool) -> None:
        if lost is (node in self.lost):
            return
        log.warning("a node does not answer" if lost else "a node answers again", node=node)
        (self.lost.add if lost else self.lost.discard)(node)
        self._on_change()
