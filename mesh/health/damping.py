# SPDX-License-Identifier: Apache-2.0
"""From single probes to a verdict: rise and fall, and what the first moments of a backend mean. Pure, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.model import Health, HealthCheck


@dataclass(slots=True)
class Damping:
    """The verdict over one backend.

    A verdict changes after `rise` good or `fall` bad probes in a row. Two exceptions, for backends without a verdict
    yet: a first good probe means UP, and a refused connection means DOWN at once, since a program that has not opened
    its port yet is the usual case then; such a backend is `starting` and its first good probe means UP. So a fresh
    backend gets its first flow when it can take it, without waiting for `rise` or failing `fall` times.
    """

    verdict: Health = Health.UNKNOWN
    reason: str = ""
    starting: bool = False
    good: int = 0
    bad: int = 0

    def succeeded(self, check: HealthCheck) -> None:
        """Count a good probe."""
        self.good, self.bad = self.good + 1, 0
        if self.verdict is Health.UNKNOWN or self.starting or self.good >= check.rise:
            self.verdict, self.reason, self.starting = Health.UP, "", False

    def failed(self, check: HealthCheck, reason: str, *, refused: bool = False) -> None:
        """Count a bad probe."""
        self.good, self.bad = 0, self.bad + 1
        if self.verdict is Health.UNKNOWN and refused:
            self.starting = True
        if self.starting or self.bad >= check.fall:
            self.verdict = Health.DOWN
        if self.verdict is not Health.UP:
            self.reason = reason + (" (nothing has listened there so far: right port?)" if self.starting else "")

    def suspected(self, check: HealthCheck, count: int) -> None:
        """Count what traffic saw, as bad probes, but leave the last word to a probe.

        A port that nobody listens on, beside one that works, would otherwise turn the verdict to and fro.
        """
        if self.verdict is not Health.DOWN:
            self.bad = max(self.bad, min(self.bad + count, check.fall - 1))
