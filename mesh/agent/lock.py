# SPDX-License-Identifier: Apache-2.0
"""One daemon for one state directory: the lock that says so."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from mesh.errors import MeshError


class Lock:
    """The lock of a state directory, held."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, state_dir: Path) -> Lock:
        """Take it.

        Raises:
            MeshError: a running daemon has it (the message has its pid), or the directory cannot be written.
        """
        path = state_dir / "lock"
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise MeshError(
                f"cannot be written: {error.strerror}", where=str(state_dir), remedy="run as root, or set --state-dir"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise MeshError(
                f"a daemon with pid {pid} already uses this state directory",
                where=str(state_dir),
                remedy="stop it, take over from it with --take-over, or give this one another --state-dir",
            ) from None
        lock = cls(descriptor)
        lock.sign()
        return lock

    def sign(self) -> None:
        """Write this process's pid into it, for messages; where there is no room, nothing."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give this process's share of it up."""
        os.close(self.descriptor)
