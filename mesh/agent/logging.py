# SPDX-License-Identifier: Apache-2.0
"""The daemon's log: level and format for the whole process, libraries' words among them.

Whoever can make a library complain, such as a client with a malformed request, must not fill the disk with it: a few
of a kind are logged in a minute.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Final

import structlog
from aiohttp.http_exceptions import HttpProcessingError

from mesh.config.keys import Config
from mesh.text import printable, printable_all

OF_A_KIND: Final = 5  # lines in a period
PERIOD: Final = 60.0  # seconds
KINDS: Final = 256  # that are told apart

_LINES: Final = ("exception", "stack")  # values of several lines


class LibraryLog(logging.Handler):
    """What libraries log, in the daemon's log: at most OF_A_KIND lines of a kind in a PERIOD, then how many there were.

    A malformed request is its sender's error: it is a line at level debug.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, str, type], tuple[float, int]] = {}  # since when, and how many

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record, or count it."""
        error = record.exc_info[1] if record.exc_info else None
        log = structlog.get_logger(record.name)
        if isinstance(error, HttpProcessingError):
            log.debug("malformed request", error=error.message)
            return
        kind = (record.name, str(record.msg), type(error))
        now = time.monotonic()
        since, count = self._kinds.get(kind, (now, 0))
        if now - since >= PERIOD:
            if count > OF_A_KIND:
                log.log(record.levelno, "more of these", of=str(record.msg), count=count - OF_A_KIND)
            since, count = now, 0
        if kind not in self._kinds and len(self._kinds) >= KINDS:
            self._kinds.clear()
        self._kinds[kind] = since, count + 1
        if count < OF_A_KIND:
            log.log(record.levelno, record.getMessage(), exc_info=error)


_LIBRARIES: Final = LibraryLog()


def clean(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog: no value can steer a terminal or pretend to be a line of its own."""
    for key, value in event.items():
        if key in _LINES:
            event[key] = printable(str(value), keep="\n\t")
        elif not isinstance(value, int | float | None):
            event[key] = printable_all(value if isinstance(value, str | list | tuple | dict) else str(value))
    return event


def configure(config: Config) -> None:
    """Set level and format for the whole process; may be called again."""
    kind = config.log_format
    if kind == "auto":
        kind = "console" if sys.stderr.isatty() else "logfmt"
    renderers: dict[str, list[Any]] = {
        "console": [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ],
        "json": [structlog.processors.JSONRenderer()],
        "logfmt": [structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)],
    }
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            clean,
            *renderers[kind],
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    if _LIBRARIES not in root.handlers:
        root.addHandler(_LIBRARIES)
    root.setLevel(logging.WARNING)
