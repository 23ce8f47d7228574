# SPDX-License-Identifier: Apache-2.0
"""What swarm's Watch announces, as far as it narrows down what to read again: which tasks have changed. Pure.

Only ids are taken from it; what a task is now, the documented HTTP API says. Field numbers: swarmkit's api/watch.proto
and api/objects.proto (protobuf wire format); framing: gRPC over HTTP/2 (PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_EVENTS, _OBJECT, _TASK, _ID = 1, 2, 4, 1  # WatchMessage.events, Event.object, Object.task, Task.id
_HEAD: Final = 5  # bytes ahead of a message: whether it is compressed, its length
_LONGEST: Final = 64 << 20
_FIXED: Final = {1: 8, 5: 4}  # bytes of a value by wire type
_VARINT, _BYTES = 0, 2


class WatchMessages:
    """Takes a stream in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def hear(self, piece: bytes) -> frozenset[str] | None:
        """Ids of the tasks of which the messages that end in `piece` tell; None: they may tell of anything."""
        self._rest += piece
        found: set[str] | None = set()
        while len(self._rest) >= _HEAD:
            end = _HEAD + int.from_bytes(self._rest[1:_HEAD], "big")
            if end > _LONGEST:  # no such stream
                self._rest = b""
                return None
            if len(self._rest) < end:
                break
            tasks = None if self._rest[0] else tasks_of(self._rest[_HEAD:end])
            found = None if found is None or tasks is None else found | tasks
            self._rest = self._rest[end:]
        return None if found is None else frozenset(found)


def tasks_of(message: bytes) -> frozenset[str] | None:
    """Ids of the tasks of which a WatchMessage tells; None: it tells of something else, or makes no sense."""
    found = set()
    try:
        for number, event in fields(message):
            if number != _EVENTS:
                continue
            (changed,) = (value for number, value in fields(event) if number == _OBJECT)
            ((kind, task),) = fields(changed)
            if kind != _TASK:
                return None
            (name,) = (value for number, value in fields(task) if number == _ID)
            found.add(name.decode("ascii"))
    except ValueError:
        return None
    return frozenset(found) if all(name.isalnum() for name in found) else None


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, value) of a message's fields; of numbers the value is left out.

    Raises:
        ValueError: it is no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == _VARINT:
            _, at = _varint(data, at)
            yield key >> 3, b""
            continue
        size = _FIXED.get(key & 7)
        if key & 7 == _BYTES:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"a field of wire type {key & 7} that does not fit")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the place behind it."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number without an end")
