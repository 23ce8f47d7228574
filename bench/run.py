# SPDX-License-Identifier: Apache-2.0
"""Measure all sides in one run, interleaved, and print the bars. `python -m bench.run --help`.

Every round starts every side once, in random order, and gives it every scenario, in random order. A measurement during
which other processes used the machine is repeated, as long as there is time; what stayed disturbed is marked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bench import bars, effect, functions, machine, memory, report, two_nodes
from bench.lab import CLIENTS, FLOOD_NETWORK, OUT, Lab, LabError
from bench.peers import SIDES, Side
from bench.scenarios import SCENARIOS, Scenario

FOREIGN_LIMIT: Final = 0.02  # of the machine's CPU time, used by others
STOLEN_LIMIT: Final = 0.01  # of the machine's CPU time, not given by the hypervisor
REPEATS: Final = 3  # attempts at a measurement that is disturbed
OVERHEAD: Final = 0.2  # seconds around a measurement
FUNCTIONS: Final = (150.0, 8.0)  # seconds for what is no traffic: all, quick
MEMORY: Final = {True: 8.0, False: 30.0}  # seconds to hold connections: a side with sockets, one without
EFFECTS: Final = 30.0  # seconds
FLOOD_RATE: Final = 20_000  # SYNs a second
CHANGE_INTERVAL: Final = 0.3  # seconds; the static provider looks at its file four times a second
LOAD_GRACE: Final = 15.0  # seconds that the load generator may take beyond its time


@dataclass
class Settings:
    """How much is measured. Times in seconds."""

    rounds: int
    duration: float
    warmup: float
    budget: float
    foreign_limit: float
    connections: int  # instead of the scenarios' own; 0: those
    quick: bool
    functions: bool  # also what is no traffic
    memory: bool  # also memory, without connections and with many
    effects: bool  # also how soon a change shows
    sides: list[type[Side]] = field(default_factory=list)
    scenarios: list[Scenario] = field(default_factory=list)
    far: list[type[Side]] = field(default_factory=list)  # those with two nodes

    def of_two_nodes(self, budget: float) -> Settings:
        """What is measured with two nodes, in so many seconds."""
        scenarios = [scenario for scenario in self.scenarios if scenario.name in two_nodes.SCENARIOS]
        return replace(self, budget=budget, memory=False, sides=self.far, scenarios=scenarios, far=[])


def seconds(settings: Settings, scenario: Scenario) -> float:
    """How long one measurement takes."""
    return (scenario.duration or settings.duration) + settings.warmup + OVERHEAD


def work(settings: Settings, side: type[Side], number: int) -> list[Scenario]:
    """What a side is given in a round; the first is 0."""
    return [scenario for scenario in settings.scenarios if side.does(scenario) and not (number and scenario.duration)]


def round_time(settings: Settings, sides: Sequence[type[Side]], number: int) -> float:
    """Seconds that a round takes if nothing is repeated; the first is 0."""
    worked = sum(side.overhead + sum(seconds(settings, one) for one in work(settings, side, number)) for side in sides)
    held = [MEMORY[side.sockets] for side in sides if settings.memory and not (side.only or number)]
    return worked + sum(held)


def traffic(settings: Settings, sides: Sequence[type[Side]]) -> float:
    """Seconds that all rounds take if nothing is repeated."""
    return sum(round_time(settings, sides, number) for number in range(settings.rounds))


def planned(settings: Settings, sides: Sequence[type[Side]]) -> float:
    """Seconds that a run takes in which nothing is repeated. What the budget has beyond that is for repeating."""
    far = settings.of_two_nodes(0)
    rest = (FUNCTIONS[settings.quick] if settings.functions else 0) + (EFFECTS if settings.effects else 0)
    return traffic(settings, sides) + traffic(far, [side for side in far.sides if not side.missing()]) + rest


def _keep_changing(side: Side, ended: threading.Event, happened: dict[str, int]) -> None:
    while not ended.wait(CHANGE_INTERVAL):
        happened["changes"] = happened.get("changes", 0) + 1
        side.change(happened["changes"])


class Run:
    """One run: the lab, the raw data, the clock."""

    def __init__(self, lab: Lab, settings: Settings, data: dict[str, Any] | None = None) -> None:
        """`data`: of a run that this one is a part of."""
        self.lab = lab
        self.settings = settings
        self.began = time.monotonic()
        self.spare = 0.0  # seconds left for repeating in this round
        self.data: dict[str, Any] = data or {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine.describe(),
            "settings": {"rounds": settings.rounds, "duration": settings.duration, "warmup": settings.warmup},
            "versions": {},
            "missing": {},
            "runs": [],
            "programs": [],
            "control": [],
            "guest": [],
            "memory": [],
            "starts": [],
            "effects": [],
        }

    def functions(self) -> None:
        """What is no traffic: the programs per packet, the control plane's functions."""
        for name, measure in (functions.QUICK if self.settings.quick else functions.ALL).items():
            print(f"{name}...", flush=True)
            try:
                self.data[name] = measure()
            except LabError as error:
                self.data["missing"][name] = str(error)
                print(f"  failed: {error}", flush=True)

    def effects(self) -> None:
        """How soon a change shows."""
        print("effects...", flush=True)
        try:
            self.data["effects"] = effect.measure(self.lab)
        except LabError as error:
            self.data["missing"]["effects"] = str(error)
            print(f"  failed: {error}", flush=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> None:
        """All rounds, or as many as the budget allows."""
        sides = []
        for side in self.settings.sides:
            reason = side.missing()
            if reason:
                self.data["missing"][side.name] = reason
                print(f"not measured: {side.label}: {reason}", flush=True)
            else:
                self.data["versions"][side.name] = side.version()
                sides.append(side)
        total = self.settings.rounds * len(sides)
        done, began = 0, time.monotonic()
        for number in range(self.settings.rounds):
            left = self.settings.budget - (time.monotonic() - began)
            needed = [round_time(self.settings, sides, n) for n in range(number, self.settings.rounds)]
            self.spare = (left - sum(needed)) / len(needed)
            for side in random.sample(sides, len(sides)):
                done += 1
                if side.name in self.data["missing"]:
                    continue
                left = (time.monotonic() - began) / (done - 1) * (total - done + 1) if done > 1 else 0.0
                eta = f", about {left:.0f} s left" if left else ""
                print(f"[{done}/{total}] round {number + 1}, {side.label}{eta}", flush=True)
                self._side(side, number)

    def _side(self, kind: type[Side], number: int) -> None:
        side = kind(self.lab)
        try:
            began = time.monotonic()
            side.start()
            start = {"side": side.name, "round": number, "seconds": round(time.monotonic() - began, 3)}
            self.data["starts"].append(start)
            side.settle()
            if not number and self.settings.memory:
                self.data["memory"].append(memory.row(side, self._pids(side, with_backends=False)))
            chosen = work(self.settings, kind, number)
            for scenario in random.sample(chosen, len(chosen)):
                self._measure(side, scenario, number)
            if not (number or kind.only) and self.settings.memory:  # last: some sides do not survive it
                self.data["memory"] += memory.measure(self.lab, side, self._pids(side, with_backends=False))
        except LabError as error:
            self.data["missing"][kind.name] = str(error)
            print(f"  failed: {error}", flush=True)
        finally:
            side.stop()

    def _measure(self, side: Side, scenario: Scenario, number: int) -> None:
        for attempt in range(REPEATS):
            record = self._once(side, scenario) | {"round": number, "attempt": attempt}
            self.data["runs"].append(record)
            mark = " disturbed" if record["disturbed"] else ""
            errors = f" errors {record['result']['errors']}" if record["result"]["errors"] else ""
            value = scenario.value(record["result"])
            print(f"  {scenario.title:38} {value:12,.1f} {scenario.unit}{errors}{mark}", flush=True)
            self.spare -= seconds(self.settings, scenario) if attempt else 0.0
            if not record["disturbed"] or self.spare < seconds(self.settings, scenario):
                return

    def _once(self, side: Side, scenario: Scenario) -> dict[str, Any]:
        cpu = max(os.sched_getaffinity(0))
        pids = self._pids(side, with_backends=True) if scenario.pinned else set()
        argv = ["taskset", "-c", str(cpu)] if scenario.pinned else []
        argv += [str(OUT / "load"), scenario.mode, *scenario.arguments, *self._ends(side, scenario.port)]
        if self.settings.connections and not scenario.pinned:
            argv += ["--connections", str(self.settings.connections)]
        duration = scenario.duration or self.settings.duration
        argv += ["--duration", str(duration), "--warmup", str(self.settings.warmup)]
        foreign, began = machine.foreign_seconds(), time.monotonic()
        with machine.pinned(pids, cpu), self._beside(side, scenario, duration) as happened:
            done = subprocess.run(
                self.lab.inside("client", *argv),
                capture_output=True,
                text=True,
                check=False,
                timeout=duration + self.settings.warmup + LOAD_GRACE,
            )
        if done.returncode:
            raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
        capacity = (time.monotonic() - began) * (os.cpu_count() or 1)
        result = json.loads(done.stdout)
        share = (machine.foreign_seconds() - foreign) / capacity
        stolen = (result["cpu_after"][7] - result["cpu_before"][7]) / result["ticks_per_second"] / capacity
        return {
            "side": side.name,
            "scenario": scenario.name,
            "foreign": round(share, 4),
            "stolen": round(stolen, 4),
            "disturbed": share > self.settings.foreign_limit or stolen > STOLEN_LIMIT,
            "happened": happened,
            "result": result,
        }

    @contextlib.contextmanager
    def _beside(self, side: Side, scenario: Scenario, duration: float) -> Iterator[dict[str, int]]:
        """What happens while the load runs. Yields what is filled in by its end: {"sent": SYNs} or {"changes": N}."""
        happened: dict[str, int] = {}
        if scenario.beside == "flood":
            address, _, port = side.targets(scenario.port)[0].partition(":")
            length = str(duration + self.settings.warmup)
            argv = (str(OUT / "flood"), FLOOD_NETWORK, address, port, str(FLOOD_RATE), length)
            flood = self.lab.start("client", *argv, stdout=subprocess.PIPE)
            yield happened
            flood.wait(LOAD_GRACE)
            assert flood.stdout
            happened.update(json.loads(flood.stdout.read()))
            self.lab.stop(flood)
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

    def _ends(self, side: Side, port: int) -> list[str]:
        ends = [word for target in side.targets(port) for word in ("--target", target)]
        return ends + [word for address in CLIENTS for word in ("--source", address)]

    def _pids(self, side: Side, *, with_backends: bool) -> set[int]:
        everyone = machine.processes()
        roots = side.processes + (self.lab.backends if with_backends else [])
        return {pid for process in roots for pid in machine.family(process.pid, everyone)}


def parse(argv: list[str]) -> Settings:
    """Command line to settings."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes: shorter, fewer scenarios")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, help="seconds per measurement (1; quick: 0.4)")
    parser.add_argument("--budget", type=float, help="seconds, repeating included (1140; quick: 230)")
    names = [s.name for s in (*SIDES, *two_nodes.SIDES)]
    parser.add_argument("--side", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--scenario", action="append", choices=[s.name for s in SCENARIOS], help="only this one")
    parser.add_argument("--foreign-limit", type=float, default=FOREIGN_LIMIT, help="share of CPU used by others")
    parser.add_argument("--connections", type=int, default=0, help="instead of the scenarios' own number")
    options = parser.parse_args(argv)
    wanted = options.scenario or [s.name for s in SCENARIOS if s.quick or not options.quick]
    everyone = (*SIDES, *two_nodes.SIDES)
    sides = options.side or [s.name for s in everyone if s.quick or not options.quick]
    whole = not options.side and not options.scenario
    return Settings(
        rounds=options.rounds,
        duration=options.duration or (0.4 if options.quick else 1.0),
        warmup=0.2 if options.quick else 0.3,
        budget=options.budget or (230.0 if options.quick else 1140.0),
        foreign_limit=options.foreign_limit,
        connections=options.connections,
        quick=options.quick,
        functions=whole,
        memory=not options.quick and not options.scenario,
        effects=whole and not options.quick,
        sides=[s for s in SIDES if s.name in sides],
        scenarios=[s for s in SCENARIOS if s.name in wanted],
        far=[s for s in two_nodes.SIDES if s.name in sides],
    )


def main(argv: list[str]) -> int:
    """Run, write bench/out/latest.json, print the bars. Exit code 0 also where a bar is missed: it is a report."""
    if os.geteuid():
        print("bench: network namespaces need root: run it with sudo", file=sys.stderr)
        return 1
    settings = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    far, whole = settings.of_two_nodes(0), settings.budget
    reserved = traffic(far, [side for side in far.sides if not side.missing()])
    with Lab() as lab:
        run = Run(lab, settings)
        try:
            if settings.functions:
                run.functions()
            if settings.effects:
                run.effects()
            settings.budget -= run.elapsed + reserved
            run.run()
            if far.sides:
                with two_nodes.TwoNodeLab() as lab_of_two:
                    Run(lab_of_two, settings.of_two_nodes(max(reserved, whole - run.elapsed)), run.data).run()
        finally:
            run.data["seconds"] = round(run.elapsed)
            write(run.data)
    for part in report.functions(run.data):
        print(part)
    print(bars.text(run.data))
    return 0


def write(data: dict[str, Any]) -> Path:
    """Keep the raw data, under its time and as the latest."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{data['began'].replace(':', '')}.json"
    path.write_text(json.dumps(data, indent=1))
    (OUT / "latest.json").write_text(path.read_text())
    return path


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; what was measured is in bench/out/latest.json")
