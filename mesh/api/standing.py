# SPDX-License-Identifier: Apache-2.0
"""How connections stand that a node's proxy has accepted, told to the agent that made them.

A proxy accepts a connection before a task has, so its caller alone cannot tell whether one did.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from mesh.api.view import Json
from mesh.datapath.base import Accepted, Caller
from mesh.errors import MeshError
from mesh.reconcile.loop import Reconciler

QUESTION: Final = "accepted"
MOST: Final = 200  # connections in a question: it is one line of HTTP
WAIT: Final = 3.0  # seconds for another node's answer

Ask = Callable[[str, str, Mapping[str, str], float], Awaitable[Mapping[str, Any]]]
"""See mesh.providers.base.ClusterView.ask."""


class Standing:
    """Answers for this node, and asks others.

    Args:
        ask: None: there are no others.
    """

    def __init__(self, reconciler: Reconciler, ask: Ask | None = None) -> None:
        self._reconciler = reconciler
        self._ask = ask

    async def answer(self, query: Mapping[str, str]) -> Json:
        """How connections to this node stand.

        Args:
            query: `address`, the caller's; `calls`: SOURCE-PORT:CALLED-PORT, separated by commas, at most MOST.

        Returns:
            calls: for each null (no proxy has it), or [[backend, ...], taken], see mesh.datapath.base.Accepted.

        Raises:
            MeshError: that is no such question.
        """
        try:
            address = ipaddress.ip_address(query.get("address", ""))
            pairs = [pair.split(":") for pair in query.get("calls", "").split(",")]
            callers = [Caller(address, _port(source), _port(called)) for source, called in pairs]
        except ValueError as error:
            raise MeshError(f"that is no question: {error}") from None
        if len(callers) > MOST:
            raise MeshError(f"at most {MOST} connections can be asked for")
        return {"calls": await self._here(callers)}

    async def of(self, node: str, callers: Sequence[Caller], *, own: bool) -> Sequence[Accepted | None]:
        """How connections to a node stand, all from one address, at most MOST; None also where it cannot be asked."""
        unknown: Sequence[Accepted | None] = [None] * len(callers)
        if own or not callers:
            return await self._here(callers)
        if self._ask is None:
            return unknown
        calls = ",".join(f"{caller.port}:{caller.called}" for caller in callers)
        try:
            told = await self._ask(node, QUESTION, {"address": str(callers[0].address), "calls": calls}, WAIT)
            found = msgspec.convert(told.get("calls"), list[Accepted | None])
        except (MeshError, msgspec.ValidationError):  # it is of an earlier build, or has just gone
            return unknown
        return found if len(found) == len(callers) else unknown

    async def _here(self, callers: Sequence[Caller]) -> Sequence[Accepted | None]:
        return await self._reconciler.on_worker(self._reconciler.datapath.accepted, callers)


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    return port
