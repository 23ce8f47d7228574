# SPDX-License-Identifier: Apache-2.0
"""Parts of the agent that run until they are told to end, and what has failed of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import structlog

from mesh.errors import MeshError

AGAIN: Final = (1.0, 30.0)  # seconds until a part that failed starts again: first, most; doubled after each failure
CALM: Final = 60.0  # seconds without a failure after which a part counts as well again
TWICE: Final = 2  # failures from which on they are a problem: one may be chance

_Value = TypeVar("_Value")
log = structlog.get_logger("mesh")


@dataclass(slots=True)
class _Fault:
    count: int
    last: float  # monotonic
    error: str


class Faults:
    """Unforeseen errors of a process' parts, those that nobody waits for among them. Any thread.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._faults: dict[str, _Fault] = {}

    def failed(self, part: str, error: BaseException | str) -> int:
        """Take down a failure. Returns how many there were in a row, this one included."""
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        before = self._faults.get(part)
        now = self._clock()
        count = before.count + 1 if before is not None and now - before.last < CALM else 1
        self._faults[part] = _Fault(count, now, said)
        return count

    def clear(self) -> None:
        """Forget all."""
        self._faults.clear()

    @property
    def parts(self) -> dict[str, str]:
        """Parts that have failed more than once and are not calm yet, each with its last error."""
        now = self._clock()
        rows = list(self._faults.items())
        return {part: row.error for part, row in rows if row.count >= TWICE and now - row.last < CALM}

    @property
    def problems(self) -> list[str]:
        """One sentence for each of `parts`."""
        return [
            f"part {part} of the daemon keeps failing and starts again: {error} (the log has the traceback)"
            for part, error in self.parts.items()
        ]


FAULTS: Final = Faults()
"""Those of this process. Like the log it is everybody's: what fails may be a callback that no part waits for."""


def watch_loop(faults: Faults = FAULTS) -> None:
    """Have errors of callbacks, and of tasks that nobody awaits, taken down and logged; on the running loop."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error, task = context.get("exception"), context.get("task") or context.get("future")
        part = task.get_name() if isinstance(task, asyncio.Task) else "event loop"
        if isinstance(error, Exception):
            faults.failed(part, error)
        log.error("internal error", part=part, message=context.get("message", ""), exc_info=error)

    asyncio.get_running_loop().set_exception_handler(handle)


def supervise(name: str, work: Callable[[], Coroutine[Any, Any, None]], faults: Faults = FAULTS) -> asyncio.Task[None]:
    """A part that starts again should it ever fail, and says so: the others, and the data path, go on without it."""

    async def run() -> None:
        while True:
            try:
                await work()
            except Exception as error:
                count = faults.failed(name, error)
                log.exception("internal error; this part starts again", part=name)
                first, most = AGAIN
                await asyncio.sleep(min(first * 2 ** min(count - 1, 16), most))
            else:
                return

    return asyncio.create_task(run(), name=name)


@contextlib.contextmanager
def recorded(part: str, faults: Faults = FAULTS) -> Iterator[None]:
    """Take down and log an unforeseen error of one round of a part, which then goes on. MeshErrors are foreseen."""
    try:
        yield
    except MeshError:
        raise
    except Exception as error:
        faults.failed(part, error)
        log.exception("internal error; going on", part=part)


class Told(Generic[_Value]):
    """A value that somebody was told: where the telling fails, it was not.

    Attributes:
        value: what was told last; None: nothing yet.
    """

    def __init__(self, value: _Value | None = None) -> None:
        self.value = value

    def tell(self, value: _Value, listener: Callable[[_Value], object]) -> None:
        """Call `listener` unless it knows the value. It may come here again meanwhile."""
        if value == self.value:
            return
        before, self.value = self.value, value
        try:
            listener(value)
        except BaseException:
            self.value = before
            raise


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
