# SPDX-License-Identifier: Apache-2.0
"""The daemon's log: level and format for the whole process."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from mesh.config.keys import Config


def configure(config: Config) -> None:
    """Set level and format for the whole process; may be called again."""
    kind = config.log_format
    if kind == "auto":
        kind = "console" if sys.stderr.isatty() else "logfmt"
    renderers: dict[str, list[Any]] = {
        "console": [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())],
        "json": [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        "logfmt": [
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False),
        ],
    }
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers[kind],
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
