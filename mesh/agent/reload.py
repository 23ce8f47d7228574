# SPDX-License-Identifier: Apache-2.0
"""SIGHUP: the configuration is read again, and what is live of it is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import structlog

from mesh.config.keys import KEYS, Config
from mesh.errors import ConfigError
from mesh.model import Problem

LIVE: Final = frozenset(name for name, key in KEYS.items() if key.metadata["live"])
"""Keys that SIGHUP changes in a running daemon; the others take effect when it starts."""

log = structlog.get_logger("mesh")


class Reloader:
    """The configuration of a daemon that runs.

    Args:
        asked: as it was read at the start.
        running: the same, with what `auto` came to.
        read: reads it again; may raise ConfigError. Called in a thread.
        apply: takes the running configuration when live keys were read again; called on the event loop.

    Attributes:
        config: the running configuration.
    """

    def __init__(
        self, asked: Config, running: Config, read: Callable[[], Config], apply: Callable[[Config], None]
    ) -> None:
        self.config = running
        self._asked = asked
        self._read = read
        self._apply = apply
        self._refused = ""
        self._warn(())

    @property
    def problems(self) -> list[str]:
        """Why what was read last is not used, and what of it should be changed."""
        refused = [f"configuration rejected, keeping the previous one: {self._refused}"] if self._refused else []
        return refused + [str(problem) for problem in self._asked.problems]

    async def reload(self) -> None:
        """Read again. What cannot be used is logged and kept in `problems`."""
        try:
            new = await asyncio.to_thread(self._read)
        except ConfigError as error:
            log.error("configuration rejected; keeping the previous one", error=str(error))
            self._refused = str(error)
        else:
            self._refused = ""
            self._take(new)

    def _take(self, new: Config) -> None:
        changed = {name for name in KEYS if getattr(new, name) != getattr(self._asked, name)}
        live = {name: getattr(new, name) for name in changed & LIVE}
        known = self._asked.problems
        self._asked = replace(self._asked, **live, problems=new.problems)
        self.config = replace(self.config, **live)
        self._warn(known)
        self._apply(self.config)
        log.info("configuration reloaded", changed=sorted(live))
        if waiting := sorted(changed - LIVE):
            log.warning("these keys take effect at the next start (mesh run --take-over)", keys=waiting)

    def _warn(self, known: tuple[Problem, ...]) -> None:
        for problem in self._asked.problems:
            if problem not in known:
                log.warning("configuration", problem=str(problem))
