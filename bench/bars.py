# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 -- the multiplication sign is meant
"""From raw data to medians and ratios, and from ratios to the bars: what this project asks of itself. Pure.

A ratio of two sides is the median of the ratios of what they did in the same round, seconds apart: a machine drifts by
more than sides differ. Its range is what 5 to 95 % of resampled sets of rounds give (bootstrap).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tabulate import tabulate

from bench.scenarios import BY_NAME, cpu_per_operation, metric

Raw = Mapping[str, Any]  # what bench.run writes
PERCENTILES: Final = ("p50", "p99", "p999")
RESAMPLES: Final = 500
TAIL: Final = 0.05  # of the resampled medians, left out at either end of a range


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
    values: Mapping[int, float]  # in the scenario's unit, by round
    costs: Mapping[int, float]  # as `cpu`, by round

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
        values = {run["round"]: worst if math.isnan(value := scenario.value(run["result"])) else value for run in used}
        costs = {run["round"]: cpu_per_operation(run["result"]) for run in used}
        timed = [result for result in results if "latency_us" in result]
        summaries[side, name] = Summary(
            median=statistics.median(values.values()),
            low=min(values.values()),
            high=max(values.values()),
            rounds=len(used),
            errors=sum(sum(result["errors"].values()) for result in results),
            disturbed=sum(run["disturbed"] for run in used),
            cpu=_median(list(costs.values())),
            latency={mark: _median([metric(result, mark) for result in timed]) for mark in PERCENTILES if timed},
            values=values,
            costs=costs,
        )
    return summaries


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of rounds, and its range. NaN: nothing to compare; a range needs two rounds."""

    median: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.median):
            return ""
        return f"{self.median:.2f}" + ("" if math.isnan(self.low) else f" ({self.low:.2f}–{self.high:.2f})")


def paired(own: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio:
    """The ratio of two sides, from what they did by round. Rounds that only one of them has do not count."""
    shares = [own[number] / theirs[number] for number in sorted(own.keys() & theirs.keys()) if theirs[number]]
    shares = [share for share in shares if not math.isnan(share)]
    if len(shares) < 2:
        return Ratio(shares[0] if shares else math.nan)
    dice = random.Random(0)  # equal data, equal report
    resampled = sorted(statistics.median(dice.choices(shares, k=len(shares))) for _ in range(RESAMPLES))
    cut = int(RESAMPLES * TAIL)
    return Ratio(statistics.median(shares), resampled[cut], resampled[-1 - cut])


@dataclass(frozen=True)
class Bar:
    """`side` in `scenario` against the best of `against`: the ratio is at least, or at most, `factor`."""

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
    ratio: Ratio
    reference: str
    errors: int

    @property
    def outcome(self) -> str:
        ratio = self.ratio.median
        if math.isnan(ratio):
            return "not measured"
        if self.errors:
            return f"missed ({self.errors} errors)"
        if self.bar.strict and ratio == self.bar.factor:
            return "missed"
        higher = BY_NAME[self.bar.scenario].higher_is_better
        met = ratio >= self.bar.factor if higher else ratio <= self.bar.factor
        return "passed" if met else "missed"

    @property
    def straddles(self) -> bool:
        """Whether the bar lies within the range of the ratio: another run may come to another outcome."""
        return not self.errors and self.ratio.low < self.bar.factor < self.ratio.high


STRADDLES: Final = ", the bar is within the range"
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


COMPARED: Final = frozenset(
    pair
    for bar in BARS
    for pair in ((bar.side, bar.scenario), *((side, bar.over or bar.scenario) for side in bar.against))
)
"""(side, scenario) of all that the bars compare."""


def judge(bar: Bar, summaries: Mapping[tuple[str, str], Summary]) -> Verdict:
    """Compare one bar's side with the best of its references: the one beside which it looks worst."""
    own = summaries.get((bar.side, bar.scenario))
    scenario = bar.over or bar.scenario
    measured = [side for side in bar.against if (side, scenario) in summaries]
    if own is None or not measured:
        return Verdict(bar, Ratio(math.nan), "", 0)
    ratios = {side: paired(own.values, summaries[side, scenario].values) for side in measured}
    known = [side for side in measured if not math.isnan(ratios[side].median)] or measured
    worst = min if BY_NAME[bar.scenario].higher_is_better else max
    reference = worst(known, key=lambda side: ratios[side].median)
    return Verdict(bar, ratios[reference], reference, own.errors)


def verdicts(raw: Raw) -> list[Verdict]:
    """All bars on one run."""
    summaries = summarise(raw)
    return [judge(bar, summaries) for bar in BARS]


def rows(raw: Raw) -> list[list[str]]:
    """The table of bars: side, work, bar, measured ratio with its range, outcome."""
    table = []
    for verdict in verdicts(raw):
        bar = verdict.bar
        sign = (">" if bar.strict else "≥") if BY_NAME[bar.scenario].higher_is_better else "≤"
        against = bar.against[0] if len(bar.against) == 1 else "best of " + ", ".join(bar.against)
        against += f" ({verdict.reference})" if verdict.reference and len(bar.against) > 1 else ""
        against += f", {BY_NAME[bar.over].title}" if bar.over else ""
        outcome = verdict.outcome + (STRADDLES if verdict.straddles else "")
        work = BY_NAME[bar.scenario].title
        table.append([bar.side, work, f"{sign} {bar.factor:.2f} × {against}", str(verdict.ratio), outcome])
    return table


def text(raw: Raw) -> str:
    """The bars for a terminal."""
    found = verdicts(raw)
    outcomes = [verdict.outcome for verdict in found]
    passed, missed = outcomes.count("passed"), sum(outcome.startswith("missed") for outcome in outcomes)
    disturbed = sum(summary.disturbed for summary in summarise(raw).values())
    straddling = sum(verdict.straddles for verdict in found)
    note = f"; {straddling} bars are within the range of what was measured" if straddling else ""
    note += f"; {disturbed} measurements were disturbed by other load" if disturbed else ""
    table = tabulate(rows(raw), headers=["side", "work", "bar", "measured", ""], disable_numparse=True)
    return f"{table}\n{passed} passed, {missed} missed, {outcomes.count('not measured')} not measured{note}"
