# SPDX-License-Identifier: Apache-2.0
"""Measurements without traffic: the eBPF programs per packet, the functions of the control plane.

`python -m bench.functions control` measures these again for the raw data of the latest run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from bench import guest
from bench.lab import OUT, LabError


def programs() -> list[dict[str, Any]]:
    """What the eBPF programs cost per packet (bench_prog), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_prog", "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"bench.bench_prog: {done.stderr.strip().splitlines()[-1]}")
    return list(json.loads(done.stdout))


def control_plane() -> list[dict[str, Any]]:
    """The control plane's micro-benchmarks (test_control_plane.py), by pytest-benchmark."""
    path = OUT / "control.json"
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-disable-gc",
        "--benchmark-max-time=0.5",
    ]
    argv += [f"--benchmark-json={path}", "bench/test_control_plane.py"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=OUT.parents[1])
    if done.returncode:
        raise LabError(f"bench/test_control_plane.py: {done.stdout.strip()[-500:]}")
    kept = ("median", "iqr", "min", "max", "rounds")
    measured = json.loads(path.read_text())["benchmarks"]
    return [{"name": one["name"], "stats": {key: one["stats"][key] for key in kept}} for one in measured]


Measure = Callable[[], list[dict[str, Any]]]
QUICK: Final[dict[str, Measure]] = {"programs": programs}
ALL: Final[dict[str, Measure]] = {**QUICK, "control": control_plane, "guest": guest.measure}
"""By the key in the raw data."""


def main(names: Sequence[str]) -> int:
    """Measure some of ALL, and put them into the raw data of the latest run."""
    path = OUT / "latest.json"
    if not names or not ALL.keys() >= set(names) or not path.exists():
        print(f"bench.functions: name some of {', '.join(ALL)}; {path} has to be there", file=sys.stderr)
        return 1
    for name in names:
        found = ALL[name]()
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
