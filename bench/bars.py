# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 -- the multiplication sign is meant
"""From raw data to medians, and from medians to the bars: what this project asks of itself, as ratios. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tabulate import tabulate

from bench.scenarios import BY_NAME, cpu_per_operation, metric

Raw = Mapping[str, Any]  # what bench.run writes
PERCENTILES: Final = ("p50", "p99", "p999")


@dataclass(frozen=True)
class Summary:
    """One side in one scenario over all rounds. `median`, `low` and `high` in the scenario's unit."""

    median: float
    low: float
    high: float
    rounds: int
    errors: int
    disturbed: int  # rounds of which no undisturbed measurement exists
    cpu: float  # µs per operation, per MB in bulk transfers
    latency: Mapping[str, float]  # µs, by percentile

    @property
    def spread(self) -> float:
        """Highest minus lowest, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else math.nan


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def chosen(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One measurement per round: the least disturbed attempt, the first of equals."""
    best: dict[int, Mapping[str, Any]] = {}
    for run in runs:
        held = best.get(run["round"])
        if held is None or _disturbance(run) < _disturbance(held):
            best[run["round"]] = run
    return list(best.values())


def _disturbance(run: Mapping[str, Any]) -> tuple[bool, float]:
    return run["disturbed"], run["foreign"] + run["stolen"] if run["disturbed"] else 0.0


def summarise(raw: Raw) -> dict[tuple[str, str], Summary]:
    """Medians by (side, scenario). A round in which nothing was completed counts as zero, or as infinitely slow."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in raw["runs"]:
        groups.setdefault((run["side"], run["scenario"]), []).append(run)
    summaries = {}
    for (side, name), runs in groups.items():
        scenario = BY_NAME[name]
        used = chosen(runs)
        results = [run["result"] for run in used]
        worst = 0.0 if scenario.higher_is_better else math.inf
        values = [worst if math.isnan(value := scenario.value(result)) else value for result in results]
        timed = [result for result in results if "latency_us" in result]
        summaries[side, name] = Summary(
            median=statistics.median(values),
            low=min(values),
            high=max(values),
            rounds=len(used),
            errors=sum(sum(result["errors"].values()) for result in results),
            disturbed=sum(run["disturbed"] for run in used),
            cpu=_median([cpu_per_operation(result) for result in results]),
            latency={mark: _median([metric(result, mark) for result in timed]) for mark in PERCENTILES if timed},
        )
    return summaries


@dataclass(frozen=True)
class Bar:
    """`side` in `scenario` against the best of `against`: the ratio of medians is at least, or at most, `factor`."""

    side: str
    scenario: str
    against: tuple[str, ...]
    factor: float
    strict: bool = False  # ahead, not level
    over: str = ""  # the scenario of the references, where it is another one


@dataclass(frozen=True)
class Verdict:
    """What became of a bar. `ratio` is NaN where one of the sides was not measured."""

    bar: Bar
    ratio: float
    reference: str
    errors: int

    @property
    def outcome(self) -> str:
        if math.isnan(self.ratio):
            return "not measured"
        if self.errors:
            return f"missed ({self.errors} errors)"
        if self.bar.strict and self.ratio == self.bar.factor:
            return "missed"
        higher = BY_NAME[self.bar.scenario].higher_is_better
        met = self.ratio >= self.bar.factor if higher else self.ratio <= self.bar.factor
        return "passed" if met else "missed"


KERNEL, PROXY = "mesh-kernel", "mesh-proxy"
OTHERS: Final = ("nginx", "envoy", "uvloop")
BARS: Final = (
    Bar(KERNEL, "connections", ("plain",), 1.10),
    Bar(KERNEL, "connections", ("nft",), 1.20),
    Bar(KERNEL, "connections", ("haproxy", *OTHERS), 1.65),
    Bar(KERNEL, "requests", ("plain",), 1.10),
    Bar(KERNEL, "requests", ("nft",), 1.20),
    Bar(KERNEL, "pingpong", ("plain",), 0.92),
    Bar(KERNEL, "down1", ("plain",), 1.05),
    Bar(KERNEL, "up8", ("plain",), 1.15),
    Bar(KERNEL, "datagrams", ("plain",), 1.15),
    Bar("mesh-kernel-1000", "connections", (KERNEL,), 0.95),
    Bar("mesh-kernel-1000", "requests", (KERNEL,), 0.95),
    Bar(KERNEL, "flood", (KERNEL,), 0.90, over="requests"),
    Bar("mesh-kernel-fresh", "flood", ("mesh-kernel-fresh",), 0.90, over="requests"),
    Bar(PROXY, "connections", ("haproxy",), 1.0),
    Bar(PROXY, "connections", OTHERS, 1.0, strict=True),
    Bar(PROXY, "requests", ("haproxy",), 1.1),
    Bar(PROXY, "pingpong", ("haproxy",), 0.9),
    Bar(PROXY, "down1", ("haproxy",), 0.95),
    Bar(PROXY, "down1", OTHERS, 1.0, strict=True),
    Bar(PROXY, "up8", ("haproxy",), 0.95),
    Bar(PROXY, "up8", OTHERS, 1.0, strict=True),
    Bar(PROXY, "datagrams", ("nginx",), 1.1),
    Bar("mesh-proxy-1000", "connections", (PROXY,), 0.90),
    Bar("mesh-proxy-1000", "requests", (PROXY,), 0.90),
)


def judge(bar: Bar, summaries: Mapping[tuple[str, str], Summary]) -> Verdict:
    """Compare one bar's side with the best of its references."""
    own = summaries.get((bar.side, bar.scenario))
    scenario = bar.over or bar.scenario
    measured = [side for side in bar.against if (side, scenario) in summaries]
    if own is None or not measured:
        return Verdict(bar, math.nan, "", 0)
    best = max if BY_NAME[bar.scenario].higher_is_better else min
    reference = best(measured, key=lambda side: summaries[side, scenario].median)
    theirs = summaries[reference, scenario].median
    return Verdict(bar, own.median / theirs if theirs else math.nan, reference, own.errors)


def verdicts(raw: Raw) -> list[Verdict]:
    """All bars on one run."""
    summaries = summarise(raw)
    return [judge(bar, summaries) for bar in BARS]


def rows(raw: Raw) -> list[list[str]]:
    """The table of bars: side, work, bar, measured ratio, outcome."""
    table = []
    for verdict in verdicts(raw):
        bar = verdict.bar
        sign = (">" if bar.strict else "≥") if BY_NAME[bar.scenario].higher_is_better else "≤"
        against = bar.against[0] if len(bar.against) == 1 else "best of " + ", ".join(bar.against)
        against += f" ({verdict.reference})" if verdict.reference and len(bar.against) > 1 else ""
        against += f", {BY_NAME[bar.over].title}" if bar.over else ""
        ratio = "" if math.isnan(verdict.ratio) else f"{verdict.ratio:.2f}"
        work = BY_NAME[bar.scenario].title
        table.append([bar.side, work, f"{sign} {bar.factor:.2f} × {against}", ratio, verdict.outcome])
    return table


def text(raw: Raw) -> str:
    """The bars for a terminal."""
    outcomes = [verdict.outcome for verdict in verdicts(raw)]
    passed, missed = outcomes.count("passed"), sum(outcome.startswith("missed") for outcome in outcomes)
    disturbed = sum(summary.disturbed for summary in summarise(raw).values())
    note = f"; {disturbed} measurements were disturbed by other load" if disturbed else ""
    table = tabulate(rows(raw), headers=["side", "work", "bar", "measured", ""], disable_numparse=True)
    return f"{table}\n{passed} passed, {missed} missed, {outcomes.count('not measured')} not measured{note}"
