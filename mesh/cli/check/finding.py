# SPDX-License-Identifier: Apache-2.0
"""One finding of `mesh check`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How serious a finding is for the daemon."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One question, its answer, and what to do about it."""

    what: str
    level: Level
    found: str
    remedy: str = ""
