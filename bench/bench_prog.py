# SPDX-License-Identifier: Apache-2.0
"""What the kernel engine's programs cost per packet. `python -m bench.bench_prog [--json]`.

BPF_PROG_TEST_RUN through bench/prog/rewind.bpf.c: every round gets its input anew, from a list of one flow (everything
in the processor's caches) or of 64 Ki flows; what the empty program costs in the same way is subtracted, sample by
sample. That every packet took the path it is said to take is read from the programs' own counters.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from typing import Final

from tabulate import tabulate

from bench import prog_tunnel
from bench.lab import OUT
from bench.report import PROGRAM_HEADERS, program_rows
from mesh import _bpf
from tests.bpf.plane import Plane, context, u32

NODE, TASK, TASK_PORT = "192.0.2.1", "172.18.0.3", 80
STABLE_PORT, CHANGING_PORT, OTHER_PORT = 8080, 8081, 9999
PORTS: Final = (STABLE_PORT, CHANGING_PORT, OTHER_PORT)
CLIENTS: Final = int(IPv4Address("10.0.0.0"))
MANY: Final = 65536
BATCH: Final = 8192
HOT_REPEAT: Final = 20_000
SAMPLES: Final = 15
SIZES: Final = {  # of the flow tables, as by default
    "mesh_revnat": 524288,
    "mesh_flows": 262144,
    "mesh_revnat_udp": 131072,
    "mesh_revnat_new": 65536,
    "mesh_flows_new": 65536,
}
SLOTS: Final = 16381
SYN, ACK = 0x02, 0x10


@dataclass(frozen=True)
class Cost:
    """One path. `budget_ns` is what issue and documents promise, if anything."""

    path: str
    ns: float
    spread_ns: float  # half the distance between the quartiles
    flows: int
    verdict: str = ""
    budget_ns: float | None = None


def frame(source: int, sport: int, destination: int, dport: int, flags: int) -> bytes:
    """A TCP segment in a frame of 64 bytes. Checksums are not valid: the programs adjust and never check them."""
    ethernet = bytes(6) + bytes.fromhex("020000000001") + b"\x08\x00"
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 50, 1, 0x4000, 64, 6, 0xABCD, source, destination)
    return ethernet + ip + struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 65535, 0x1234, 0) + bytes(10)


def first_client(port: int, generation: int = 0) -> int:
    """Where the addresses of a port's clients begin: no two ports share any, since they share a task."""
    return CLIENTS + (PORTS.index(port) * (SAMPLES + 2) + generation) * MANY


def inbound(port: int, flags: int, flows: int, generation: int = 0) -> list[bytes]:
    """Packets of `flows` clients to a port of the node. Another generation, or port: other clients."""
    node = int(IPv4Address(NODE))
    first = first_client(port, generation)
    return [frame(first + n, 1024 + n % 60000, node, port, flags) for n in range(flows)]


def outbound(flows: int, port: int = STABLE_PORT) -> list[bytes]:
    """The task's answers to what is inbound to a port."""
    task = int(IPv4Address(TASK))
    first = first_client(port)
    return [frame(task, TASK_PORT, first + n, 1024 + n % 60000, ACK) for n in range(flows)]


class Bench:
    """The programs with a data plane of one backend, and the harness."""

    def __init__(self) -> None:
        self.plane = Plane(sizes=SIZES)
        self.plane.local(NODE)
        self.plane.backend(2, TASK, TASK_PORT)
        self.plane.backend(3, "172.18.0.4", TASK_PORT)
        self.plane.frontend(1, STABLE_PORT, [(2, 2)] * SLOTS)
        self.plane.frontend(2, CHANGING_PORT, [(2, 3)] * SLOTS)
        self.harness = _bpf.Object(str(OUT / "rewind.bpf.o"))
        self.harness.load()
        self.rewind = self.harness.program("bench_rewind")
        self.empty = self.harness.program("bench_empty")
        self.frames = b""

    def load(self, frames: Sequence[bytes]) -> None:
        """Take a list of input packets; their number is a power of two."""
        self.frames = frames[0]
        self.count = len(frames)
        keys = b"".join(u32(n) for n in range(len(frames)))
        self.harness.map("bench_frames").update_batch(keys, b"".join(frames))

    def run(self, program: _bpf.Program, repeat: int) -> float:
        """ns per packet, harness included."""
        self.harness.map("bench_cursor").update(u32(0), struct.pack("=II", 0, self.count - 1))
        self.harness.map("bench_program").update(u32(0), u32(program.fileno()))
        return float(self.rewind.test_run(self.frames, context(), repeat).nanoseconds)

    def once(self, name: str, frames: Sequence[bytes]) -> None:
        """Let each packet pass once, unmeasured."""
        self.load(frames)
        self.run(self.plane.programs[name], len(frames))

    def sample(self, name: str, repeat: int) -> float:
        """ns per packet of a program, without what the empty one costs."""
        empty = self.run(self.empty, repeat)
        return self.run(self.plane.programs[name], repeat) - empty

    def path(self, samples: Iterator[float], **about: object) -> Cost:
        """Collect the samples; the verdict that the packets got is the one whose counter moved."""
        before = self.plane.verdicts()
        values = sorted(samples)
        moved = {name: n - before.get(name, 0) for name, n in self.plane.verdicts().items()}
        total = sum(moved.values())
        shares = [f"{name} {n / total:.0%}" for name, n in moved.items() if n]
        spread = (values[len(values) * 3 // 4] - values[len(values) // 4]) / 2
        return Cost(ns=statistics.median(values), spread_ns=spread, verdict=", ".join(shares), **about)  # type: ignore[arg-type]


def steady(bench: Bench, name: str, frames: list[bytes], path: str, budget: float | None = None) -> Iterator[Cost]:
    """A path whose packets leave no new state: one flow, then many."""
    for flows in (1, MANY):
        bench.load(frames[:flows])
        repeat = max(flows, HOT_REPEAT)
        bench.run(bench.plane.programs[name], repeat)
        samples = (bench.sample(name, repeat) for _ in range(SAMPLES))
        yield bench.path(samples, path=path, flows=flows, budget_ns=budget if flows == 1 else None)


def establish(bench: Bench, port: int) -> None:
    """Let all flows of a port begin, and their task go on with them, which proves them."""
    steps = [
        ("mesh_ingress", inbound(port, SYN, MANY)),
        ("mesh_task", outbound(MANY, port)),
        ("mesh_ingress", inbound(port, ACK, MANY)),
    ]
    for at in range(0, MANY, BATCH):  # fewer than wait for their proof
        for name, frames in steps:
            bench.once(name, frames[at : at + BATCH])


def starting(bench: Bench, port: int, path: str, flows: int) -> Cost:
    """A path on which every packet starts a flow that was never seen."""

    def samples() -> Iterator[float]:
        for generation in range(1, SAMPLES + 1):
            bench.load(inbound(port, SYN, flows, generation))
            yield bench.sample("mesh_ingress", flows)

    return bench.path(samples(), path=path, flows=flows)


def measure() -> list[Cost]:
    """All paths, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        bench = Bench()
        for port in (STABLE_PORT, CHANGING_PORT):
            establish(bench, port)
        costs = list(steady(bench, "mesh_ingress", inbound(OTHER_PORT, ACK, MANY), "not ours", 25))
        costs += steady(bench, "mesh_ingress", inbound(STABLE_PORT, ACK, MANY), "ingress, stateless slot", 60)
        costs += steady(bench, "mesh_ingress", inbound(CHANGING_PORT, ACK, MANY), "ingress, slot in transition")
        costs += steady(bench, "mesh_task", outbound(MANY), "reply")
        costs.append(starting(bench, STABLE_PORT, "new flow, stateless slot", 8192))
        costs.append(starting(bench, CHANGING_PORT, "new flow, slot in transition", 8192))
        bench.once("mesh_ingress", inbound(STABLE_PORT, SYN, MANY, SAMPLES + 1))
        costs.append(starting(bench, STABLE_PORT, "new flow, table of starts full (flood)", 8192))
        costs += [Cost(**row) for row in prog_tunnel.measure(SIZES)]  # type: ignore[arg-type]
    finally:
        os.sched_setaffinity(0, cores)
    return costs


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    costs = [asdict(cost) for cost in measure()]
    if "--json" in argv:
        print(json.dumps(costs))
    else:
        print(tabulate(program_rows(costs), headers=PROGRAM_HEADERS, disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
