# SPDX-License-Identifier: Apache-2.0
"""The kernel engine on Debian's stock 6.1 kernel: the objects load, translate and forward there as they do here."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.guest.guest import debian_kernel, run_in_guest

ROOT = Path(__file__).parents[2]
TABLES = (
    "tests/bpf/test_forward.py::test_there_and_back",
    "tests/bpf/test_transition.py::test_starts_go_to_the_current_owner_and_others_stay",
    "tests/bpf/test_transition.py::test_known_answers_where_no_frontend_is",
    "tests/bpf/test_second_chance.py::test_what_nobody_knows_is_a_local_previous_owners",
    "tests/bpf/test_tunnel.py::test_there_and_back_through_the_owners_node",
    "tests/bpf/test_xdp.py::test_denied_sources_are_dropped_as_behind_it",
    "tests/bpf/test_xdp.py::test_native_on_a_real_interface",
)
FORWARDING = (
    "tests/datapath/test_kernel_engine.py::test_every_backend_answers_and_sees_the_clients_address",
    "tests/datapath/test_kernel_engine.py::test_udp",
    "tests/datapath/test_kernel_engine.py::test_processes_of_the_node_are_connected_straight",
)


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.timeout(2000)
def test_objects_load_and_forward_on_debians_kernel(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("the guest shares the root file system, which needs root")
    missing = [name for name in ("qemu-system-x86_64", "busybox", "cpio") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make packages-test)")
    kernel = debian_kernel(ROOT / "build" / "guest" / "kernel")
    options = "-q --color=no -p no:cacheprovider --timeout 900"
    command = f"uname -r; {sys.executable} -m pytest {options} {' '.join(TABLES + FORWARDING)}"
    result = run_in_guest(kernel, command, tmp_path, cwd=ROOT, timeout=1800)
    assert kernel.version in result.output.splitlines()
    passed = re.search(r"(\d+) passed", result.output)
    assert result.status == 0 and passed, result.output[-6000:]
    assert int(passed[1]) >= len(TABLES + FORWARDING), result.output[-2000:]
    assert not re.search(r"\d+ (failed|skipped|error)", result.output), result.output[-6000:]
