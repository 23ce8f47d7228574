# SPDX-License-Identifier: Apache-2.0
"""What every side has in common: start it in the node's namespace, say where clients call, stop it."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, ClassVar

from bench.lab import BACKENDS, ECHO_PORT, GATEWAY, NODE, SINK_PORT, SOURCE_PORT, Lab
from bench.scenarios import Scenario

HERE = Path(__file__).parent
BASICS = ("connections", "requests", "pingpong", "down1", "up8", "datagrams")  # for sides of lesser interest
CORES = 2  # of workers, threads or processes for those that have to be told; the lab's machine has as many


class Side:
    """One thing that is measured. A new object for every start."""

    name: ClassVar[str]  # in the raw data
    label: ClassVar[str]  # in tables and plots
    udp: ClassVar[bool] = True
    quick: ClassVar[bool] = True  # also in bench-quick
    changeable: ClassVar[bool] = False  # whether `change` works while it runs
    sockets: ClassVar[bool] = True  # whether it has sockets of its own for what it forwards
    overhead: ClassVar[float] = 1.0  # seconds to start, settle and stop
    only: ClassVar[tuple[str, ...]] = ()  # the scenarios it is for; empty: all

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.processes: list[subprocess.Popen[Any]] = []

    @classmethod
    def does(cls, scenario: Scenario) -> bool:
        """Whether a scenario is for this side."""
        able = (cls.udp or not scenario.udp) and (cls.changeable or scenario.beside != "changes")
        return able and (not cls.only or scenario.name in cls.only)

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be measured here; empty if it can."""
        return ""

    @classmethod
    def version(cls) -> str:
        """What exactly is measured."""
        return ""

    def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            bench.lab.LabError: it does not.
        """

    def settle(self) -> None:
        """Wait for the steady state, if it is not there once it serves. Not part of the time to start."""

    def stop(self) -> None:
        """Stop it; what it changed in the namespace is undone."""
        for process in self.processes:
            self.lab.stop(process)
        self.processes.clear()

    def change(self, step: int) -> None:
        """Change the set of backends, the `step`th time."""
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """What became of packets so far, by name, where the side tells: what explains a turn with errors."""
        return {}

    def targets(self, port: int) -> list[str]:
        """Where clients call for one of the lab's ports."""
        return [f"{NODE}:{port}"]

    def render(self, template: str, **values: str) -> str:
        """Fill in a configuration from bench/peers, write it into the lab's directory, return its path."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        known: Mapping[str, str] = {
            "directory": str(self.lab.directory),
            "node": NODE,
            "gateway": GATEWAY,
            "cores": str(CORES),
            "files": str(files),
            "connections": str((files - 1024) // 2),
            "echo": str(ECHO_PORT),
            "source": str(SOURCE_PORT),
            "sink": str(SINK_PORT),
            **{f"backend{i}": address for i, address in enumerate(BACKENDS)},
        }
        path = self.lab.directory / template
        path.write_text(Template((HERE / template).read_text()).substitute(known, **values))
        return str(path)

    def daemon(self, *argv: str) -> None:
        """Start a process of this side and wait until it listens on all ports of the lab."""
        log = f"{self.name}.log"
        process = self.lab.start("node", *argv, log=log)
        self.processes.append(process)
        self.lab.wait_listening(process, log=log)


def first_line(*argv: str) -> str:
    """The first line that a command prints, on either stream; empty if there is no such command."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip().partition("\n")[0]
