# SPDX-License-Identifier: Apache-2.0
"""The heartbeat's stamps, and the tables of an agent that returns to orphaned ones. Pure."""

from __future__ import annotations

import struct

import pytest

from mesh._abi import ORPHAN_NEVER, OWNER_PASS
from mesh._maglev import SlotTable
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.heartbeat import LEAST, Heartbeat, stamps_left

STAMP = 1 << 30  # nanoseconds
A, B = 2, 3
SIZE = 1021


@pytest.mark.parametrize(
    ("stamp", "now", "left"),
    [
        (0, 7, None),
        (10, 7, 3),
        (7, 7, 0),
        (5, 7, -2),
        (2, (1 << 32) - 3, 5),  # the agent's stamp is beyond the wrap
        ((1 << 32) - 3, (1 << 32) + 2, -5),  # the clock is
    ],
)
def test_stamps_are_compared_by_their_signed_difference(stamp: int, now: int, left: int | None) -> None:
    assert stamps_left(stamp, now * STAMP + STAMP - 1) == left


class Word:
    """Stands for the mapped array."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def load32(self, offset: int) -> int:
        assert offset == 0
        return self.value

    def store32(self, offset: int, value: int) -> None:
        assert offset == 0
        self.value = value


def heartbeat(monkeypatch: pytest.MonkeyPatch, word: Word, timeout: float, clock: list[int]) -> Heartbeat:
    monkeypatch.setattr("mesh._bpf.Mapping", lambda held: held)
    return Heartbeat(word, timeout, lambda: clock[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [3.0, 900.0])
def test_tables_are_held_for_the_timeout_and_little_longer(monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    word, clock = Word(), [123_456_789_012]
    beat = heartbeat(monkeypatch, word, timeout, clock)
    assert not beat.orphaned  # a fresh map
    beat.beat()
    assert timeout * 1e9 <= word.value * STAMP - clock[0] <= timeout * 1e9 + 2 * STAMP
    assert not beat.orphaned
    clock[0] += 10**9  # the next beat is due
    assert not beat.orphaned
    clock[0] = (word.value - 1) * STAMP  # a packet could meet it while this beats
    assert beat.orphaned


def test_never_and_hardly_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    word, clock = Word(99), [1 << 45]
    assert heartbeat(monkeypatch, word, 900, clock).orphaned  # of an agent before
    heartbeat(monkeypatch, word, 0, clock).beat()
    assert word.value == ORPHAN_NEVER
    heartbeat(monkeypatch, word, 0.1, clock).beat()
    assert word.value * STAMP - clock[0] >= LEAST * 1e9
    clock[0] = ((1 << 32) - 4) * STAMP  # 0 would mean never
    heartbeat(monkeypatch, word, 3 * STAMP / 1e9, clock).beat()
    assert word.value == 1


def test_every_slot_of_a_rejoined_table_has_notes_that_count() -> None:
    before = SlotTable.uniform(SIZE, A).transition(SlotTable.build(SIZE, [(bytes(16), A, 1), (bytes(15) + b"1", B, 1)]))
    after = SlotTable.from_slots(codec.track(before.to_bytes()))
    assert before.tracked_slots() < after.tracked_slots() == SIZE
    assert [after.slot(i)[:2] for i in range(SIZE)] == [before.slot(i)[:2] for i in range(SIZE)]
    assert struct.unpack_from("=II", codec.track(struct.pack("=II", OWNER_PASS, OWNER_PASS))) == (1, 1 | 1 << 31)
    assert after.settled({5}).tracked_slots() == 1  # a flow of whoever had the port meanwhile was seen there
    moved = after.transition(SlotTable.uniform(SIZE, B))
    assert moved.tracked_slots() == SIZE  # not even what is B's before and after is without state
