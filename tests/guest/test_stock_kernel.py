# SPDX-License-Identifier: Apache-2.0
"""The kernel engine on the stock kernels of Debian 12 (6.1), 13 (6.12) and unstable (7.2): the objects load, translate
and forward there as they do here.

And what these kernels have and this machine's has not: VLANs, WireGuard, and network cards, of which one kind has
native XDP.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.guest.guest import run_in_guest
from tests.guest.kernels import debian_kernel

ROOT = Path(__file__).parents[2]
TABLES = (
    "tests/bpf/test_forward.py::test_there_and_back",
    "tests/bpf/test_transition.py::test_starts_go_to_the_current_owner_and_others_stay",
    "tests/bpf/test_transition.py::test_known_answers_where_no_frontend_is",
    "tests/bpf/test_second_chance.py::test_what_nobody_knows_is_a_local_previous_owners",
    "tests/bpf/test_tunnel.py::test_there_and_back_through_the_owners_node",
    "tests/bpf/test_tunnel_proof.py::test_what_is_proven_is_delivered",
    "tests/bpf/test_next_hop.py::test_without_an_agent_an_answer_counts_for_a_moment_only",
    "tests/bpf/test_next_hop.py::test_rules_by_type_of_service_are_obeyed",
    "tests/bpf/test_next_hop.py::test_where_no_neighbour_is_named_the_kernel_finds_the_way",
    "tests/bpf/test_fragments.py::test_a_question_in_any_order",
    "tests/bpf/test_fragments.py::test_an_answer_in_any_order",
    "tests/bpf/test_fragments.py::test_fragments_of_all_sizes",
    "tests/bpf/test_xdp.py::test_denied_sources_are_dropped_as_behind_it",
    "tests/bpf/test_xdp.py::test_native_on_a_real_interface",
)
NODE = "tests/guest/inside.py"
ENCRYPTED = "tests/guest/encrypted.py"
PYTEST = f"{sys.executable} -m pytest -q --color=no -p no:cacheprovider --timeout 900"


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.timeout(2000)
@pytest.mark.later("trixie", "sid")
@pytest.mark.parametrize("release", ["bookworm", "trixie", "sid"])
def test_objects_load_and_forward_on_debians_kernel(tmp_path: Path, release: str) -> None:
    if os.geteuid():
        pytest.skip("the guest shares the root file system, which needs root")
    missing = [name for name in ("qemu-system-x86_64", "busybox", "cpio", "wg") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make packages-test)")
    kernel = debian_kernel(ROOT / "build" / "guest" / release, release)
    command = f"uname -r; {PYTEST} {' '.join(TABLES)} {NODE} {ENCRYPTED}"
    result = run_in_guest(kernel, command, tmp_path, cwd=ROOT, timeout=1800)
    assert kernel.version in result.output.splitlines()
    passed = re.search(r"(\d+) passed", result.output)
    assert result.status == 0 and passed, result.output[-6000:]
    assert not re.search(r"\d+ (failed|skipped|error)", result.output), result.output[-6000:]
    count = sum((ROOT / file).read_text().count("\ndef test_") for file in (NODE, ENCRYPTED))
    assert int(passed[1]) >= len(TABLES) + count, result.output[-2000:]
