# SPDX-License-Identifier: Apache-2.0
"""What stands before this daemon in the kernel: programs that earlier or other daemons have left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import structlog

from mesh.config.keys import Config
from mesh.errors import MeshError

GRACE: Final = 5.0  # seconds in which the other nodes learn that this one has another engine now
EVERY: Final = 10.0  # seconds between two looks for foreign_instances
POLL: Final = 1.0  # seconds in which a thread waits for flows at a time

OBSTACLE: Final = (
    "a daemon with another state directory has programs here too, which may serve flows by tables of its own: "
    "`mesh stop --release` with its --state-dir; if that is forgotten, rm -r {} and, before kernel 6.6, a reboot"
)

T = TypeVar("T")
log = structlog.get_logger("mesh")


async def _thread(work: Callable[..., T], *arguments: object) -> T:
    """In a thread, to its end: who is cancelled waits for it, for the next process may change the same things."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def clear(config: Config, serving: Callable[[], bool]) -> None:
    """Once the proxy engine serves: take off what the kernel engine has left in the same state directory.

    Flows that start are the proxy's from then on; those under way go on, and the programs go with the last.
    """
    try:
        from mesh.datapath.kernel import cleanup  # noqa: PLC0415 -- absent where it was built without libbpf
    except ImportError:
        return
    remains = cleanup.find(config)
    if remains is None or not remains.programs:
        return
    while not serving() or remains.owned:  # noqa: ASYNC110 -- any cause, polled
        await asyncio.sleep(0.2)
    if not remains.programs:
        return
    try:
        flows = await _thread(remains.hand_back)
        log.info("the kernel engine served here before: its programs go with the flows under way", flows=flows)
        await asyncio.sleep(GRACE)
        while await _thread(remains.wait, POLL):
            pass
        await _thread(remains.take_off)
        log.info("the kernel engine's programs are taken off")
    except (MeshError, OSError, ValueError, KeyError) as error:
        log.warning("the kernel engine's programs of before are in the way: mesh stop --release", error=str(error))


async def watch(config: Config, tell: Callable[[Sequence[str]], None]) -> None:
    """Tell of other daemons' programs in this network namespace, until cancelled."""
    try:
        from mesh.datapath.kernel.cleanup import foreign_instances  # noqa: PLC0415 -- likewise
    except ImportError:
        return
    known: list[str] = []
    while True:
        found = [OBSTACLE.format(path) for path in await asyncio.to_thread(foreign_instances, config)]
        if found != known:
            tell(found)
            for line in found:
                log.warning(line)
            known = found
        await asyncio.sleep(EVERY)
