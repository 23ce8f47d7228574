# SPDX-License-Identifier: Apache-2.0
"""Sources of the inventory: Docker Swarm, a static file, the demo. `base` is their contract, `labels` what users write.

May import `mesh.config`, `mesh.model` and `mesh.errors`; knows nothing of engines, health or the agent.
"""
