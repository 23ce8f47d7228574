# SPDX-License-Identifier: Apache-2.0
"""The roll-out drill beside Docker's own mesh: Debian's kernel has the IPVS that this machine's may lack, so three real
dockerds run in the guest. In full: tests/swarm/test_rollout.py, with a stand-in.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.guest.guest import ENGINES, MODULES, PYTEST, ROOT, run_in_guest
from tests.guest.kernels import debian_kernel
from tests.support.lab.dockerd import unavailable

DRILL = "tests/guest/inside_swarm.py"


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.swarm
@pytest.mark.timeout(7200)
@pytest.mark.later("bookworm")
@pytest.mark.parametrize("release", ["bookworm"])
def test_mesh_comes_and_goes_beside_ipvs(tmp_path: Path, release: str) -> None:
    """Nothing that Docker's own mesh would have served is lost."""
    if os.geteuid():
        pytest.skip("the guest shares the root file system, which needs root")
    if reason := unavailable():
        pytest.skip(reason)
    if missing := [name for name in ("qemu-system-x86_64", "busybox", "cpio") if not shutil.which(name)]:
        pytest.skip(f"not installed: {', '.join(missing)} (make packages-test)")
    kernel = debian_kernel(ROOT / "build" / "guest" / release, release)
    command = f"sysctl -qw net.ipv4.ip_forward=1; {PYTEST} -s --timeout 7000 {DRILL}"
    modules = [*MODULES, *ENGINES]
    result = run_in_guest(
        kernel, command, tmp_path, cwd=ROOT, timeout=7000, memory=4096, modules=modules, own_time=True
    )
    assert result.status == 0 and re.search(r"\b1 passed\b", result.output), result.output[-20000:]
