# SPDX-License-Identifier: Apache-2.0
"""What the model of the programs (tests/oracle/packets.py) holds and answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Backend:
    address: bytes
    port: int
    state: int
    epoch: int
    networks: list[tuple[int, bytes]] = field(default_factory=list)  # bits and prefix of those that it has itself
    gateway: bytes = b""  # by which it sees clients there


@dataclass
class Frontend:
    slots: list[tuple[int, int]]
    flags: int = 0
    acl: int = 0


@dataclass
class Reply:
    called: bytes
    called_port: int
    client: bytes
    owner: int
    epoch: int
    hairpin: bool
    closed: int = 0  # 1: by the client, 2: by the task
    opened: bool = False  # the client has shown that it gets the task's answers; UDP: its second packet was seen
    refused: bool = False  # by the task, and the client was not told
    answered: bool = False  # the task has answered the start
    sequence: int = 0  # by which it has
    stamp: int = 0  # when it began
    unanswered: bool = False  # counted as such
    frontend: int = 0
    client_port: int = 0
    translated: bool = False  # the task sees another source


@dataclass
class Outcome:
    """Action, verdict ("" where none is counted), the frame afterwards (None: dropped)."""

    action: int
    verdict: str = ""
    frame: bytes | None = None
    checks: list[int] = field(default_factory=list)  # offsets of checksums in the frame


def same(expected: Outcome, action: int, frame: bytes) -> bool:
    """Whether a program's answer is the model's; in a checksum 0 and 0xffff are one value."""
    if action != expected.action:
        return False
    if expected.frame is None or frame == expected.frame:
        return True
    a, b = bytearray(expected.frame), bytearray(frame)
    for at in expected.checks:
        for side in (a, b):
            if side[at : at + 2] == b"\xff\xff":
                side[at : at + 2] = b"\0\0"
    return a == b
