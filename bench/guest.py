# SPDX-License-Identifier: Apache-2.0
"""Beside Docker's own mesh, where there is IPVS: the same harness in a QEMU guest with Debian's stock kernel.

`python -m bench.guest`. Everything in the guest is emulated, so its figures mean nothing; the ratios are what is kept.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench import bars
from bench.lab import OUT, LabError
from bench.peers.docker_mesh import DockerMesh
from bench.scenarios import BY_NAME
from tests.guest.guest import GuestError, run_in_guest
from tests.guest.kernels import debian_kernel

SIDES: Final = (DockerMesh.name, "mesh-kernel")
SCENARIOS: Final = ("connections", "requests", "pingpong")
MARKER: Final = "guest measurements: "
TIMEOUT: Final = 420.0  # seconds
NEEDED: Final = ("qemu-system-x86_64", "apt-get", "cpio")
ROOT: Final = OUT.parents[1]


def measure() -> list[dict[str, Any]]:
    """Ratios to Docker's own mesh: [{"side", "scenario", "ratio", "errors"}], ratio above 1: more, or faster. Minutes.

    Raises:
        LabError: the guest cannot run here, or did not come to an end.
    """
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        raise LabError(f"not installed: {', '.join(missing)}")
    arguments = [word for side in SIDES for word in ("--side", side)]
    arguments += [word for scenario in SCENARIOS for word in ("--scenario", scenario)]
    arguments += ["--quick", "--rounds=2", "--duration=2", "--budget=1", "--foreign-limit=1", "--connections=8"]
    command = f"{sys.executable} -m bench.run {' '.join(arguments)} || exit 1\n"
    command += f"printf '\\n{MARKER}'; tr -d '\\n' <{OUT / 'latest.json'}; echo"
    try:
        kernel = debian_kernel(OUT / "kernel")
        with tempfile.TemporaryDirectory(prefix="meshbench-") as scratch:
            done = run_in_guest(kernel, command, Path(scratch), cwd=ROOT, timeout=TIMEOUT)
    except (GuestError, OSError, subprocess.SubprocessError) as error:
        raise LabError(f"guest: {error}") from error
    found = [line.removeprefix(MARKER) for line in done.output.splitlines() if line.startswith(MARKER)]
    if not found:
        raise LabError(f"guest: {done.output[-2000:]}")
    raw = json.loads(found[0])
    if raw["missing"]:
        raise LabError(f"guest: {raw['missing']}")
    return ratios(raw)


def ratios(raw: bars.Raw) -> list[dict[str, Any]]:
    """What the guest measured, by Docker's own mesh."""
    summaries = bars.summarise(raw)
    found = []
    for (side, scenario), summary in summaries.items():
        reference = summaries.get((DockerMesh.name, scenario))
        if side == DockerMesh.name or not reference or not known(reference) or not known(summary):
            continue
        ratio = bars.paired(summary.values, reference.values).median
        better = ratio if BY_NAME[scenario].higher_is_better else 1 / ratio
        found.append({"side": side, "scenario": scenario, "ratio": round(better, 3), "errors": summary.errors})
    return found


def known(summary: bars.Summary) -> bool:
    """Whether something was completed."""
    return 0 < summary.median < math.inf


def main(_: Sequence[str]) -> int:
    """Measure and print."""
    for row in measure():
        print(f"{row['side']:14} {row['scenario']:14} {row['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
