# SPDX-License-Identifier: Apache-2.0
"""Measure all sides in one run and print the bars. `python -m bench.run --help`.

All sides are up at once, each in a lab of its own, and take turns: in every round, for one scenario after another, each
side is measured for half a second or so, in random order. Machines drift by more than the sides differ, so sides are
compared by what they did in the same round, seconds apart. There are as many rounds as the time allows; after the first
few they are for what the bars compare. A measurement during which other processes used the machine is repeated, as long
as there is time; what stayed disturbed is marked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bench import bars, effect, functions, machine, memory, report, two_nodes
from bench.lab import OUT, Lab, LabError
from bench.peers import SIDES, Side
from bench.scenarios import BY_NAME, SCENARIOS, STRESS, Scenario
from bench.turns import Turns, pids

FOREIGN_LIMIT: Final = 0.02  # of the machine's CPU time, used by others
REPEATS: Final = 3  # attempts at a measurement that is disturbed
REPEATING: Final = 0.2  # of the time, for repeating
OVERHEAD: Final = 0.15  # seconds around a measurement
LAB: Final = 1.5  # seconds to make a lab and to remove it
FUNCTIONS: Final = (150.0, 8.0)  # seconds for what is no traffic: all, quick
MEMORY: Final = {True: 8.0, False: 30.0}  # seconds to hold connections: a side with sockets, one without
EFFECTS: Final = 30.0  # seconds
UNLIMITED: Final = 1_000_000  # rounds

Turn = tuple[type[Side], Scenario]


@dataclass
class Settings:
    """How much is measured. Times in seconds."""

    rounds: int  # at least
    most: int  # rounds, if there is time
    full: int  # rounds with everything; further ones are for what the bars compare
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
        """What is measured with two nodes, in so many seconds. No bars are about that."""
        scenarios = [scenario for scenario in self.scenarios if scenario.name in two_nodes.SCENARIOS]
        rounds = min(self.rounds, self.full)
        one = replace(self, rounds=rounds, most=rounds, full=rounds, budget=budget, memory=False)
        return replace(one, sides=self.far, scenarios=scenarios, far=[])


def seconds(settings: Settings, scenario: Scenario) -> float:
    """How long one measurement takes."""
    return (scenario.duration or settings.duration) + settings.warmup + OVERHEAD


def blocks(settings: Settings, sides: Sequence[type[Side]], number: int) -> list[list[Turn]]:
    """What is measured in a round, the first is 0: turns that are compared with each other are in one block."""
    found: dict[str, list[Turn]] = {}
    for scenario in settings.scenarios:
        for side in sides:
            wanted = number < settings.full or (side.name, scenario.name) in bars.COMPARED
            if wanted and side.does(scenario) and not scenario.duration:
                found.setdefault(STRESS.get(scenario.name, scenario.name), []).append((side, scenario))
    return list(found.values())


def long_blocks(settings: Settings, sides: Sequence[type[Side]]) -> list[list[Turn]]:
    """What is measured once, after all rounds: scenarios with a duration of their own, beside what they stress."""
    chosen = [scenario for scenario in settings.scenarios if scenario.duration]
    return [
        [(side, BY_NAME[STRESS[scenario.name]]), (side, scenario)]
        for scenario in chosen
        for side in sides
        if side.does(scenario)
    ]


def time_of(settings: Settings, work: Sequence[Sequence[Turn]]) -> float:
    """Seconds that blocks take if nothing is repeated."""
    return sum(seconds(settings, scenario) for block in work for _, scenario in block)


def time_after(settings: Settings, sides: Sequence[type[Side]]) -> float:
    """Seconds for what comes after the rounds."""
    held = sum(MEMORY[side.sockets] for side in sides if settings.memory and not side.only)
    return time_of(settings, long_blocks(settings, sides)) + held


def traffic(settings: Settings, sides: Sequence[type[Side]]) -> float:
    """Seconds that the sides take with the least number of rounds, if nothing is repeated."""
    up = sum(side.overhead + LAB for side in sides)
    rounds = sum(time_of(settings, blocks(settings, sides, number)) for number in range(settings.rounds))
    return up + rounds + time_after(settings, sides)


def planned(settings: Settings, sides: Sequence[type[Side]]) -> float:
    """Seconds of the least that a run does. What the budget has beyond that is for repeating, and for more rounds."""
    far = settings.of_two_nodes(0)
    rest = (FUNCTIONS[settings.quick] if settings.functions else 0) + (EFFECTS if settings.effects else 0)
    return traffic(settings, sides) + traffic(far, [side for side in far.sides if not side.missing()]) + rest


class Run:
    """Some sides in labs of one kind, the raw data, the clock."""

    def __init__(self, lab: type[Lab], settings: Settings, data: dict[str, Any]) -> None:
        self.lab = lab
        self.settings = settings
        self.data = data
        self.began = time.monotonic()
        self.repeated = 0.0  # seconds
        self.estimated = self.spent = 1.0  # seconds, of the latest round
        self.turns = Turns(settings.warmup, settings.foreign_limit, settings.connections)
        self.up: dict[str, tuple[Side, contextlib.ExitStack]] = {}  # what is up, and how it is taken down

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> int:
        """All that was asked for, in as many rounds as the budget allows. Returns how many that were."""
        number = 0
        with contextlib.ExitStack() as end:
            end.callback(lambda: self.data["idle"].extend(self.turns.idle.rows()))
            for kind in self.settings.sides:
                if reason := kind.missing():
                    self.data["missing"][kind.name] = reason
                    print(f"not measured: {kind.label}: {reason}", flush=True)
                else:
                    self._start(kind, end.enter_context(contextlib.ExitStack()))
            for name in tuple(self.up):
                self._settle(name)
            while self._goes_on(number):
                self._round(number)
                number += 1
            for block in long_blocks(self.settings, self.kinds):
                self._block(block, number)
            self._hold()
        return number

    @property
    def kinds(self) -> list[type[Side]]:
        return [type(side) for side, _ in self.up.values()]

    @property
    def everyone(self) -> list[Side]:
        return [side for side, _ in self.up.values()]

    def _start(self, kind: type[Side], stack: contextlib.ExitStack) -> None:
        print(f"[{self.elapsed:.0f} s] starting {kind.label}", flush=True)
        with self._failing(kind.name, stack):
            side = kind(stack.enter_context(self.lab(kind.name)))
            stack.callback(side.stop)
            self.up[kind.name] = side, stack
            began = time.monotonic()
            side.start()
            self.data["starts"].append({"side": side.name, "seconds": round(time.monotonic() - began, 3)})
            self.data["versions"][kind.name] = kind.version()

    def _settle(self, name: str) -> None:
        side, stack = self.up[name]
        with self._failing(name, stack):
            side.settle()
            if self.settings.memory:
                self.data["memory"].append(memory.row(side, pids(side, with_backends=False)))

    @contextlib.contextmanager
    def _failing(self, name: str, stack: contextlib.ExitStack) -> Iterator[None]:
        """A side that fails is taken down, with the reason; the run goes on without it."""
        try:
            yield
        except LabError as error:
            self.data["missing"][name] = str(error)
            print(f"  failed: {name}: {error}", flush=True)
            self.up.pop(name, None)
            stack.close()

    def _goes_on(self, number: int) -> bool:
        work = blocks(self.settings, self.kinds, number)
        if not work or number < self.settings.rounds:
            return bool(work)
        pace = max(1.0, self.spent / self.estimated)
        end = sum(side.overhead for side in self.kinds) / 2  # to take all of them down
        needed = time_of(self.settings, work) * pace + time_after(self.settings, self.kinds) + end
        return number < self.settings.most and self.elapsed + needed < self.settings.budget

    def _round(self, number: int) -> None:
        work = blocks(self.settings, self.kinds, number)
        began, self.estimated = self.elapsed, time_of(self.settings, work)
        for block in random.sample(work, len(work)):
            self._block(random.sample(block, len(block)), number)
        self.spent = self.elapsed - began

    def _block(self, block: Sequence[Turn], number: int) -> None:
        names = dict.fromkeys(scenario.title for _, scenario in block)
        clock = f"[{self.elapsed:.0f} of {self.settings.budget:.0f} s]"
        print(f"{clock} round {number + 1}, {', '.join(names)}", flush=True)
        for kind, scenario in block:
            if kind.name in self.up:
                side, stack = self.up[kind.name]
                with self._failing(kind.name, stack):
                    self._measure(side, scenario, number)

    def _measure(self, side: Side, scenario: Scenario, number: int) -> None:
        duration = scenario.duration or self.settings.duration
        for attempt in range(REPEATS):
            began = time.monotonic()
            record = self.turns.take(side, scenario, duration, self.everyone)
            self.data["runs"].append(record | {"round": number, "attempt": attempt})
            mark = " disturbed" if record["disturbed"] else ""
            errors = f" errors {record['result']['errors']}" if record["result"]["errors"] else ""
            value = scenario.value(record["result"])
            print(f"  {side.label:42} {value:12,.1f} {scenario.unit}{errors}{mark}", flush=True)
            took = time.monotonic() - began
            self.repeated += took if attempt else 0.0
            if not record["disturbed"] or self.repeated + took > REPEATING * self.elapsed:
                return

    def _hold(self) -> None:
        """Memory with many connections, side by side; last, for some do not survive it."""
        for name, (side, stack) in tuple(self.up.items()):
            if self.settings.memory and not side.only:
                print(f"[{self.elapsed:.0f} s] memory, {side.label}", flush=True)
                with self._failing(name, stack):
                    self.data["memory"] += memory.measure(side.lab, side, pids(side, with_backends=False))
                    del self.up[name]
                    stack.close()


def attempt(data: dict[str, Any], name: str, measure: functions.Measure) -> None:
    """What is no matter of sides and rounds. A failure is noted."""
    print(f"{name}...", flush=True)
    try:
        data[name] = measure()
    except LabError as error:
        data["missing"][name] = str(error)
        print(f"  failed: {error}", flush=True)


def effects() -> list[dict[str, Any]]:
    """How soon a change shows, in a lab of its own."""
    with Lab() as lab:
        return effect.measure(lab)


def parse(argv: list[str]) -> Settings:
    """Command line to settings."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes: shorter, fewer scenarios")
    parser.add_argument("--rounds", type=int, default=5, help="at least; of a part, with no --budget: exactly")
    parser.add_argument("--duration", type=float, help="seconds per measurement (0.5; quick: 0.4)")
    parser.add_argument("--budget", type=float, help="seconds, repeating included (1140; quick: 225)")
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
        most=UNLIMITED if whole or options.budget else options.rounds,
        full=(1 if options.quick else 3) if whole else UNLIMITED,
        duration=options.duration or (0.4 if options.quick else 0.5),
        warmup=0.15 if options.quick else 0.2,
        budget=options.budget or (225.0 if options.quick else 1140.0),
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


def measure(settings: Settings, data: dict[str, Any]) -> None:
    """All of it, into `data`."""
    began, whole = time.monotonic(), settings.budget
    if settings.functions:
        for name, one in (functions.QUICK if settings.quick else functions.ALL).items():
            attempt(data, name, one)
    if settings.effects:
        attempt(data, "effects", effects)
    far = settings.of_two_nodes(0)
    reserved = traffic(far, [side for side in far.sides if not side.missing()])
    near = replace(settings, budget=whole - (time.monotonic() - began) - reserved)
    data["settings"]["rounds"] = Run(Lab, near, data).run()
    if far.sides:
        left = whole - (time.monotonic() - began)
        Run(two_nodes.TwoNodeLab, settings.of_two_nodes(max(reserved, left)), data).run()


def main(argv: list[str]) -> int:
    """Run, write bench/out/latest.json, print the bars. Exit code 0 also where a bar is missed: it is a report."""
    if os.geteuid():
        print("bench: network namespaces need root: run it with sudo", file=sys.stderr)
        return 1
    settings = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    data: dict[str, Any] = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe(),
        "settings": {"rounds": settings.rounds, "duration": settings.duration, "warmup": settings.warmup},
        "versions": {},
        "missing": {},
    }
    data |= {name: [] for name in ("runs", "programs", "control", "guest", "memory", "starts", "effects", "idle")}
    try:
        measure(settings, data)
    finally:
        data["seconds"] = round(time.monotonic() - began)
        write(data)
    for part in report.functions(data):
        print(part)
    print(bars.text(data))
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
