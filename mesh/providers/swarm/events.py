# SPDX-License-Identifier: Apache-2.0
"""What local events already said and the last read could not know yet: a death takes effect without a re-read. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Final

from mesh.model import Inventory
from mesh.providers.swarm import schema
from mesh.providers.swarm.decode import GONE, TASK_LABEL, UNREADY, Read

_HEALTH: Final = {"health_status: healthy": True, "health_status: unhealthy": False}
_SURE_DEATH: Final = ("9", "SIGKILL", "KILL")
_STOP: Final = ("15", "SIGTERM", "TERM")
_PATIENCE: Final = 4  # reads after which a container that was told to stop, and runs, is believed to go on
_ATTACHING: Final = frozenset({"connect", "disconnect"})
_LOUD: Final = frozenset({"start", "die", "kill", "pause", "unpause", "destroy", "create", "update", "remove"})


@dataclass
class Overlay:
    """Deaths and health by container id, each with the number of the last read that could not know it itself."""

    dead: dict[str, int] = field(default_factory=dict)
    ready: dict[str, tuple[bool, int]] = field(default_factory=dict)

    def hear(self, event: schema.Event, read: int) -> tuple[bool, bool]:
        """Note an event. `read` counts the reads that have begun.

        Returns whether what is noted has changed, and whether the Engine should be read again.
        """
        container = event.actor.id
        attributes = event.actor.attributes or {}
        if event.type == "network":  # the tasks' overlays come and go with them
            return False, event.action in _ATTACHING and attributes.get("type") != "overlay"
        if event.type != "container":
            return False, event.action in _LOUD
        if TASK_LABEL not in attributes:
            return False, False
        return self._hear_container(container, event.action, attributes.get("signal", ""), read)

    def _hear_container(self, container: str, action: str, signal: str, read: int) -> tuple[bool, bool]:
        if action == "die" or (action == "kill" and signal in _SURE_DEATH):
            fresh = container not in self.dead
            self.dead[container] = read
            return fresh, True
        if action == "kill" and signal in _STOP:
            # An Engine that ends stops its containers without a word to the swarm; it tells of a death only once it has
            # taken the container's network down, and nobody may listen there since the signal.
            fresh = self.ready.get(container, (True, 0))[0]
            self.ready[container] = (False, read + _PATIENCE)
            return fresh, True
        if action == "start":
            stopped = self.ready.pop(container, None) is not None
            return self.dead.pop(container, None) is not None or stopped, True
        if action in _HEALTH:
            self.ready[container] = (_HEALTH[action], read)
            return True, True
        return False, action in _LOUD

    def settle(self, begun: int, running: Set[str]) -> None:
        """A read that was the `begun`-th to begin is done: forget what it knew itself.

        A death is forgotten only when the Engine no longer lists the container: it announces deaths before its list
        shows them.
        """
        self.dead = {c: at for c, at in self.dead.items() if c in running or at >= begun}
        self.ready = {c: (ok, at) for c, (ok, at) in self.ready.items() if at >= begun}

    def unseen(self, read: Read) -> Mapping[str, str]:
        """Read.unseen as of now."""
        found = dict(read.unseen)
        for backend in read.inventory.backends:
            if backend.container in self.dead:
                found[backend.id] = GONE
            elif backend.ready and not self.ready.get(backend.container, (True, 0))[0]:
                found[backend.id] = UNREADY
        return found

    def apply(self, read: Read) -> Inventory:
        """The inventory as of now."""
        if not self.dead and not self.ready:
            return read.inventory
        backends = []
        for backend in read.inventory.backends:
            if backend.container and backend.container in self.dead:
                continue
            heard = self.ready.get(backend.container) if backend.container else None
            # "healthy" is not enough to be ready: the swarm has to call the task running, which the next read tells.
            backends.append(replace(backend, ready=False) if heard is not None and not heard[0] else backend)
        return replace(read.inventory, backends=tuple(backends))
