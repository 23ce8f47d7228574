# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 -- the multiplication sign is meant
"""RESULTS.md and its plots from raw data. `python -m bench.report [RAW] [--into DIRECTORY]`.

Without arguments: the latest run, into bench/out. Every number is a median over rounds, or says what it is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from bench import bars, plots
from bench.bars import PERCENTILES, Raw, Summary
from bench.lab import OUT
from bench.peers import SIDES
from bench.scenarios import BY_NAME, SCENARIOS, STRESS

LABELS = {side.name: side.label for side in SIDES}
YARDSTICK = "plain"
METHOD = """\
Client, node and four backends are network namespaces joined by veth pairs on one machine; every side forwards between
the same two. Sides and scenarios run in random order, in rounds; the figures are medians over the rounds of one run, in
brackets the ratio to plain routing. Clients, sides and backends share the machine's cores, so a figure is what is left
for the work after the side took its part: compare ratios, not absolute numbers. All sides use the same congestion
control. What fails is counted and listed. Configurations, with their reasons, are in `bench/peers/`; `make bench`
repeats all of it.
"""


MEMORY = """\
Memory in MiB: of the side's processes / of the whole machine since it was idle (sockets of all ends included). Start:
from nothing to the first connection that is served.
"""


def number(value: float) -> str:
    """Three significant digits, or all of the integer part; thousands in groups."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def table(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    """A Markdown table."""
    return tabulate(list(rows), headers=list(headers), tablefmt="github", disable_numparse=True)


def sides_of(raw: Raw) -> list[str]:
    """The sides that were measured, in the order of bench.peers."""
    measured = {run["side"] for run in raw["runs"]}
    return [side.name for side in SIDES if side.name in measured]


Cell = Callable[[Summary, Summary | None], str]


def grid(raw: Raw, scenarios: Sequence[str], cell: Cell) -> str:
    """A table of sides by scenarios; `cell` gets a summary and the yardstick's."""
    summaries = bars.summarise(raw)
    present = [name for name in scenarios if any((side, name) in summaries for side in sides_of(raw))]
    rows = []
    for side in sides_of(raw):
        found = [summaries.get((side, name)) for name in present]
        cells = [
            cell(summary, summaries.get((YARDSTICK, name))) if summary else ""
            for summary, name in zip(found, present, strict=True)
        ]
        if any(cells):
            rows.append([LABELS[side], *cells])
    units = {name: f", {BY_NAME[name].unit}" if cell is value_cell else "" for name in present}
    return table(rows, ["", *(f"{BY_NAME[name].title}{units[name]}" for name in present)])


def value_cell(summary: Summary, yardstick: Summary | None) -> str:
    """Median, ratio to the yardstick, spread, and errors if there were any."""
    ratio = f" ({summary.median / yardstick.median:.2f})" if yardstick and yardstick.median else ""
    spread = "" if math.isnan(summary.spread) or summary.rounds < 2 else f" ±{summary.spread / 2:.0%}"
    errors = f", **{summary.errors:,} errors**" if summary.errors else ""
    disturbed = " *" if summary.disturbed else ""
    return f"{number(summary.median)}{ratio}{spread}{errors}{disturbed}"


def cpu_cell(summary: Summary, yardstick: Summary | None) -> str:
    """µs of CPU per operation or MB, and its ratio to the yardstick's."""
    ratio = f" ({summary.cpu / yardstick.cpu:.2f})" if yardstick and yardstick.cpu else ""
    return f"{number(summary.cpu)}{ratio}"


def latency_cell(summary: Summary, _: Summary | None) -> str:
    """The percentiles, µs."""
    return " / ".join(number(summary.latency.get(mark, math.nan)) for mark in PERCENTILES)


def stress(raw: Raw) -> str:
    """What is left of a side's own work while something happens beside it, and the errors."""
    summaries = bars.summarise(raw)
    rows = []
    for side in sides_of(raw):
        cells = []
        for name, alone in STRESS.items():
            under, before = summaries.get((side, name)), summaries.get((side, alone))
            known = under and before and before.median
            cells.append(f"{under.median / before.median:.0%}, {under.errors:,} errors" if known else "")
        if any(cells):
            rows.append([LABELS[side], *cells])
    return table(rows, ["share kept of what it does alone", *(BY_NAME[name].title for name in STRESS)])


def memory(raw: Raw) -> str:
    """Memory by side and by open connections, MiB: of its processes, and of the machine since it was idle."""
    levels = sorted({row["level"] for row in raw["memory"]})
    rows = []
    for side in sides_of(raw):
        found = {row["level"]: row for row in raw["memory"] if row["side"] == side}
        starts = [row["seconds"] for row in raw["starts"] if row["side"] == side]
        start = f"{statistics.median(starts):.2f}" if starts else ""
        if found or starts:
            cells = (memory_cell(found[level]) if level in found else "" for level in levels)
            rows.append([LABELS[side], *cells, start])
    return table(rows, ["", *(f"MiB, {level:,} connections" for level in levels), "s, start"])


def memory_cell(row: Mapping[str, int]) -> str:
    """One side at one number of connections."""
    short = "" if row["open"] == row["level"] else f", only {row['open']:,} were served"
    machine = f" / {number(row['machine'] / 2**20)}" if row["level"] else ""
    return f"{number(row['process'] / 2**20)}{machine}{short}"


def programs(raw: Raw) -> str:
    """Cost of the eBPF programs per packet."""
    return table(program_rows(raw["programs"]), PROGRAM_HEADERS)


PROGRAM_HEADERS: Final = ("path", "flows", "ns", "±", "budget", "verdicts")


def program_rows(costs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What bench_prog measured: path, flows, ns, spread, budget and whether it is kept, verdicts."""
    rows = []
    for cost in costs:
        budget = cost["budget_ns"]
        kept = "" if budget is None else f"≤ {budget:g}: {'kept' if cost['ns'] <= budget else 'missed'}"
        ns = [f"{cost['ns']:.0f}", f"{cost['spread_ns']:.0f}"]
        rows.append([cost["path"], f"{cost['flows']:,}", *ns, kept, cost["verdict"]])
    return rows


def control(raw: Raw) -> str:
    """Micro-benchmarks of the control plane (pytest-benchmark's JSON)."""
    rows = [
        [one["name"].removeprefix("test_").replace("_", " "), number(one["stats"]["median"] * 1e3)]
        for one in raw["control"]
    ]
    return table(rows, ["", "ms, median"])


def about(raw: Raw) -> str:
    """What was measured on, and with what."""
    machine = raw["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}"
    settings = raw["settings"]
    how = f"{settings['rounds']} rounds of {settings['duration']} s, congestion control {machine['congestion_control']}"
    versions = table([[LABELS[side], text] for side, text in raw["versions"].items()], ["side", "version"])
    missing = "".join(
        f"\nNot measured: {LABELS.get(side, side)}: {why.splitlines()[0]}.\n" for side, why in raw["missing"].items()
    )
    return f"{raw['began']}. {where}; {how}.\n\n{versions}\n{missing}"


GUEST = """\
In a QEMU guest with Debian's stock kernel, which has IPVS. All is emulated there, so only ratios to Docker's own mesh
(DNAT, firewall mark, IPVS, SNAT; one node) are kept; above 1 is better.
"""


def guest(raw: Raw) -> str:
    """Ratios to Docker's own mesh, as the guest measured them."""
    names = list(dict.fromkeys(row["scenario"] for row in raw["guest"]))
    rows = []
    for side in dict.fromkeys(row["side"] for row in raw["guest"]):
        found = {row["scenario"]: row for row in raw["guest"] if row["side"] == side}
        cells = [f"{found[name]['ratio']:.2f}" if name in found else "" for name in names]
        rows.append([LABELS[side], *cells])
    return table(rows, ["", *(BY_NAME[name].title for name in names)])


def functions(raw: Raw) -> list[str]:
    """The parts about what is no traffic."""
    parts = []
    if raw["programs"]:
        parts += ["## eBPF programs", "ns per packet, what an empty program costs subtracted.", programs(raw)]
    if raw["guest"]:
        parts += ["## Docker's own mesh", GUEST, guest(raw)]
    if raw["control"]:
        parts += ["## Control plane", control(raw)]
    return parts


def markdown(raw: Raw, pictures: Sequence[str] = ()) -> str:
    """The whole report."""
    rates = [s.name for s in SCENARIOS if s.higher_is_better and not s.beside]
    timed = [s.name for s in SCENARIOS if s.metric.startswith("p") and s.metric != "per_second"]
    parts = [
        "# Results",
        "<!-- Generated by `python -m bench.report` from raw data: do not edit. -->",
        about(raw),
        METHOD,
    ]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    parts += ["## The bars", table(bars.rows(raw), ["side", "work", "bar", "measured", ""])]
    parts += ["## Throughput", grid(raw, rates, value_cell)]
    parts += ["## Latency", "µs, p50 / p99 / p99.9.", grid(raw, timed, latency_cell)]
    if any(run["scenario"] in STRESS for run in raw["runs"]):
        parts += ["## Under stress", stress(raw)]
    parts += ["## CPU", "µs of the whole machine's CPU per operation; per MB in bulk transfers."]
    parts += [grid(raw, [s.name for s in SCENARIOS if not s.beside], cpu_cell)]
    if raw["memory"] or raw["starts"]:
        parts += ["## Memory and start", MEMORY]
        parts += [memory(raw)]
    parts += functions(raw)
    parts += ["± is half the distance between the best and the worst round. * other load disturbed some of the rounds."]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__)
    parser.add_argument("raw", nargs="?", type=Path, default=OUT / "latest.json")
    parser.add_argument("--into", type=Path, default=OUT, help="where RESULTS.md and plots/ go")
    options = parser.parse_args(argv)
    if not options.raw.exists():
        print(f"bench.report: {options.raw}: not there (run `make bench` first)", file=sys.stderr)
        return 1
    raw = json.loads(options.raw.read_text())
    pictures = plots.draw(raw, options.into / "plots")
    (options.into / "RESULTS.md").write_text(markdown(raw, [f"plots/{name}" for name in pictures]))
    print(options.into / "RESULTS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
