# SPDX-License-Identifier: Apache-2.0
"""Docker Swarm as a source of the inventory."""

from mesh.swarm.here import Here
from mesh.swarm.provider import SwarmProvider, detect

__all__ = ["Here", "SwarmProvider", "detect"]
