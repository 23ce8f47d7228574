# SPDX-License-Identifier: Apache-2.0
"""One measurement: the load runs against one of the sides that are up, and what else happens meanwhile is watched."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench import machine
from bench.lab import CLIENTS, FLOOD_NETWORK, OUT, LabError
from bench.peers import Side
from bench.scenarios import Scenario

STOLEN_LIMIT: Final = 0.01  # of the machine's CPU time, not given by the hypervisor
FLOOD_RATE: Final = 20_000  # SYNs a second
CHANGE_INTERVAL: Final = 0.3  # seconds; the static provider looks at its file four times a second
LOAD_GRACE: Final = 15.0  # seconds that the load generator may take beyond its time


def pids(side: Side, *, with_backends: bool) -> set[int]:
    """The processes of a side, and of the backends in its lab."""
    everyone = machine.processes()
    roots = side.processes + (side.lab.backends if with_backends else [])
    return {pid for process in roots for pid in machine.family(process.pid, everyone)}


class Idle:
    """What sides cost, their backends included, while another one is measured."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}  # seconds, by side
        self.time: dict[str, float] = {}  # seconds during which it was watched

    def add(self, before: dict[str, float], after: dict[str, float], measured: str, elapsed: float) -> float:
        """CPU seconds by side before and after a measurement of one of them. Returns those that the others used."""
        used = {name: max(0.0, after[name] - before[name]) for name in before.keys() & after.keys() - {measured}}
        for name, seconds in used.items():
            self.cpu[name] = self.cpu.get(name, 0.0) + seconds
            self.time[name] = self.time.get(name, 0.0) + elapsed
        return sum(used.values())

    def rows(self) -> list[dict[str, Any]]:
        """[{"side", "cpu", "seconds"}]"""
        return [
            {"side": name, "cpu": round(cpu, 2), "seconds": round(self.time[name], 1)} for name, cpu in self.cpu.items()
        ]


class Turns:
    """Measurements of sides that are up at once."""

    def __init__(self, warmup: float, foreign_limit: float, connections: int) -> None:
        """`warmup`: seconds. `foreign_limit`: share of CPU. `connections`: instead of the scenarios' own; 0: those."""
        self.warmup = warmup
        self.foreign_limit = foreign_limit
        self.connections = connections
        self.idle = Idle()
        self._counted: dict[str, dict[str, int]] = {}  # by side, when it was last looked at

    def take(self, side: Side, scenario: Scenario, duration: float, everyone: Sequence[Side]) -> dict[str, Any]:
        """One measurement of `side`, one of those in `everyone`, for so many seconds.

        Raises:
            LabError: the load generator failed.
        """
        cpu = max(os.sched_getaffinity(0))
        moved = pids(side, with_backends=True) if scenario.pinned else set()
        argv = ["taskset", "-c", str(cpu)] if scenario.pinned else []
        argv += [str(OUT / "load"), scenario.mode, *scenario.arguments, *ends(side, scenario.port)]
        if self.connections and not scenario.pinned:
            argv += ["--connections", str(self.connections)]
        argv += ["--duration", str(duration), "--warmup", str(self.warmup)]
        roots = {process.pid: one.name for one in everyone for process in (*one.processes, *one.lab.backends)}
        before, began, crowded = machine.processes(), time.monotonic(), machine.neighbours_refused()
        with machine.pinned(moved, cpu), self._fallback(side, scenario, duration) as happened:
            done = self._load(side.lab.inside("client", *argv), duration)
        elapsed, after = time.monotonic() - began, machine.processes()
        if done.returncode:
            raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
        capacity = elapsed * (os.cpu_count() or 1)
        result = json.loads(done.stdout)
        foreign = (machine.foreign_seconds(after) - machine.foreign_seconds(before)) / capacity
        stolen = (result["cpu_after"][7] - result["cpu_before"][7]) / result["ticks_per_second"] / capacity
        times = [machine.seconds_below(roots, found) for found in (before, after)]
        idle = self.idle.add(times[0], times[1], side.name, elapsed) / capacity
        crowded = machine.neighbours_refused() - crowded
        record = {
            "side": side.name,
            "scenario": scenario.name,
            "foreign": round(foreign, 4),
            "stolen": round(stolen, 4),
            "idle": round(idle, 4),
            "neighbours_refused": crowded,
            "disturbed": foreign > self.foreign_limit or stolen > STOLEN_LIMIT or crowded > 0,
            "happened": happened,
            "result": result,
        }
        return record | ({"counters": self._count(side)} if result["errors"] else {})

    def _count(self, side: Side) -> dict[str, int]:
        """What a side's counters have gained since its last turn with errors."""
        before = self._counted.get(side.name, {})
        self._counted[side.name] = after = side.counters()
        return {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name, 0)}

    def _load(self, argv: Sequence[str], duration: float) -> subprocess.CompletedProcess[str]:
        limit = duration + self.warmup + LOAD_GRACE
        try:
            return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(argv)}: no answer within {limit} s") from error

    @contextlib.contextmanager
    def _fallback(self, side: Side, scenario: Scenario, duration: float) -> Iterator[dict[str, int]]:
        """What happens while the load runs. Yields what is filled in by its end: {"sent": SYNs} or {"changes": N}."""
        happened: dict[str, int] = {}
        if scenario.beside == "flood":
            address, _, port = side.targets(scenario.port)[0].partition(":")
            length = str(duration + self.warmup)
            argv = (str(OUT / "flood"), FLOOD_NETWORK, address, port, str(FLOOD_RATE), length)
            flood = side.lab.start("client", *argv, stdout=subprocess.PIPE)
            yield happened
            flood.wait(LOAD_GRACE)
            assert flood.stdout
            happened.update(json.loads(flood.stdout.read()))
            side.lab.stop(flood)
        elif scenario.beside == "changes":
            ended = threading.Event()
            changer = threading.Thread(target=_keep_changing, args=(side, ended, happened))
            changer.start()
            try:
                yield happened
            finally:
                ended.set()
                changer.join()
                side.change(-1)
        else:
            yield happened


def ends(side: Side, port: int) -> list[str]:
    """Where the load generator calls, and from where."""
    targets = [word for target in side.targets(port) for word in ("--target", target)]
    return targets + [word for address in CLIENTS for word in ("--source", address)]


def _keep_changing(side: Side, ended: threading.Event, happened: dict[str, int]) -> None:
    while not ended.wait(CHANGE_INTERVAL):
        happened["changes"] = happened.get("changes", 0) + 1
        side.change(happened["changes"])
