# SPDX-License-Identifier: Apache-2.0
"""The one way to wait in tests: poll a condition, within a bound that tells a hang from work.

`wait_for` blocks its thread, `until` leaves the event loop free. No test sleeps where it could poll.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal, TypeVar

PATIENCE = 180.0  # seconds; tells a hang from work, on a machine that is slow or busy too
T = TypeVar("T")
No = Literal[False] | None  # so that `condition and value` is a condition


RAREST = 0.15  # seconds between two looks at most


def wait_for(
    condition: Callable[[], T | No],
    what: str = "a condition",
    *,
    timeout: float = PATIENCE,
    interval: float | None = None,
) -> T:
    """Poll until the condition is truthy and return its value.

    Looks become rarer the longer it takes, so that it ends a tenth too late at most, and looking leaves the processor
    to what is waited for.

    Args:
        condition: what it raises ends the wait.
        what: what the error says was waited for.
        timeout: seconds until it gives up.
        interval: seconds between two looks, where the moment itself is what is measured.

    Raises:
        TimeoutError: it did not come true in time.
    """
    begun = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begun
        if waited > timeout:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(min(max(waited / 10, 0.005), RAREST) if interval is None else interval)
    return value


async def until(condition: Callable[[], T | No], what: str = "a condition", *, interval: float = 0.005) -> T:
    """The same for a coroutine: the event loop runs between two looks.

    Raises:
        TimeoutError: it did not come true in time.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE:g} s")
        await asyncio.sleep(interval)
    return value


async def settled(look: Callable[[], T], seconds: float, what: str = "a value", *, interval: float = 0.02) -> T:
    """Poll until a look has given the same truthy value for so many seconds; return that.

    Raises:
        TimeoutError: it did not in time.
    """
    since, last = time.monotonic(), look()

    def same() -> bool:
        nonlocal since, last
        if not (value := look()) or value != last:
            since, last = time.monotonic(), value
        return time.monotonic() - since >= seconds

    await until(same, f"{what} that stays the same", interval=interval)
    return last
