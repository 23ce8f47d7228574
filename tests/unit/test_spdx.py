# SPDX-License-Identifier: Apache-2.0
"""Every source file says its licence, and what is under bpf/ the one of the kernel side."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".toml", ".sh", ".yml", ".yaml", ".service", ".supp"}


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's own files")
    return [Path(name) for name in listed.stdout.splitlines() if Path(name).suffix in KINDS]


def test_first_lines_name_the_licence() -> None:
    files = sources()
    assert len(files) > 100
    wrong = []
    for file in files:
        head = "\n".join((ROOT / file).read_text().splitlines()[:3])
        kernel = file.parts[0] == "bpf" or file.name.endswith(".bpf.c")  # bpf programs, whose helpers ask for GPL
        wanted = "(GPL-2.0-only OR BSD-2-Clause)" if kernel else "Apache-2.0"
        if f"SPDX-License-Identifier: {wanted}" not in head:
            wrong.append(str(file))
    assert not wrong
