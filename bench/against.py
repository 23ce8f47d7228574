# SPDX-License-Identifier: Apache-2.0
"""Two builds of this project in one run, both engines: `make bench-against TREE=DIR`, DIR a built checkout of another.

The daemons and plain routing are up at once, each in a lab of its own, and take turns as in `bench.run`. A ratio is
what this build does to what the other does in the same round; a bar is undecided where the ratio's range holds it.
`--engine tunnel`: kernel engines of two nodes, all backends on the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from bench import machine, two_nodes
from bench.bars import Ratio, paired, summarise
from bench.lab import OUT, Lab
from bench.peers import Side
from bench.peers.mesh import Mesh, MeshKernel, MeshProxy
from bench.peers.plain import Plain
from bench.run import FOREIGN_LIMIT, Run, Settings
from bench.scenarios import BY_NAME

NAMES: Final = ("connections", "requests", "datagrams", "down1", "up8")
BAR: Final = 0.98  # of the other build
BEFORE: Final = "-before"


def of_tree(kind: type[Mesh], tree: Path) -> type[Mesh]:
    """The same side with the daemon of another checkout."""
    own = {
        "name": kind.name + BEFORE,
        "label": f"{kind.label}, the other build",
        "command": (str(tree / ".venv" / "bin" / "mesh"),),
    }
    return type(kind.__name__ + "Before", (kind,), own)


def settings(sides: list[type[Side]], rounds: int, names: tuple[str, ...]) -> Settings:
    return Settings(
        rounds=rounds,
        most=rounds,
        full=rounds,
        duration=0.5,
        warmup=0.2,
        budget=60.0 * rounds,
        foreign_limit=FOREIGN_LIMIT,
        connections=0,
        quick=False,
        functions=False,
        memory=False,
        effects=False,
        sides=sides,
        scenarios=[BY_NAME[name] for name in names],
    )


def outcome(ratio: Ratio) -> str:
    """At least BAR, with the whole range; below it, with the whole range; else undecided."""
    if ratio.low >= BAR:
        return "passed"
    return "missed" if ratio.high < BAR else "undecided"


def table(data: dict[str, Any], kinds: Sequence[type[Mesh]], names: tuple[str, ...]) -> str:
    found, rows = summarise(data), []
    for kind in kinds:
        for name in names:
            own, other = found.get((kind.name, name)), found.get((kind.name + BEFORE, name))
            if own is None or other is None:
                rows.append((kind.name, BY_NAME[name].title, "not measured", "", "", 0))
                continue
            ratio, cost = paired(own.values, other.values), paired(own.costs, other.costs)
            scope = f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"
            spent = f"{cost.median:.3f} ({cost.low:.3f}-{cost.high:.3f})"
            rows.append((kind.name, BY_NAME[name].title, scope, spent, outcome(ratio), own.errors + other.errors))
    return tabulate(rows, ["side", "scenario", "new / old", "CPU per operation", f">= {BAR}", "errors"])


def main(argv: list[str]) -> int:
    """Exit code 1 if a ratio's whole range lies below the bar, or something was not measured."""
    parser = argparse.ArgumentParser(prog="bench.against", description=__doc__)
    parser.add_argument("tree", type=Path, help="a checkout of the other build, after `make build` there")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--scenario", action="append", choices=NAMES, help="only this one; repeatable")
    parser.add_argument("--engine", choices=("kernel", "proxy", "tunnel"), help="only this one")
    options = parser.parse_args(argv)
    two = options.engine == "tunnel"
    names = tuple(name for name in options.scenario or NAMES if not two or name in two_nodes.SCENARIOS)
    kinds: tuple[type[Mesh], ...] = (two_nodes.MeshKernelTunnel,)
    if not two:
        kinds = tuple(kind for kind in (MeshKernel, MeshProxy) if options.engine in (None, kind.engine))
    yardstick = two_nodes.PlainTwo if two else Plain
    sides: list[type[Side]] = [yardstick, *kinds, *(of_tree(kind, options.tree.resolve()) for kind in kinds)]
    data: dict[str, Any] = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    data |= {"machine": machine.describe(), "versions": {}, "missing": {}}
    data |= {name: [] for name in ("runs", "memory", "starts", "idle")}
    Run(two_nodes.TwoNodeLab if two else Lab, settings(sides, options.rounds, names), data).run()
    (OUT / "against.json").write_text(json.dumps(data))
    text = table(data, kinds, names)
    print(text)
    return int("missed" in text or "not measured" in text)


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("bench: network namespaces need root: run it with sudo")
    sys.exit(main(sys.argv[1:]))
