# SPDX-License-Identifier: Apache-2.0
"""Have one thread of the proxy engine stand still: its share of all connections is stuck, and the watchdog, /readyz and
`mesh status` see a daemon that is well (issue 12, item 23).
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.datapath.proxy import engine as engines
from tests.support.fastpath_bench import engine
from tests.support.lab.demo import Demo, get
from tests.support.polling import PATIENCE, wait_for

pytestmark = pytest.mark.root

EPOLL_WAIT = {"22", "232", "281"}  # epoll_pwait of aarch64; epoll_wait and epoll_pwait of x86-64

STOPPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_DETACH, WALL = 16, 17, 0x40000000
thread = int(sys.argv[1])
assert libc.ptrace(PTRACE_ATTACH, thread, None, None) == 0, os.strerror(ctypes.get_errno())
os.waitpid(thread, WALL)
print("stopped", flush=True)
sys.stdin.readline()
libc.ptrace(PTRACE_DETACH, thread, None, None)
"""


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


@contextlib.contextmanager
def stopped(thread: int) -> Iterator[None]:
    """While this thread stands still, and its process goes on."""
    stopper = subprocess.Popen(
        [sys.executable, "-I", "-c", STOPPER, str(thread)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert stopper.stdout is not None
        if stopper.stdout.readline() != "stopped\n":
            pytest.skip("this kernel lets nobody stop a single thread")
        yield
    finally:
        stopper.communicate("\n")


def test_a_thread_that_stands_still_is_named_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "HUNG", 0.5)
    before = threads()
    with engine(threads=2) as mesh:
        python = {thread.native_id for thread in threading.enumerate()}
        workers = threads() - before - python
        assert len(workers) == 2
        assert mesh.datapath.hung() == []
        with stopped(min(workers)):
            (said,) = wait_for(mesh.datapath.hung, "named")
            assert "has stood still" in said
        wait_for(lambda: not mesh.datapath.hung(), "well again")


def waiting_for_events(process: int) -> list[int]:
    """Threads of a process, without its first, that wait in epoll_wait or epoll_pwait."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        call = (task / "syscall").read_text().split()[0]
        if int(task.name) != process and call in EPOLL_WAIT:
            found.append(int(task.name))
    return found


def test_systemd_hears_nothing_while_a_thread_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(PATIENCE)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    said: list[bytes] = []

    def alive(within: float) -> bool:
        """Whether systemd hears within so many seconds, from now on, that the daemon is well."""
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(manager.recv(1000))
        manager.settimeout(within)
        with contextlib.suppress(TimeoutError):
            while True:
                said.append(manager.recv(1000))
                if said[-1] == b"WATCHDOG=1":
                    return True
        return False

    with Demo(tmp_path, "--threads=1") as demo:
        assert alive(PATIENCE)
        (worker,) = wait_for(lambda: waiting_for_events(demo.process.pid), "the forwarding thread")
        with stopped(worker):
            wait_for(lambda: "has stood still" in get(f"http://{demo.http}/readyz")[1], "named", timeout=2 * PATIENCE)
            assert get(f"http://{demo.http}/readyz")[0] == 503
            assert not alive(1.5)
        assert alive(PATIENCE)
