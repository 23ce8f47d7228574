# SPDX-License-Identifier: Apache-2.0
"""The last good labels in a file of the state directory: a wrong label keeps them across a restart of the agent."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import structlog

from mesh.providers.swarm.decode import Accepted

ACCEPTED_FILE: Final = "labels.json"

log = structlog.get_logger()


class AcceptedFile:
    """Reads and writes the file; what cannot be written is logged once, and kept in memory only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: Accepted | None = None
        self._error = ""

    def read(self) -> Accepted:
        """What was written last; nothing where that cannot be read."""
        try:
            self._written = msgspec.json.decode(self._path.read_bytes(), type=Accepted)
        except FileNotFoundError:
            return Accepted()
        except (OSError, msgspec.DecodeError) as error:
            log.error("the last good labels cannot be read; none are known", file=str(self._path), error=str(error))
            return Accepted()
        return self._written

    def write(self, accepted: Accepted) -> None:
        """Write what has changed; `accepted` that was written before costs nothing."""
        if accepted is self._written:
            return
        try:
            new = self._path.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(accepted))
            new.replace(self._path)
        except OSError as error:
            if str(error) != self._error:
                self._error = str(error)
                log.error("the last good labels cannot be written", file=str(self._path), error=str(error))
        self._written = accepted
