# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 -- the multiplication sign is meant
"""RESULTS.md and its plots from raw data. `python -m bench.report [RAW] [--into DIRECTORY | --publish]`.

Without arguments: the latest run, into bench/out. `--publish`: into the repository, README's figures included.
Every number is a median over rounds, or says what it is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from bench import bars, plots, readme, scale_report, two_nodes
from bench.bars import PERCENTILES, Raw, Summary
from bench.cluster import ALL, KINDS
from bench.lab import OUT
from bench.memory import HELD
from bench.peers import SIDES, Side
from bench.scenarios import BY_NAME, SCENARIOS, STRESS

EVERYONE: Final = (*SIDES, *two_nodes.SIDES)
LABELS: Final = {side.name: side.label for side in EVERYONE}
HERE: Final = Path(__file__).parent
README: Final = HERE.parent / "README.md"
BEGIN, END = "<!-- generated:results -->\n", "<!-- /generated -->"
YARDSTICK: Final = "plain"
YARDSTICK_TWO: Final = "plain-2"
METHOD = """\
Client, node and four backends are network namespaces joined by veth pairs on one machine. All sides are up at once,
each between a client and backends of its own, and take turns: in each round, for one scenario after another, every
side is measured once, in random order, for half a second or so. Figures are medians over the rounds. A ratio is the
median of the ratios of what two sides did in the same round, seconds apart, because the machine drifts by more than
sides differ; its range is what 5 to 95 % of resampled sets of rounds give (bootstrap). In brackets: the ratio to
plain routing, and its range. Clients, sides and backends share the machine's cores, so a figure is what is left for
the work after the side took its part: compare ratios, not absolute numbers. All sides use the same congestion
control. What fails is counted and listed. Configurations, with their reasons, are in `bench/peers/`; `make bench`
repeats all of it.
"""


MEMORY = """\
MiB: processes of the side / its eBPF maps, which do not grow with connections / objects of the kernel that came with
the connections, those of clients and backends included (plain routing has only these). A process may have {files:,}
descriptors. Clients and backends are therefore several processes; a proxy, which needs two descriptors for each
connection, is measured with what the limit leaves it. Start: from nothing to the first connection that is served.
"""
IDLE = """\
All sides are up while one is measured. What each of them used meanwhile, its backends included:
"""
EFFECTS = """\
ms from telling the daemon to the beginning of the last new connection that still got the old backend; median / worst.
"""
TWO = """\
The client calls one node, all backends are on another. Ratios to plain routing through both nodes. The masquerade costs
the client's address; proxies tell it by the PROXY protocol where a service asks for it; the tunnel keeps it.
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


def sides_of(raw: Raw, sides: Sequence[type[Side]] = SIDES) -> list[str]:
    """The sides that were measured, in the order of bench.peers."""
    measured = {run["side"] for run in raw["runs"]}
    return [side.name for side in sides if side.name in measured]


Cell = Callable[[Summary, Summary | None], str]


def grid(raw: Raw, scenarios: Sequence[str], cell: Cell, *, two: bool = False) -> str:
    """A table of sides by scenarios; `cell` gets a summary and the yardstick's. `two`: the sides with two nodes."""
    summaries = bars.summarise(raw)
    sides, yardstick = (sides_of(raw, two_nodes.SIDES), YARDSTICK_TWO) if two else (sides_of(raw), YARDSTICK)
    present = [name for name in scenarios if any((side, name) in summaries for side in sides)]
    rows = []
    for side in sides:
        found = [summaries.get((side, name)) for name in present]
        cells = [
            cell(summary, summaries.get((yardstick, name))) if summary else ""
            for summary, name in zip(found, present, strict=True)
        ]
        if any(cells):
            rows.append([LABELS[side], *cells])
    units = {name: f", {BY_NAME[name].unit}" if cell is value_cell else "" for name in present}
    return table(rows, ["", *(f"{BY_NAME[name].title}{units[name]}" for name in present)])


def bracket(ratio: bars.Ratio) -> str:
    """A ratio behind the figure that it is about."""
    if math.isnan(ratio.median):
        return ""
    return f" ({ratio.median:.2f}" + ("" if math.isnan(ratio.low) else f", {ratio.low:.2f}–{ratio.high:.2f}") + ")"


def value_cell(summary: Summary, yardstick: Summary | None) -> str:
    """Median, ratio to the yardstick with its range (spread where there is no such ratio), errors if there were any."""
    ratio = bracket(bars.paired(summary.values, yardstick.values)) if yardstick and yardstick is not summary else ""
    spread = "" if ratio or math.isnan(summary.spread) or summary.rounds < 2 else f" ±{summary.spread / 2:.0%}"
    errors = f", **{summary.errors:,} errors**" if summary.errors else ""
    disturbed = " *" if summary.disturbed else ""
    return f"{number(summary.median)}{ratio}{spread}{errors}{disturbed}"


def cpu_cell(summary: Summary, yardstick: Summary | None) -> str:
    """µs of CPU per operation or MB, and its ratio to the yardstick's."""
    ratio = bars.paired(summary.costs, yardstick.costs).median if yardstick else math.nan
    return number(summary.cpu) + ("" if math.isnan(ratio) else f" ({ratio:.2f})")


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
            share = bars.paired(under.values, before.values).median if under and before else math.nan
            cells.append(f"{share:.0%}, {under.errors:,} errors" if under and not math.isnan(share) else "")
        if any(cells):
            rows.append([LABELS[side], *cells])
    return table(rows, ["share kept of what it does alone", *(BY_NAME[name].title for name in STRESS)])


WIDE: Final = ("mesh-kernel", "mesh-proxy", "nft")  # each also beside 999 services of ten backends: NAME-1000


def flat(raw: Raw) -> str:
    """What is left with 999 other services."""
    summaries = bars.summarise(raw)
    names = ("connections", "requests")
    rows = []
    for side in WIDE:
        pairs = [(summaries.get((f"{side}-1000", name)), summaries.get((side, name))) for name in names]
        ratios = [str(bars.paired(wide.values, alone.values)) for wide, alone in pairs if wide and alone]
        if len(ratios) == len(names) and all(ratios):
            rows.append([LABELS[side], *ratios])
    return table(rows, ["", *(BY_NAME[name].title for name in names)])


def idle(raw: Raw) -> str:
    """What sides cost while others were measured."""
    cells = [
        [LABELS[row["side"]], f"{row['cpu'] / row['seconds']:.2%}"] for row in raw.get("idle", ()) if row["seconds"]
    ]
    return table(cells, ["", "of one core"])


def memory(raw: Raw) -> str:
    """Memory by side and by open connections."""
    levels = sorted({level_of(row) for row in raw["memory"]})
    rows = []
    for side in sides_of(raw):
        found = {level_of(row): row for row in raw["memory"] if row["side"] == side}
        starts = [row["seconds"] for row in raw["starts"] if row["side"] == side]
        start = f"{statistics.median(starts):.2f}" if starts else ""
        if found or starts:
            cells = (memory_cell(found[level]) if level in found else "" for level in levels)
            rows.append([LABELS[side], *cells, start])
    return table(rows, ["", *(f"{level:,} connections" for level in levels), "start, s"])


def level_of(row: Mapping[str, int]) -> int:
    """The level of bench.memory that a row stands for: what the limit left of one counts as that one."""
    return min((level for level in (0, *HELD) if level >= row["level"]), default=row["level"])


def memory_cell(row: Mapping[str, int]) -> str:
    """One side at one number of connections."""
    short = "" if row["open"] == level_of(row) else f" ({row['open']:,} open)"
    return " / ".join(number(row[part] / 2**20) for part in ("process", "maps", "kernel")) + short


def effects(raw: Raw) -> str:
    """How soon a change shows."""
    changes = {"file": "file and SIGHUP", "drain": "mesh drain"}
    rows = []
    for side in dict.fromkeys(row["side"] for row in raw["effects"]):
        found = {row["change"]: row for row in raw["effects"] if row["side"] == side}
        rows.append([LABELS[side], *(effect_cell(found[name]) if name in found else "" for name in changes)])
    return table(rows, ["", *changes.values()])


def effect_cell(row: Mapping[str, Any]) -> str:
    """Median and worst of one kind of change, and connections that failed."""
    failed = sum(row["errors"].values())
    errors = f", **{failed:,} errors**" if failed else ""
    return f"{statistics.median(row['seconds']) * 1e3:.1f} / {max(row['seconds']) * 1e3:.1f}{errors}"


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
    how = f"{settings['rounds']} rounds, {settings['duration']} s for a measurement"
    how += f", congestion control {machine['congestion_control']}"
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


CLUSTER = """\
A swarm of five nodes on this machine, one change after another: ms from Docker's announcement, as a watcher next to
the agents hears it, until the last of the five tables has the change. At most 100 at the 99th percentile is asked
for. A new task gets flows once its own node has found that it answers, or after a second: that waits for the task.
"""


def cluster(raw: Raw) -> str:
    """How long changes take to the last node's table."""
    rows = []
    for row in raw["cluster"]:
        what = KINDS.get(row["kind"], ALL)
        rows.append([row["engine"], what, str(row["changes"]), *(number(row[key]) for key in ("p50", "p99", "max"))])
    return table(rows, ["engine", "change", "changes", "ms, p50", "p99", "most"])


def functions(raw: Raw) -> list[str]:
    """The parts about what is no traffic."""
    parts = []
    if raw["programs"]:
        parts += ["## eBPF programs", "ns per packet, what an empty program costs subtracted.", programs(raw)]
    if raw["guest"]:
        parts += ["## Docker's own mesh", GUEST, guest(raw)]
    if raw["control"]:
        parts += ["## Control plane", control(raw)]
    if raw.get("cluster"):
        parts += ["## Changes across a swarm", CLUSTER, cluster(raw)]
    if raw.get("scale"):
        parts += [
            "## A large swarm",
            scale_report.TEXT,
            table(scale_report.rows(raw["scale"]), scale_report.HEADERS),
            scale_report.TENFOLD,
        ]
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
    parts += [f"![{Path(name).stem}]({name})" for name in pictures if "two-nodes" not in name]
    parts += ["## The bars", table(bars.rows(raw), ["side", "work", "bar", "measured", ""])]
    parts += ["## Throughput", grid(raw, rates, value_cell)]
    parts += ["## Latency", "µs, p50 / p99 / p99.9.", grid(raw, timed, latency_cell)]
    if any(run["scenario"] in STRESS for run in raw["runs"]):
        parts += ["## Under stress", stress(raw)]
    if any(run["side"].endswith("-1000") for run in raw["runs"]):
        parts += ["## Flat in scale", "With 999 more services of ten backends each, relative to none.", flat(raw)]
    parts += ["## CPU", "µs of the whole machine's CPU per operation; per MB in bulk transfers."]
    parts += [grid(raw, [s.name for s in SCENARIOS if not s.beside], cpu_cell)]
    if sides_of(raw, two_nodes.SIDES):
        parts += ["## Two nodes", TWO, *(f"![two nodes]({name})" for name in pictures if "two-nodes" in name)]
        parts += [grid(raw, two_nodes.SCENARIOS, value_cell, two=True)]
    if raw["effects"]:
        parts += ["## From a change to its effect", EFFECTS, effects(raw)]
    if raw["memory"] or raw["starts"]:
        parts += ["## Memory and start", MEMORY.format(files=raw["machine"].get("files", 0)), memory(raw)]
    parts += functions(raw)
    if raw.get("idle"):
        parts += ["## While another side is measured", IDLE, idle(raw)]
    parts += ["± is half the distance between the best and the worst round. * other load disturbed some of the rounds."]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write(raw: Raw, directory: Path) -> Path:
    """RESULTS.md and its plots into a directory; the path of the former."""
    pictures = plots.draw(raw, directory / "plots")
    path = directory / "RESULTS.md"
    path.write_text(markdown(raw, [f"plots/{name}" for name in pictures]))
    return path


def pictures_of(text: str) -> list[str]:
    """The pictures that a report shows."""
    return re.findall(r"^!\[[^]]*\]\(([^)]+)\)$", text, re.MULTILINE)


def publish(raw: Raw) -> None:
    """Make a run the one that is shown: bench/results.json, bench/RESULTS.md, its plots, and README's figures."""
    raw = {**raw, "missing": {name: why.partition("\n")[0] for name, why in raw["missing"].items()}}
    (HERE / "results.json").write_text(json.dumps(raw, separators=(",", ":")) + "\n")
    write(raw, HERE)
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README} has no {BEGIN.strip()}")
    README.write_text(before + begin + readme.block(raw) + end + after)


def main(argv: Sequence[str]) -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__)
    parser.add_argument("raw", nargs="?", type=Path, default=OUT / "latest.json")
    parser.add_argument("--into", type=Path, default=OUT, help="where RESULTS.md and plots/ go")
    parser.add_argument("--publish", action="store_true", help="into bench/, with the raw data, and into README.md")
    options = parser.parse_args(argv)
    if not options.raw.exists():
        print(f"bench.report: {options.raw}: not there (run `make bench` first)", file=sys.stderr)
        return 1
    raw = json.loads(options.raw.read_text())
    if options.publish:
        publish(raw)
    else:
        print(write(raw, options.into))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
