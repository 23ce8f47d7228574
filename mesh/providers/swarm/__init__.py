# SPDX-License-Identifier: Apache-2.0
"""Docker Swarm as a source of the inventory."""

from mesh.providers.swarm.local_node import LocalNode
from mesh.providers.swarm.provider import SwarmProvider, detect

__all__ = ["LocalNode", "SwarmProvider", "detect"]
