# SPDX-License-Identifier: Apache-2.0
"""The machine as /proc shows it: what it is, what else it is doing, where memory went, where threads may run."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.lab import CONGESTION_CONTROL

PROC = Path("/proc")
KTHREADD = 2
TICKS = os.sysconf("SC_CLK_TCK")
DEPTH = 64  # of the tree of processes; parents are read one after another, and might form a circle


@dataclass(frozen=True)
class ProcessTimes:
    """One process: its parent, and the CPU ticks of itself and of the children that it waited for."""

    parent: int
    ticks: int


def parse_stat(text: str) -> ProcessTimes:
    """Parse /proc/PID/stat (proc_pid_stat(5)); the command in parentheses may hold anything."""
    fields = text.rpartition(")")[2].split()
    return ProcessTimes(parent=int(fields[1]), ticks=sum(map(int, fields[11:15])))


def processes() -> dict[int, ProcessTimes]:
    """All processes by pid; those that end meanwhile are left out."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                found[int(entry.name)] = parse_stat((entry / "stat").read_text())
    return found


def family(root: int, everyone: dict[int, ProcessTimes]) -> set[int]:
    """`root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid, process in everyone.items():
        children.setdefault(process.parent, []).append(pid)
    found, queue = set(), [root]
    while queue:
        pid = queue.pop()
        found.add(pid)
        queue += children.get(pid, [])
    return found


def foreign_ticks(everyone: dict[int, ProcessTimes], ours: set[int]) -> int:
    """CPU ticks so far of all that is not ours and not the kernel's threads, which work for us too.

    Ticks of a child move to its parent when it is reaped, so the sum only grows, except for our own ancestors: these
    get ours, hence they are left out.
    """
    excluded = ours | family(KTHREADD, everyone) | ancestors(os.getpid(), everyone)
    return sum(process.ticks for pid, process in everyone.items() if pid not in excluded)


def ancestors(pid: int, everyone: dict[int, ProcessTimes]) -> set[int]:
    """The parent of `pid`, its parent, and so on."""
    found: set[int] = set()
    while pid in everyone and everyone[pid].parent not in found:
        pid = everyone[pid].parent
        found.add(pid)
    return found


def foreign_seconds(everyone: dict[int, ProcessTimes]) -> float:
    """CPU seconds so far of processes that this one did not start."""
    return foreign_ticks(everyone, family(os.getpid(), everyone)) / TICKS


def seconds_below(roots: Mapping[int, str], everyone: dict[int, ProcessTimes]) -> dict[str, float]:
    """CPU seconds so far, by name, of the processes in `roots` (pid: name) and of all their descendants."""
    found = dict.fromkeys(roots.values(), 0.0)
    for pid, process in everyone.items():
        root, seen = pid, 0
        while root not in roots and root in everyone and seen < DEPTH:
            root, seen = everyone[root].parent, seen + 1
        if root in roots:
            found[roots[root]] += process.ticks / TICKS
    return found


def proportional_memory(pids: Iterable[int]) -> int:
    """Bytes of memory of processes, shared pages divided among those who share (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+)", (PROC / str(pid) / "smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
    return total


@contextlib.contextmanager
def pinned(pids: Iterable[int], cpu: int) -> Iterator[None]:
    """Keep all threads of some processes on one core for a while; each gets back the cores that it had."""
    before: dict[int, set[int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in (PROC / str(pid) / "task").iterdir():
                with contextlib.suppress(OSError):
                    before[int(task.name)] = os.sched_getaffinity(int(task.name))
                    os.sched_setaffinity(int(task.name), {cpu})
    try:
        yield
    finally:
        for thread, cpus in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, cpus)


def describe() -> dict[str, str | int]:
    """What is measured on."""
    info = (PROC / "cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "congestion_control": CONGESTION_CONTROL,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],  # descriptors of one process
    }


def neighbours_refused() -> int:
    """How often so far the kernel had no room for one more neighbour: all network namespaces share one table a family,
    and packets to whoever is not in it are lost."""
    refused = 0
    for name in ("arp_cache", "ndisc_cache"):
        with contextlib.suppress(OSError, ValueError):
            head, *rows = (PROC / "net" / "stat" / name).read_text().splitlines()
            column = head.split().index("table_fulls")
            refused += sum(int(row.split()[column], 16) for row in rows)  # one of each CPU
    return refused
