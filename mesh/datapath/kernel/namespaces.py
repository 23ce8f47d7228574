# SPDX-License-Identifier: Apache-2.0
"""Which network namespaces exist on this host, by their cookies. Pins of those that are gone hold memory for nobody."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mesh._linux import CLONE_NEWNET
from mesh.datapath.kernel.pins import netns_cookie
from mesh.datapath.kernel.preflight import CAP_SYS_PTRACE, capabilities

INITIAL_PIDS: Final = 0xEFFFFFFC  # inode of the first process namespace (PROC_PID_INIT_INO): it sees all processes


def living_cookies() -> frozenset[int] | None:
    """Cookies of all network namespaces that have a process or are mounted anywhere.

    None: this process cannot tell, as in a container, which does not see the host's processes, or while namespaces
    come and go. Takes some milliseconds for a hundred processes; any thread.
    """
    try:
        if Path("/proc/self/ns/pid").stat().st_ino != INITIAL_PIDS or _hides_processes():
            return None
        handles: defaultdict[int, list[str]] = defaultdict(list)
        for inode, path in _handles():
            handles[inode].append(path)
        found = frozenset(next(filter(None, map(_cookie_in, paths)), 0) for paths in handles.values())
        return None if 0 in found else found
    except PermissionError:
        return None


def _hides_processes() -> bool:
    """Whether /proc may leave out processes without a word (mount option hidepid; ProtectProc= of systemd)."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    options = [fields[3] for fields in mounts if fields[1] == "/proc"]
    visible = options[-1:]  # it covers the others
    return any("hidepid=" in each for each in visible) and CAP_SYS_PTRACE not in capabilities()


def _handles() -> Iterator[tuple[int, str]]:
    """(inode, path) of network namespaces, most of them more than once: a process may end any time."""
    seen = set()
    for pid in ("self", *_processes()):
        try:
            yield Path(f"/proc/{pid}/ns/net").stat().st_ino, f"/proc/{pid}/ns/net"
            mounts = Path(f"/proc/{pid}/ns/mnt").stat().st_ino
            if mounts not in seen:
                yield from _mounted(pid)
                seen.add(mounts)
        except (FileNotFoundError, ProcessLookupError):  # the process has ended meanwhile
            continue


def _processes() -> list[str]:
    return [process.name for process in Path("/proc").iterdir() if process.name.isdigit()]


def _mounted(pid: str) -> Iterator[tuple[int, str]]:
    """Those that are mounted, as `ip netns` and Docker do to keep them, where the process sees mounts."""
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields = line.split()
        root, place = fields[3], fields[4].replace("\\040", " ")
        if root.startswith("net:["):
            yield int(root[5:-1]), f"/proc/{pid}/root{place}"


def _cookie_in(handle: str) -> int:
    """The cookie of a namespace, asked for inside it by a thread of its own; 0: it is gone.

    Raises:
        PermissionError: it may not be entered.
    """
    answer: list[int | OSError] = []

    def ask() -> None:
        try:
            fd = os.open(handle, os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(fd, CLONE_NEWNET):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
                answer.append(netns_cookie())
            finally:
                os.close(fd)
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=ask, name="mesh-netns")
    thread.start()
    thread.join()
    (found,) = answer
    if isinstance(found, PermissionError):
        raise found
    return found if isinstance(found, int) else 0
