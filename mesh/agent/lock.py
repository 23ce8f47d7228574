# SPDX-License-Identifier: Apache-2.0
"""One daemon for one state directory: the lock that says so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from mesh.errors import MeshError


def check_owner(state_dir: Path) -> None:
    """Check that nobody else can change what is in the state directory: links there, the control socket, drains.

    Raises:
        MeshError: it is another user's, others may write in it, or it is no directory.
    """
    found = state_dir.stat()
    if not stat.S_ISDIR(found.st_mode):
        said = "is no directory"
    elif found.st_uid not in (0, os.geteuid()):
        said = f"belongs to the user with id {found.st_uid}, who could command the daemon"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        said = f"has mode {stat.S_IMODE(found.st_mode):04o}: others may write in it, and could command the daemon"
    else:
        return
    remedy = f"`chown {os.geteuid()} {state_dir} && chmod go-w {state_dir}` if it is mesh's, else set --state-dir"
    raise MeshError(said, where=str(state_dir), remedy=remedy)


class Lock:
    """The lock of a state directory, held."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, state_dir: Path) -> Lock:
        """Take it.

        Raises:
            MeshError: a running daemon has it (the message has its pid), or the directory cannot be written or is not
                safe: see `check_owner`.
        """
        path = state_dir / "lock"
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            check_owner(state_dir)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise MeshError("is no file", where=str(path), remedy="remove it")
        except OSError as error:
            if path.is_symlink():
                raise MeshError(
                    "is a symbolic link, which is not followed", where=str(path), remedy="remove it"
                ) from error
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
