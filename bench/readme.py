# SPDX-License-Identifier: Apache-2.0
"""README's figures from raw data: a table of ratios, and a few sentences. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from tabulate import tabulate

from bench import bars, two_nodes
from bench.bars import Raw, Summary
from bench.peers import SIDES
from bench.scenarios import BY_NAME

SHOWN: Final = ("connections", "requests", "pingpong", "down1", "up8", "datagrams")
HEADERS: Final = ("new conn/s", "req/s", "ping-pong p50", "bulk down", "bulk up, 8", "UDP echo/s")
LABELS: Final = {side.name: side.label for side in (*SIDES, *two_nodes.SIDES)}
OURS: Final = ("mesh-kernel", "mesh-proxy")


def block(raw: Raw) -> str:
    """Everything between README's markers."""
    machine = raw["machine"]
    settings = raw["settings"]
    parts = [
        "Ratios to plain routing without a balancer, of measurements seconds apart: medians of up to "
        f"{settings['rounds']} rounds, "
        f"on {machine['cores']} cores shared by client, node and backends (Linux {machine['kernel']}).\n"
        "Higher is better, except for ping-pong.\n"
        "[bench/RESULTS.md](bench/RESULTS.md) has numbers, spreads and configurations; `make bench` repeats the run.",
        single(raw),
        *sentences(raw),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def single(raw: Raw) -> str:
    """The table of one node."""
    summaries = bars.summarise(raw)
    rows = []
    for side in SIDES:
        cells = [ratio(summaries.get((side.name, name)), summaries.get(("plain", name))) for name in SHOWN]
        if side.name == "plain":
            cells = [absolute(summaries.get(("plain", name)), name) for name in SHOWN]
        if any(cells) and not side.name.endswith(("-1000", "-fresh")):
            label = f"**{side.label}**" if side.name in OURS else side.label
            rows.append([label, *cells])
    return tabulate(rows, headers=["", *HEADERS], tablefmt="github", disable_numparse=True)


def ratio(summary: Summary | None, yardstick: Summary | None) -> str:
    """The ratio of two sides in one scenario; empty where there is none."""
    if not summary or not yardstick:
        return ""
    value = bars.paired(summary.values, yardstick.values).median
    if math.isnan(value) or math.isinf(value):
        return ""
    return f"{value:.2f}" + (" (errors)" if summary.errors else "")


def absolute(summary: Summary | None, name: str) -> str:
    """What the yardstick itself came to."""
    if not summary or math.isinf(summary.median):
        return ""
    unit = BY_NAME[name].unit
    if unit.endswith("/s") and summary.median >= 1000:
        return f"1 = {summary.median / 1000:.1f} k" if unit != "Gbit/s" else f"1 = {summary.median:.1f} Gbit/s"
    return f"1 = {summary.median:.1f} {unit.removesuffix(' p50')}"


def sentences(raw: Raw) -> list[str]:
    """What the table does not show."""
    verdicts = bars.verdicts(raw)
    found = [verdict.outcome for verdict in verdicts]
    passed, missed = found.count("passed"), sum(outcome.startswith("missed") for outcome in found)
    near = sum(verdict.straddles for verdict in verdicts)
    lines = [f"- Of the project's {passed + missed} performance bars {passed} are passed and {missed} missed"]
    lines[0] += f"; {near} lie within the measured range." if near else "."
    if raw["guest"]:
        ours = [row for name in SHOWN for row in raw["guest"] if (row["side"], row["scenario"]) == (OURS[0], name)]
        shown = ", ".join(f"{BY_NAME[row['scenario']].title} {row['ratio']:.1f}" for row in ours)
        lines.append(
            f"- Relative to Docker's own chain (DNAT, IPVS, SNAT), in an emulated guest, kernel engine: {shown}."
        )
    lines += two(raw)
    for row in raw["effects"]:
        if row["side"] == OURS[0] and row["change"] == "file":
            median, worst = statistics.median(row["seconds"]) * 1e3, max(row["seconds"]) * 1e3
            lines.append(f"- A change takes effect for new connections after {median:.0f} ms (worst: {worst:.0f}).")
    lines += scale(raw)
    programs = {(row["path"], row["flows"]): row["ns"] for row in raw["programs"]}
    paths = ("not ours", "ingress, stateless slot", "reply")
    if all((path, 1) in programs for path in paths):
        shown = ", ".join(f"{path} {programs[path, 1]:.0f}" for path in paths)
        lines.append(f"- The kernel engine's programs, ns per packet above an empty program: {shown}.")
    return ["\n".join(lines)]


def two(raw: Raw) -> Sequence[str]:
    """Two nodes."""
    summaries = bars.summarise(raw)
    names = ("connections", "requests", "down1")
    shown = []
    for side in two_nodes.SIDES[1:]:
        cells = [ratio(summaries.get((side.name, name)), summaries.get(("plain-2", name))) for name in names]
        if all(cells):
            shown.append(f"{side.label} {' / '.join(cells)}")
    if not shown:
        return []
    return [
        f"- To a backend on another node, relative to plain routing (conn/s / req/s / bulk down): {'; '.join(shown)}."
    ]


def scale(raw: Raw) -> Sequence[str]:
    """With 999 other services."""
    summaries = bars.summarise(raw)
    shown = []
    for side in OURS:
        cells = [ratio(summaries.get((f"{side}-1000", n)), summaries.get((side, n))) for n in SHOWN[:2]]
        if all(cells):
            shown.append(f"{LABELS[side]} {' / '.join(cells)}")
    return [f"- With 999 more services, relative to none (conn/s / req/s): {'; '.join(shown)}."] if shown else []
