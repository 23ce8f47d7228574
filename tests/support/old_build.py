# SPDX-License-Identifier: Apache-2.0
"""The build before the contract last changed, made from git: what an upgrade begins with."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

from tests.support.lab.netns import run

OLD = "2480956"
ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 900.0


def old_build() -> Path:
    """The command of the old build, which is kept in build/; minutes where it is not there yet."""
    tree = ROOT / "build" / f"build-{OLD}"
    tree.mkdir(parents=True, exist_ok=True)
    with (ROOT / "build" / f".build-{OLD}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tree / ".venv" / ".built").exists():
            archive = subprocess.run(["git", "archive", OLD], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x"], cwd=tree, input=archive, check=True)
            run("make", "-C", str(tree), "build", timeout=BUILD_SECONDS)
    return tree / ".venv" / "bin" / "mesh"
