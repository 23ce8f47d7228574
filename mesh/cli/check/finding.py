# SPDX-License-Identifier: Apache-2.0
"""One finding of `mesh check`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    """What a finding means for the daemon."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One question, its answer, and what to do about it."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""
