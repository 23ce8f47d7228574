# SPDX-License-Identifier: Apache-2.0
"""Parts of the agent that run until they are told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

log = structlog.get_logger("mesh")


def supervise(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """A part that starts again should it ever fail, and says so: the others, and the data path, go on without it."""

    async def run() -> None:
        while True:
            try:
                await work()
            except Exception:
                log.exception("internal error; this part starts again", part=name)
                await asyncio.sleep(1.0)
            else:
                return

    return asyncio.create_task(run(), name=name)


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
