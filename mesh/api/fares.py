# SPDX-License-Identifier: Apache-2.0
"""How new connections fare on every node of the cluster, for `mesh status --cluster`: each agent judges its own node,
and what only two nodes see of each other is seen on a third."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from mesh.api.view import Json, Traffic, Verdict
from mesh.errors import MeshError
from mesh.providers.base import ClusterView, EarlierBuildError

QUESTION: Final = "traffic"
WAIT: Final = 4.0  # seconds for another node's answer
AT_ONCE: Final = 64  # nodes that are asked


class Told(msgspec.Struct, frozen=True):
    """A node's answer. `paths`: its paths to other nodes that do not work, one sentence each."""

    verdict: Verdict
    reasons: list[str]
    paths: list[str] = []


class Fares:
    """Answers for this node, and asks others.

    Args:
        traffic: this node's verdict.
        paths: what is wrong with its paths to other nodes.
    """

    def __init__(self, traffic: Callable[[], Traffic], paths: Callable[[], Sequence[str]]) -> None:
        self._traffic = traffic
        self._paths = paths

    async def answer(self, query: Mapping[str, str]) -> Json:
        """See Told.

        Args:
            query: not used.
        """
        found = self._traffic()
        return {"verdict": found.verdict.value, "reasons": list(found.reasons), "paths": list(self._paths())}

    async def of_all(self, own: str, nodes: Sequence[Mapping[str, Any]], cluster: ClusterView) -> Mapping[str, Json]:
        """What each node says that is up and has an agent, by id: verdict (empty: not told), reasons, paths, and error,
        which is empty where it has answered, or is of a build that cannot."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one(node: str) -> Json:
            nothing: dict[str, Any] = {"verdict": "", "reasons": [], "paths": [], "error": ""}
            try:
                async with room:
                    said = await self.answer({}) if node == own else await cluster.ask(node, QUESTION, {}, WAIT)
                    told = msgspec.convert(said, Told)
            except EarlierBuildError:
                return nothing
            except (MeshError, msgspec.ValidationError) as error:
                return {**nothing, "error": str(error)}
            return {**nothing, **msgspec.to_builtins(told)}

        asked = [str(node["id"]) for node in nodes if node["up"] and node["age"] is not None]
        return dict(zip(asked, await asyncio.gather(*map(one, asked)), strict=True))


def sentences(nodes: Sequence[Mapping[str, Any]], told: Mapping[str, Json]) -> list[str]:
    """What is not well on which node. Pure."""
    said = []
    for node in nodes:
        if (found := told.get(str(node["id"]))) is None:
            continue
        name = node["name"]
        if found["error"]:
            said.append(f"node {name} does not say how its traffic fares: {found['error']}")
        said += [f"node {name}, traffic {found['verdict']}: {reason}" for reason in found["reasons"]]
        said += [f"node {name}: {path}" for path in found["paths"]]
    return said
