# SPDX-License-Identifier: Apache-2.0
"""A ClusterProvider without an Engine or other nodes, whose parts a test plays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh.cluster.provider import ClusterProvider
from mesh.cluster.wire import HealthReport
from mesh.config.keys import Config
from mesh.model import EngineKind, HealthView, Inventory
from mesh.providers.swarm import LocalNode, SwarmProvider


async def _no_tables() -> tuple[int, dict[str, str]]:
    return 0, {}


def make_provider(config: Config | None = None, on_health: Callable[[HealthView], None] = lambda view: None) -> Any:
    """The provider; any type, as tests look inside."""
    config = config or Config(state_dir="/nonexistent")
    local, swarm = LocalNode(config), SwarmProvider(config)
    return ClusterProvider(config, local, swarm, engine=EngineKind.UNKNOWN, tables=_no_tables, on_health=on_health)


class Server:
    """What a manager's relay server is asked and told. `nodes` are connected."""

    def __init__(self, *nodes: str) -> None:
        self.nodes, self.engines = dict.fromkeys(nodes, ""), dict[str, str]()
        self.tells: list[bool] = []
        self.told: list[dict[str, HealthReport]] = []

    def tell(self, tells: bool) -> None:
        self.tells.append(tells)

    def know(self, inventory: Inventory) -> None:
        pass

    def publish(self, inventory: Inventory, verdicts: dict[str, HealthReport]) -> None:
        self.told.append(verdicts)
