# SPDX-License-Identifier: Apache-2.0
"""What a proof in the tunnel costs per packet: the same packets with and without one, sample by sample.

The absolute numbers include what undoing the change of a frame's length takes (bench/prog/rewind.bpf.c).
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from bench.lab import OUT
from mesh import _abi, _bpf
from mesh.datapath import tunnel_proof
from tests.bpf.plane import Plane, context, u32

NODE, PEER, TASK = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"), IPv4Address("172.18.0.3")
PORT, TASK_PORT, TUNNEL = 8080, 80, 6084
CLIENTS: Final = int(IPv4Address("10.0.0.0"))
KEY: Final = (7, bytes(range(16)))
SEED: Final = bytes(range(1, 9))
IDENT: Final = SEED + struct.pack("!HBB", TASK_PORT, 6, 0)
REPLY: Final = bytes(11) + b"\1"
LENGTH: Final = 136  # of all frames: LONG_SIZE of the harness
MANY: Final = 65536
HOT: Final = 20_000
SAMPLES: Final = 15
BUDGET: Final = 15.0
ACK: Final = 0x10
ETHER: Final = bytes(6) + bytes.fromhex("020000000001") + b"\x08\x00"


@dataclass(frozen=True)
class Path:
    """Packets of one step of a flow, plain and proven."""

    name: str
    program: str
    frames: tuple[list[bytes], list[bytes]]


def packet(source: int, sport: int, destination: int, dport: int, length: int) -> bytes:
    """A TCP segment; checksums are not valid."""
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, length, 1, 0x4000, 64, 6, 0xABCD, source, destination)
    return (ip + struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, ACK, 65535, 0x1234, 0)).ljust(length, b"\0")


def wrapped(inner: bytes, source: IPv4Address, destination: IPv4Address, ident: bytes, proof: bytes) -> bytes:
    more = len(proof) // 4
    geneve = struct.pack("!BBHIHBB", 4 + more, 0x40, 0x0800, 0, 0xFF6D, 0x81, 3 + more) + ident + proof
    length = 28 + len(geneve) + len(inner)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, length, 0, 0x4000, 64, 17, 0) + source.packed + destination.packed
    return ETHER + ip + struct.pack("!HHHH", 50000, TUNNEL, length - 20, 0) + geneve + inner


def tunnelled(source: IPv4Address, destination: IPv4Address, ident: bytes, *, reply: bool, proven: bool) -> list[bytes]:
    """One packet of each flow."""
    found, now = [], time.time_ns()
    size = LENGTH - 14 - 52 - 12 * proven
    for n in range(MANY):
        client, called = (CLIENTS + n, 1024 + n % 60000), (int(NODE), PORT)
        ends = called + client if reply else client + called
        proof = b""
        if proven:
            flow = _abi.Flow(IPv4Address(ends[0]), IPv4Address(ends[2]), ends[1], ends[3], 6)
            proof = tunnel_proof.write(KEY, source, destination, flow, ident, now)
        found.append(wrapped(packet(*ends, size), source, destination, ident, proof))
    return found


class Harness:
    """A node that is called by clients of tasks elsewhere, and has a task that is called elsewhere."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.plane = Plane(sizes=sizes)
        self.plane.local(str(NODE))
        self.plane.away(2, str(PEER), TASK_PORT, SEED)
        self.plane.frontend(1, PORT, [(2, 2)] * 16381)
        self.plane.backend(3, str(TASK), TASK_PORT)
        self.plane.maps["mesh_ids"].update(IDENT, u32(3))
        self.harness = _bpf.Object(str(OUT / "rewind.bpf.o"))
        self.harness.load()
        self.rewind = self.harness.program("bench_rewind_long")
        self.empty = self.harness.program("bench_empty")
        self.prove(proven=False)

    def prove(self, *, proven: bool) -> None:
        self.plane.tunnel(7, str(PEER), str(NODE), flags=3 * proven, keys=(KEY,))

    def load(self, frames: Sequence[bytes]) -> None:
        keys = b"".join(u32(n) for n in range(len(frames)))
        self.harness.map("bench_long_frames").update_batch(keys, b"".join(frames))
        self.first, self.count = frames[0], len(frames)

    def run(self, program: _bpf.Program, repeat: int) -> float:
        """ns per packet, harness included."""
        self.harness.map("bench_cursor").update(u32(0), struct.pack("=II", 0, self.count - 1))
        self.harness.map("bench_program").update(u32(0), u32(program.fileno()))
        return float(self.rewind.test_run(self.first, context(), repeat).nanoseconds)


def paths() -> Iterator[Path]:
    """The four steps of a flow. The replies of the task follow its requests, which make their entries."""
    calls = [ETHER + packet(CLIENTS + n, 1024 + n % 60000, int(NODE), PORT, LENGTH - 14) for n in range(MANY)]
    answers = [ETHER + packet(int(TASK), TASK_PORT, CLIENTS + n, 1024 + n % 60000, LENGTH - 14) for n in range(MANY)]
    yield Path("tunnel, request out", "mesh_ingress", (calls, calls))
    for name, ident, reply in (("tunnel, request in", IDENT, False), ("tunnel, reply in", REPLY, True)):
        plain, proven = (tunnelled(PEER, NODE, ident, reply=reply, proven=p) for p in (False, True))
        yield Path(name, "mesh_ingress", (plain, proven))
        if not reply:
            yield Path("tunnel, reply out", "mesh_task", (answers, answers))


def measure(sizes: dict[str, int]) -> Iterator[dict[str, object]]:
    """Rows as bench_prog prints them."""
    bench = Harness(sizes)
    for path in paths():
        program = bench.plane.programs[path.program]
        for flows in (1, MANY):
            repeat = max(flows, HOT)
            before = bench.plane.verdicts()
            found: tuple[list[float], list[float]] = ([], [])
            for sample in range(SAMPLES + 1):
                for proven, frames in enumerate(path.frames):
                    bench.prove(proven=bool(proven))
                    bench.load(frames[:flows])
                    spent = bench.run(program, repeat) - bench.run(bench.empty, repeat)
                    if sample:  # the first makes the flows' entries
                        found[proven].append(spent)
            moved = {name: n - before.get(name, 0) for name, n in bench.plane.verdicts().items()}
            verdicts = ", ".join(f"{name} {n / sum(moved.values()):.0%}" for name, n in moved.items() if n)
            differences = [b - a for a, b in zip(*found, strict=True)]
            for name, values, budget in (
                (path.name, found[0], None),
                (f"{path.name}: a proof", differences, BUDGET if flows == 1 else None),
            ):
                low, _, high = statistics.quantiles(values, n=4)
                yield {
                    "path": name,
                    "ns": statistics.median(values),
                    "spread_ns": (high - low) / 2,
                    "flows": flows,
                    "verdict": verdicts,
                    "budget_ns": budget,
                }
