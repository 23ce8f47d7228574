# SPDX-License-Identifier: Apache-2.0
"""What `mesh bench` found, as tables and histograms for a terminal, and as JSON."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import click
from tabulate import tabulate

from mesh.cli.bench.load import Tally
from mesh.cli.output import Json

MARKS: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
BUSY: Final = 0.85  # of its core: from here on the client is what limits
STEPS: Final = 4  # histogram rows per factor of ten, at least
ROWS: Final = 14  # histogram rows at most


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; NaN of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def summary(tally: Tally) -> Json:
    """One side of one phase. Times in milliseconds, received in bytes."""
    ordered = sorted(tally.latency)
    latency = {name: percentile(ordered, share) for name, share in MARKS.items()} | {"max": percentile(ordered, 1.0)}
    seconds = tally.seconds or math.inf
    return {
        "operations": tally.operations,
        "seconds": round(tally.seconds, 3),
        "per_second": round(tally.operations / seconds, 1),
        "received": tally.received,
        "latency_ms": {name: _ms(value) for name, value in latency.items()} if ordered else {},
        "connect_ms": {"p50": _ms(percentile(sorted(tally.connect), 0.5))} if tally.connect else {},
        "errors": dict(tally.errors),
        "answers": dict(tally.answers),
        "client_busy": round(tally.cpu / seconds, 2),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def phase(title: str, sides: Mapping[str, Tally]) -> None:
    """One phase: a column per side, the ratio of the first to the second, and a histogram."""
    shown = {name: summary(tally) for name, tally in sides.items()}
    both = len(shown) > 1
    click.echo(f"\n{title}")
    rows: list[list[str]] = []

    def row(name: str, values: list[float], form: str) -> None:
        if any(value and not math.isnan(value) for value in values):
            ratio = f"{values[0] / values[1]:.2f}" if both and values[1] else ""
            rows.append([name, *(format(value, form) for value in values), *([ratio] if both else [])])

    every = list(shown.values())
    row("per second", [one["per_second"] for one in every], ",.0f")
    row("MB/s", [one["received"] / 1e6 / (one["seconds"] or math.inf) for one in every], ",.2f")
    row("connect p50, ms", [one["connect_ms"].get("p50", math.nan) for one in every], ".3f")
    for mark in (*MARKS, "max"):
        row(f"{mark}, ms", [one["latency_ms"].get(mark, math.nan) for one in every], ".3f")
    rows.append(["done", *(f"{one['operations']:,}" for one in every), *([""] if both else [])])
    for name in sorted({name for one in every for name in one["answers"]}):
        rows.append([f"status {name}", *(f"{one['answers'].get(name, 0):,}" for one in every)])
    for name in sorted({name for one in every for name in one["errors"]}):
        rows.append([f"ERROR {name}", *(f"{one['errors'].get(name, 0):,}" for one in every)])
    headers = ["", *shown, *([f"{'/'.join(shown)}"] if both else [])]
    aligned = ("left", *["right"] * (len(headers) - 1))
    click.echo(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=aligned))
    for line in histogram({name: tally.latency for name, tally in sides.items()}):
        click.echo(line)


def histogram(sides: Mapping[str, Sequence[float]]) -> list[str]:
    """Latencies in classes that grow by a constant factor, a column of bars per side, each to its own scale."""
    values = [value for latency in sides.values() for value in latency if value > 0]
    if not values:
        return []
    low, high = math.log10(min(values)), math.log10(max(values))
    step = max(1 / STEPS, (high - low) / (ROWS - 1))
    first = math.floor(low / step)
    count = math.floor(high / step) - first + 1
    counts = {name: [0] * count for name in sides}
    for name, latency in sides.items():
        for value in latency:
            if value > 0:
                counts[name][math.floor(math.log10(value) / step) - first] += 1
    width = max(10, (min(shutil.get_terminal_size().columns, 110) - 24) // len(sides) - 10)
    lines = ["", "  from, ms  " + "".join(f"{name:<{width + 9}}" for name in sides)]
    for n in range(count):
        cells = []
        for name, latency in sides.items():
            share = counts[name][n] / len(latency) if latency else 0.0
            top = max(counts[name]) or 1
            cells.append(f"{share:6.1%} {bar(counts[name][n] / top, width):<{width}}  ")
        lines.append(f"  {10 ** ((first + n) * step) * 1e3:8.3f}  {''.join(cells)}".rstrip())
    return lines


def bar(share: float, width: int) -> str:
    """A bar of up to `width` characters, in eighths where the terminal can show them."""
    if "utf" not in (sys.stdout.encoding or "").lower():
        return "#" * max(round(share * width), share > 0)
    eighths = max(round(share * width * 8), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def spread(counts: Counter[str], expected: Mapping[str, float], how: str) -> None:
    """Who got how many of the new connections; `expected` are the shares by weight, where known."""
    total = counts.total()
    click.echo(f"\ndistribution over backends ({how})")
    names = sorted({*counts, *expected}, key=lambda name: (-counts[name], name))
    top = max(counts.values(), default=1)
    for name in names:
        share = counts[name] / total if total else 0.0
        meant = f"of {expected[name]:5.1%} by its slots  " if name in expected else ""
        click.echo(f"  {name:<24} {counts[name]:8,}  {share:6.1%}  {meant}{bar(counts[name] / top, 30)}".rstrip())


def advice(sides: Mapping[str, Tally]) -> list[str]:
    """What a reader has to know to read the figures right."""
    busy = [name for name, tally in sides.items() if tally.seconds and tally.cpu / tally.seconds > BUSY]
    if not busy:
        return []
    return [
        f"This client's one core was busy ({' and '.join(busy)}): more would be possible than it could ask for.",
        "Latencies include its own queue; fewer --connections show them without.",
    ]
