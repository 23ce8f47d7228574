# SPDX-License-Identifier: Apache-2.0
"""A daemon's pins: one directory per state directory, network namespace and contract."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Final

from mesh._abi import ABI_DIGEST, ABI_VERSION
from mesh._linux import BPF_FS_MAGIC, SO_NETNS_COOKIE
from mesh.config.keys import Config
from mesh.errors import DatapathError

CONTRACT: Final = f"{ABI_VERSION}-{ABI_DIGEST}"  # name of this build's directory below `pin_home`


NAMES, OWNER = "kernel-names.json", "kernel-owner"  # files in the state directory


def netns_cookie() -> int:
    """The kernel's number for this network namespace, which it never reuses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)


def instance(config: Config) -> str:
    """Name of this daemon's pins: one per state directory and network namespace."""
    text = f"{Path(config.state_dir).resolve()}\0{netns_cookie()}"
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def pin_home(config: Config) -> Path:
    """The directory of this daemon's pins, with a directory per contract."""
    return Path(config.bpf_fs) / "mesh" / instance(config)


def is_bpf_fs(path: Path) -> bool:
    """Whether a bpf file system is mounted at or above `path`."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) == BPF_FS_MAGIC


def ensure_bpf_fs(path: Path) -> None:
    """Mount a bpf file system at `path` unless there is one.

    Raises:
        DatapathError: there is none, and mounting one failed.
    """
    if is_bpf_fs(path):
        return
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        name = errno.errorcode.get(ctypes.get_errno(), "?")
        raise DatapathError(
            f"no bpf file system is mounted there, and mounting one failed: {name}",
            where=str(path),
            remedy=f"mount -t bpf bpf {path}",
        )


class Owner:
    """Which process writes the maps: they have one writer, whose token is in a file of the state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / OWNER
        self._token = f"{os.getpid()} {time.monotonic_ns()}"

    def claim(self) -> None:
        """Become the writer. Where the file cannot be written, only the lock of the state directory tells."""
        try:
            self._path.write_text(self._token)
        except OSError:
            self.remove()

    def is_ours(self) -> bool:
        """Whether no other process has claimed the maps since."""
        try:
            return self._path.read_text() == self._token
        except FileNotFoundError:
            return True

    def is_another(self) -> bool:
        """Whether another process has them and lives: it lets go of them by itself (a take-over)."""
        try:
            pid = int(self._path.read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return False
        return pid != os.getpid() and Path(f"/proc/{pid}").exists()

    def remove(self) -> None:
        """Nobody has them any more."""
        self._path.unlink(missing_ok=True)


def remove_pins(directory: Path) -> None:
    """Remove a pin directory and everything in it. The kernel frees what nothing else holds."""
    if not directory.is_dir():
        return
    for each in directory.iterdir():
        if each.is_dir():
            remove_pins(each)
        else:
            each.unlink(missing_ok=True)
    directory.rmdir()
