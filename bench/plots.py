# SPDX-License-Identifier: Apache-2.0
"""Plots of a run, as SVG: one panel per scenario, one bar per side, whiskers from the worst round to the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import bars, two_nodes
from bench.bars import Raw, Summary
from bench.peers import SIDES, Side
from bench.scenarios import BY_NAME, SCENARIOS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS: Final = {"mesh-kernel": "#0b6fb8", "mesh-proxy": "#e07b00"}
OTHER: Final = "#b9bec4"
YARDSTICK: Final = "#5b6168"
HIDDEN: Final = ("-1000", "-fresh")  # ends of the names of sides that are in tables only
COLUMNS: Final = 3
Sides = Sequence[type[Side]]
Summaries = Mapping[tuple[str, str], Summary]


def colour(side: str) -> str:
    """Ours stand out, plain routing is dark, the others are one grey."""
    if side.startswith("plain"):
        return YARDSTICK
    return next((shade for ours, shade in OURS.items() if side.startswith(ours)), OTHER)


def panel(axes: Axes, summaries: Summaries, name: str, *, cpu: bool, sides: Sides) -> None:
    """One scenario: the median of each side, or its CPU per operation."""
    known = [side for side in sides if not side.name.endswith(HIDDEN)]
    shown = [side for side in known if usable(summaries.get((side.name, name)), cpu=cpu)]
    values = [number(summaries[side.name, name], cpu=cpu) for side in shown]
    axes.barh([side.label for side in shown], values, color=[colour(side.name) for side in shown], height=0.72)
    if yardstick := [value for side, value in zip(shown, values, strict=True) if side.name.startswith("plain")]:
        axes.axvline(yardstick[0], color=YARDSTICK, linewidth=0.8, linestyle=":")
    plain = next((summaries[side.name, name] for side in shown if side.name.startswith("plain")), None)
    for row, (side, value) in enumerate(zip(shown, values, strict=True)):
        summary = summaries[side.name, name]
        if not cpu and math.isfinite(summary.high):
            axes.plot([summary.low, summary.high], [row, row], color="#222222", linewidth=1)
        text = f" {value:,.3g}" if value < 1000 else f" {value:,.0f}"
        ratio = by_round(summary, plain, cpu=cpu).median if plain else math.nan
        text += "" if math.isnan(ratio) else f" ({ratio:.2f})"
        end = value if cpu or not math.isfinite(summary.high) else summary.high
        axes.annotate(text + (" errors" if summary.errors else ""), (end, row), va="center", size=7)
    scenario = BY_NAME[name]
    better = "less is better" if cpu or not scenario.higher_is_better else "more is better"
    unit = ("CPU µs per MB" if scenario.metric == "gbit" else "CPU µs per operation") if cpu else scenario.unit
    axes.set_title(f"{scenario.title}\n{unit}, {better}", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def number(summary: Summary, *, cpu: bool) -> float:
    """What a panel shows of a summary."""
    return summary.cpu if cpu else summary.median


def by_round(summary: Summary, plain: Summary, *, cpu: bool) -> bars.Ratio:
    """The ratio to the yardstick."""
    return bars.paired(summary.costs, plain.costs) if cpu else bars.paired(summary.values, plain.values)


def usable(summary: Summary | None, *, cpu: bool) -> bool:
    """Whether there is a number to show."""
    return summary is not None and math.isfinite(number(summary, cpu=cpu))


def figure(raw: Raw, names: Sequence[str], path: Path, *, cpu: bool = False, sides: Sides = SIDES) -> None:
    """Panels for some scenarios, into one SVG. Equal data gives an equal file."""
    import matplotlib as mpl  # noqa: PLC0415 -- not needed to measure, nor to test

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "mesh"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = math.ceil(len(names) / COLUMNS)
    canvas, grid = plt.subplots(rows, COLUMNS, figsize=(12, 2.5 * rows), squeeze=False)
    summaries = bars.summarise(raw)
    cells: list[Any] = list(grid.flat)
    for axes, name in zip(cells, names, strict=False):
        panel(axes, summaries, name, cpu=cpu, sides=sides)
    for axes in cells[len(names) :]:
        axes.set_visible(False)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    plt.close(canvas)


def draw(raw: Raw, directory: Path) -> list[str]:
    """All plots of a run; returns their file names."""
    directory.mkdir(parents=True, exist_ok=True)
    measured = {run["scenario"] for run in raw["runs"]}
    names = [scenario.name for scenario in SCENARIOS if scenario.name in measured and not scenario.beside]
    figure(raw, names, directory / "work.svg")
    figure(raw, names, directory / "cpu.svg", cpu=True)
    ends = {side.name for side in two_nodes.SIDES}
    measured = {run["scenario"] for run in raw["runs"] if run["side"] in ends}
    shown = [name for name in two_nodes.SCENARIOS if name in measured]
    if not shown:
        return ["work.svg", "cpu.svg"]
    figure(raw, shown, directory / "two-nodes.svg", sides=two_nodes.SIDES)
    return ["work.svg", "cpu.svg", "two-nodes.svg"]
