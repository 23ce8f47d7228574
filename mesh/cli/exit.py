# SPDX-License-Identifier: Apache-2.0
"""Exit codes of all commands, and the two errors that a daemon causes."""

from __future__ import annotations

import enum

from mesh.errors import MeshError


class Exit(enum.IntEnum):
    """Exit codes of all commands; docs/OPERATIONS.md lists them."""

    OK = 0
    NOT_READY = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    DEGRADED = 5


class DaemonUnreachableError(MeshError):
    """No daemon answers on the control socket."""


class DaemonRefusedError(MeshError):
    """The daemon refused the request."""
