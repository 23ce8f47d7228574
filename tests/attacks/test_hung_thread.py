# SPDX-License-Identifier: Apache-2.0
"""Have one thread of the proxy engine stand still: its share of all connections is stuck, and the watchdog, /readyz and
`mesh status` see a daemon that is well (issue 12, item 23).
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mesh.datapath.proxy import engine as engines
from tests.support.fastpath_bench import engine
from tests.support.polling import wait_for

pytestmark = pytest.mark.root

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


def test_a_thread_that_stands_still_is_named_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "HUNG", 0.5)
    before = threads()
    with engine(threads=2) as mesh:
        python = {thread.native_id for thread in threading.enumerate()}
        workers = threads() - before - python
        assert len(workers) == 2
        assert mesh.datapath.hung() == []
        stopper = subprocess.Popen(
            [sys.executable, "-I", "-c", STOPPER, str(min(workers))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert stopper.stdout is not None
            if stopper.stdout.readline() != "stopped\n":
                pytest.skip("this kernel lets nobody stop a single thread")
            (said,) = wait_for(mesh.datapath.hung, "named")
            assert "has stood still" in said
        finally:
            stopper.communicate("\n")
        wait_for(lambda: not mesh.datapath.hung(), "well again")
