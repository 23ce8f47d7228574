# SPDX-License-Identifier: Apache-2.0
"""When Docker announced what: swarm's Watch on a manager, and each Engine's own events, heard beside the agents.

Field numbers: swarmkit's api/watch.proto and api/objects.proto (protobuf wire format).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from mesh.errors import ProviderError
from mesh.providers.swarm.watch import frames
from tests.support.lab.dockerd import Node

RUNNING: Final = 512  # TaskState
EVENTS, OBJECT, TASK = 1, 2, 4  # WatchMessage.events, .Event.object, Object.task
ID, STATUS, DESIRED, STATE = 1, 9, 10, 2  # Task.id, .status, .desired_state, TaskStatus.state
TASK_LABEL: Final = "com.docker.swarm.task.id"


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[at : at + size]
        at += size


def one(data: bytes, number: int, otherwise: Any) -> Any:
    """The last value of a field."""
    return next((value for found, value in reversed(list(fields(data))) if found == number), otherwise)


def tasks(message: bytes) -> Iterator[tuple[str, int, int]]:
    """(id, state, desired state) of the tasks in a WatchMessage."""
    for number, event in fields(message):
        if number == EVENTS and isinstance(event, bytes):
            task = one(one(event, OBJECT, b""), TASK, b"")
            if task:
                yield one(task, ID, b"").decode(), one(one(task, STATUS, b""), STATE, 0), one(task, DESIRED, 0)


class Announcements:
    """Listens in a thread of its own. `heard`: Unix seconds by (task, "up" | "stop" | "die" | "unhealthy")."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.heard: dict[tuple[str, str], float] = {}
        self._nodes = nodes
        self._loop = asyncio.new_event_loop()
        self._listening: list[asyncio.Task[None]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcements", daemon=True)
        self._thread.start()
        self._ready.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._listen())

    async def _listen(self) -> None:
        self._listening = [asyncio.create_task(self._watch(self._nodes[0]))]
        self._listening += [asyncio.create_task(self._events(node)) for node in self._nodes]
        await asyncio.gather(*self._listening, return_exceptions=True)

    def _note(self, task: str, what: str, when: float) -> None:
        self.heard.setdefault((task, what), when)

    async def _watch(self, node: Node) -> None:
        control = node.exec_root / "swarm" / "control.sock"
        certificates = node.data_root / "swarm" / "certificates"
        buffer = b""
        with contextlib.suppress(ProviderError):
            async for piece in frames(control, certificates):
                self._ready.set()
                now, buffer = time.time(), buffer + piece
                while len(buffer) >= 5 and len(buffer) >= 5 + (size := int.from_bytes(buffer[1:5], "big")):
                    message, buffer = buffer[5 : 5 + size], buffer[5 + size :]
                    for task, state, desired in tasks(message):
                        if state == desired == RUNNING:
                            self._note(task, "up", now)
                        elif desired > RUNNING:
                            self._note(task, "stop", now)

    async def _events(self, node: Node) -> None:
        filters = ["--filter", "event=die", "--filter", "event=health_status"]  # "health_status: unhealthy"
        command = ["docker", "-H", node.host, "events", "--format", "{{json .}}", *filters]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout
        try:
            async for line in process.stdout:
                event = json.loads(line)
                task = event["Actor"]["Attributes"].get(TASK_LABEL, "")
                what = event["Action"].rpartition(": ")[2]
                self._note(task, what, event["timeNano"] / 1e9)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def close(self) -> None:
        """Stop listening."""

        def cancel() -> None:
            for task in self._listening:
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)
        self._thread.join(10)
