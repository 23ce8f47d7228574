# SPDX-License-Identifier: Apache-2.0
"""Memory of a side with no, ten thousand and a hundred thousand connections open.

What a side needs is in three places: its processes, its eBPF maps, and the kernel's objects (sockets, files, connection
tracking; those of clients and backends are among them, so compare with plain routing).
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from bench import machine
from bench.lab import BACKENDS, CLIENTS, ECHO_PORT, OUT, Lab, LabError
from bench.peers import Side

HELD: Final = (10_000, 100_000)  # open connections at which memory is read
SPARE: Final = 2048  # descriptors that a process needs for other things
GRACE: Final = 60.0  # seconds for opening, and for closing, all connections
NONE: Final[Mapping[str, int]] = {}
SLABINFO: Final = Path("/proc/slabinfo")


def held_levels(files: int, *, sockets: bool) -> list[int]:
    """HELD, or what a limit of `files` descriptors leaves to a side of which each connection takes two.

    Clients and backends are several processes where one may not have enough; a proxy is what it is.
    """
    possible = (files - SPARE) // 2 if sockets else max(HELD) if files > SPARE else 0
    return sorted({min(level, possible) for level in HELD if min(level, possible) > 0})


def kernel_objects() -> int:
    """Bytes of kernel objects in use, whole machine (slabinfo(5)); 0 where that cannot be read."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in SLABINFO.read_text().splitlines()[2:]:
            fields = line.split()
            total += int(fields[1]) * int(fields[3])
    return total


def map_bytes(pids: Iterable[int]) -> int:
    """Bytes of the eBPF maps that processes hold, each counted once (fdinfo)."""
    found: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
                with contextlib.suppress(OSError):
                    text = entry.read_text()
                    size = re.search(r"^memlock:\s+(\d+)", text, re.MULTILINE)
                    number = re.search(r"^map_id:\s+(\d+)", text, re.MULTILINE)
                    if size and number:
                        found[number[1]] = int(size[1])
    return sum(found.values())


def row(
    side: Side, pids: Iterable[int], level: int = 0, opened: int = 0, objects: int = 0, errors: Mapping[str, int] = NONE
) -> dict[str, Any]:
    """One measurement. `objects`: kernel_objects() when nothing was open. Bytes."""
    known = list(pids)
    return {
        "side": side.name,
        "level": level,
        "open": opened,
        "process": machine.proportional_memory(known),
        "maps": map_bytes(known),
        "kernel": max(0, kernel_objects() - objects) if level else 0,
        "errors": dict(errors),
    }


@contextlib.contextmanager
def more_backends(lab: Lab, level: int, files: int) -> Iterator[None]:
    """Further processes of each backend, where one may not have as many descriptors as it would get connections."""
    needed = -(-level * 5 // 4 // len(BACKENDS) // (files - SPARE))  # a quarter more: the kernel spreads by hashing
    extra = [lab.start_backend(i) for i in range(len(BACKENDS)) for _ in range(needed - 1)]
    try:
        yield
    finally:
        for process in extra:
            lab.stop(process)


def hold(lab: Lab, side: Side, level: int) -> tuple[int, dict[str, int], list[subprocess.Popen[Any]]]:
    """Open connections, by as many processes as it takes. Returns how many there are, errors, and the processes."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE
    shares = [min(room, level - begun) for begun in range(0, level, room)]
    ends = [word for target in side.targets(ECHO_PORT) for word in ("--target", target)]
    loads = []
    for n, share in enumerate(shares):
        own = CLIENTS[n % len(CLIENTS) :: len(shares)] or CLIENTS
        argv = (str(OUT / "load"), "hold", "--connections", str(share), *ends)
        sources = [word for address in own for word in ("--source", address)]
        loads.append(lab.start("client", *argv, *sources, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    opened, errors = 0, Counter[str]()
    for load in loads:
        assert load.stdout
        line = load.stdout.readline()
        if not line:
            raise LabError("a client that should hold connections has ended")
        told = json.loads(line)
        opened += told["operations"]
        errors.update(told["errors"])
    return opened, dict(errors), loads


def measure(lab: Lab, side: Side, pids: Iterable[int]) -> list[dict[str, Any]]:
    """A row for each level that is possible here."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    rows = []
    known = list(pids)
    for level in held_levels(files, sockets=side.sockets):
        with more_backends(lab, level, files):
            objects = kernel_objects()
            opened, errors, loads = hold(lab, side, level)
            rows.append(row(side, known, level, opened, objects, errors))
            for load in loads:
                assert load.stdin
                load.stdin.close()
            for load in loads:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    load.wait(GRACE)
                lab.stop(load)
    return rows
