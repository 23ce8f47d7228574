# SPDX-License-Identifier: Apache-2.0
"""Docker Swarm as a source of the inventory.

`provider` reads the whole swarm through a manager's Engine, `local_node` what any Engine knows of its own node; `watch`
and `events` say when to read again. `engine` calls the Engine API, `schema` and `decode` turn answers into the model.
Only here are Docker's words used (task, container, VIP). May import `mesh.config`, `mesh.providers` and the ground.
"""

from mesh.providers.swarm.local_node import LocalNode
from mesh.providers.swarm.presence import docker_trace
from mesh.providers.swarm.provider import SwarmProvider, detect

__all__ = ["LocalNode", "SwarmProvider", "detect", "docker_trace"]
