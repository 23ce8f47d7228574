# SPDX-License-Identifier: Apache-2.0
"""What Watch announces: ids of tasks where it is only those, else anything; no bytes are an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.scale_bodies import field, frame
from mesh.providers.swarm.watch_message import WatchMessages, tasks_of

TASK, SERVICE = 4, 2  # of Object


def event(kind: int, identity: str, padding: int = 300) -> bytes:
    """WatchMessage.Event: {action, object: {kind: {id, meta, spec, slot}}}."""
    thing = field(1, identity.encode()) + field(2, bytes(20)) + field(3, bytes(padding)) + b"\x28\x03"
    return field(1, b"\x08\x02" + field(2, field(kind, thing)))


VERSION = field(2, b"\x08\x07")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", set()),
        (VERSION, set()),
        (event(TASK, "t1") + event(TASK, "t2", 70000) + VERSION, {"t1", "t2"}),
        (event(TASK, "t1") + event(SERVICE, "s1") + VERSION, None),
        (event(TASK, "")[:-1] + VERSION, None),
        (event(TASK, 't","x'), None),
        (field(1, b"\x08\x02"), None),
        (b"\xff" * 20, None),
    ],
)
def test_tasks_of_a_message(message: bytes, expected: set[str] | None) -> None:
    assert tasks_of(message) == expected


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    found = tasks_of(data)
    assert found is None or all(name.isalnum() for name in found)
    WatchMessages().hear(data)


@given(st.lists(st.integers(min_value=1, max_value=400)))
def test_pieces_of_any_size(sizes: list[int]) -> None:
    announced, found = WatchMessages(), set[str]()
    stream = b"".join(frame(event(TASK, f"t{i}")) for i in range(5))
    at = 0
    for size in [*sizes, len(stream)]:
        heard = announced.hear(stream[at : at + size])
        at += size
        assert heard is not None
        found |= heard
    assert found == {"t0", "t1", "t2", "t3", "t4"}


def test_what_is_not_understood_may_be_anything() -> None:
    announced = WatchMessages()
    assert announced.hear(frame(event(TASK, "t1")) + frame(b"", flag=1)) is None
    assert announced.hear(frame(event(SERVICE, "s1")) + frame(event(TASK, "t1"))) is None
    assert announced.hear(b"\0\xff\xff\xff\xff") is None
    assert announced.hear(frame(event(TASK, "t1"))) == {"t1"}
