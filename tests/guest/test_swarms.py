# SPDX-License-Identifier: Apache-2.0
"""Real swarms in the guest: Debian's kernel has what this machine's may lack, IPVS for Docker's own mesh and WireGuard.

The roll-out drill is here in short; in full, and with a stand-in for Docker's mesh, it is tests/swarm/test_rollout.py.
MESH_DRILL_SEED repeats a drill.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.guest.guest import ENGINES, MODULES, PYTEST, ROOT, run_in_guest
from tests.guest.kernels import debian_kernel
from tests.support import peers
from tests.support.lab import images
from tests.support.lab.dockerd import unavailable

DRILL = "tests/guest/inside_swarm.py"
ENCRYPTED = "tests/guest/inside_wireguard.py"
SEED = int(os.environ.get("MESH_DRILL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 16)


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.swarm
@pytest.mark.timeout(7200)
@pytest.mark.later(DRILL, ENCRYPTED)
@pytest.mark.parametrize("what", [DRILL, ENCRYPTED])
def test_swarms_on_debians_kernel(tmp_path: Path, what: str) -> None:
    """Nothing that Docker's own mesh would have served is lost; a swarm over WireGuard is made as the recipe says."""
    if os.geteuid():
        pytest.skip("the guest shares the root file system, which needs root")
    if reason := unavailable():
        pytest.skip(reason)
    if missing := [name for name in ("qemu-system-x86_64", "busybox", "cpio", "wg") if not shutil.which(name)]:
        pytest.skip(f"not installed: {', '.join(missing)} (make packages-test)")
    kernel = debian_kernel(ROOT / "build" / "guest" / "bookworm", "bookworm")
    peers.program(peers.HERE / "load.c")  # compilers take long in the guest
    images.server()
    prepared = "sysctl -qw net.ipv4.ip_forward=1; mount -t tmpfs none /mnt; export TMPDIR=/mnt"  # no overlay over one
    command = (
        f"{prepared}; MESH_DRILL_SEED={SEED} {PYTEST} -s -o log_cli=true -o log_cli_level=INFO --timeout 7000 {what}"
    )
    modules = [*MODULES, *ENGINES]
    result = run_in_guest(
        kernel, command, tmp_path, cwd=ROOT, timeout=7000, memory=4096, modules=modules, own_time=True
    )
    assert result.status == 0 and re.search(r"\b1 passed\b", result.output), result.output[-20000:]
