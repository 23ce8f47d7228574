# SPDX-License-Identifier: Apache-2.0
"""A process that applies scenarios by the real kernel engine and prints what its maps hold then.

`python -m tests.scenarios.apply DIRECTORY FILE...` prints a JSON object: by scenario, the text or what went wrong.
DIRECTORY has a bpf file system `bpf`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import structlog

from mesh.cli.maps import render
from mesh.config.keys import Config
from mesh.datapath.kernel import dump
from mesh.datapath.kernel.engine import KernelDatapath
from mesh.reconcile.compose import compose
from mesh.reconcile.plan import plan, settle
from tests.scenarios.scenario import Scenario, load


def texts(scenario: Scenario, config: Config) -> Iterator[str]:
    """What the maps hold after each stage."""
    engine = KernelDatapath(config)
    applied = engine.open()
    try:
        for number, stage in enumerate(scenario.stages):
            if stage.calm:
                applied = engine.apply(settle(applied, list(applied.frontends), {}))
            desired = compose(stage.inventory, stage.health, stage.drained, config)
            applied = engine.apply(plan(applied, replace(desired, generation=number + 1)))
            yield f"==== {number}. {stage.what}{', after a long calm' if stage.calm else ''}\n"
            yield "".join(f"problem: {problem}\n" for problem in desired.problems)
            yield render(dump.read(config)) + "\n"
    finally:
        engine.close(release=True)


def text_of(path: Path, directory: Path) -> str:
    """The text of a scenario, or the traceback of what went wrong."""
    scenario = load(path)
    config = Config(
        engine="kernel",
        bpf_fs=str(directory / "bpf"),
        state_dir=str(directory / scenario.name),
        flow_cache=1024,
        max_replies=1024,
        drain_timeout=0.0,
        **scenario.config,
    )
    try:
        return f"{scenario.about}\n\n" + "".join(texts(scenario, config))
    except Exception:  # the test of this scenario shows it
        return traceback.format_exc()


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    directory, *files = map(Path, sys.argv[1:])
    print(json.dumps({path.stem: text_of(path, directory) for path in files}))


if __name__ == "__main__":
    main()
