# SPDX-License-Identifier: Apache-2.0
"""The kernel engine's counters, live flows and test runs: reads only, any thread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mesh import _abi, _bpf, _linux
from mesh._layout import Layout
from mesh._maglev import hash_packed, slot_of
from mesh.datapath import packets
from mesh.datapath.base import Applied, BackendKey, Explanation, Stats
from mesh.datapath.counters import CounterTable, Failure
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.maps import KernelMaps, Served
from mesh.model import Affinity, Flow, Frontend, Protocol

VERDICTS: Final = tuple(name.lower() for name, _ in _abi.VERDICTS)
CAUSES: Final = frozenset(map(Failure, _abi.Failures._fields))
OF_BACKENDS: Final = frozenset(map(Failure, _abi.BackendFailures._fields))
UDP_LIVE: Final = 64  # stamps since a UDP flow was last heard for which it counts as live


@dataclass(frozen=True, slots=True)
class Order:
    """Which rows of the maps are shown, in which order; the same object until a row is added or removed."""

    applied: Applied
    served: tuple[Served, ...]
    frontends: tuple[Frontend, ...]
    numbers: tuple[int, ...]  # of the frontends
    backends: tuple[tuple[Frontend, BackendKey], ...]
    ids: tuple[int, ...]  # of the backends

    @classmethod
    def of(cls, applied: Applied, served: Mapping[Frontend, Served], known: Order | None) -> Order:
        """`known` itself while it is valid. A backend of several frontends is counted once, under the first of them."""
        now = tuple(served.values())
        if known is not None and known.applied is applied and known.served == now:
            return known
        frontends = tuple(frontend for frontend in applied.frontends if frontend in served)
        names = {entry.id: key for key, entry in applied.backends.items()}
        backends: dict[int, tuple[Frontend, BackendKey]] = {}
        for frontend, entry in applied.frontends.items():
            for number in entry.backends:
                key = names.pop(number, None)
                if key is not None and (not key.path or key.base not in applied.backends):
                    backends[number] = frontend, key.base
        numbers = tuple(served[frontend].id for frontend in frontends)
        return cls(applied, now, frontends, numbers, tuple(backends.values()), tuple(backends))


def _columns(raw: bytes, rows: Sequence[int], protocols: Sequence[Protocol]) -> list[Sequence[int]]:
    """Rows of mesh_counts as columns of a CounterTable. UDP flows have no end: all count as closed, none as active."""
    names = ("starts", "ends", "bytes_in", "bytes_out", "packets_in", "packets_out")
    opened, ended, *sums = (_abi.COUNTS.column(name, raw, rows) for name in names)
    tcp = Protocol.TCP
    closed = [min(e, s) if p is tcp else s for s, e, p in zip(opened, ended, protocols, strict=True)]
    return [opened, closed, [0] * len(rows), *sums]


def _failures(layout: Layout[Any], counted: frozenset[Failure], raw: bytes, rows: Sequence[int]) -> list[Sequence[int]]:
    """Rows of failures as the columns of all causes, in the order of Failure; zeros where they are not counted."""
    none = [0] * len(rows)
    return [layout.column(cause.value, raw, rows) if cause in counted else none for cause in Failure]


def read(maps: KernelMaps, order: Order) -> Stats:
    """Read all counters."""
    raw = maps.counts("mesh_fe_metrics", max(order.numbers, default=0) + 1)
    columns = _columns(raw, order.numbers, [frontend.protocol for frontend in order.frontends])
    raw = maps.counts("mesh_fe_failures", max(order.numbers, default=0) + 1)
    columns += [[0] * len(order.numbers), *_failures(_abi.FAILURES, CAUSES, raw, order.numbers)]  # no connect times
    frontends = CounterTable(order.frontends, columns)
    raw = maps.counts("mesh_be_metrics", max(order.ids, default=0) + 1)
    columns = _columns(raw, order.ids, [frontend.protocol for frontend, _ in order.backends])
    raw = maps.counts("mesh_be_failures", max(order.ids, default=0) + 1)
    columns += [[0] * len(order.ids), *_failures(_abi.BACKEND_FAILURES, OF_BACKENDS, raw, order.ids)]
    backends = CounterTable(order.backends, columns)
    raw = maps.counts("mesh_verdicts", len(VERDICTS))
    verdicts = dict(zip(VERDICTS, codec.unpack_u64s(raw), strict=True))
    tracked = any(entry.table.tracked for entry in order.applied.frontends.values())
    gauges = {
        "flow_cache_entries": float(maps.entries("mesh_flows")) if tracked else 0.0,
        "flow_cache_size": float(maps.size("mesh_flows")),
        "table_arenas": float(len(maps.arenas)),
    }
    return Stats(frontends=frontends, backends=backends, verdicts=verdicts, gauges=gauges)


def failures(maps: KernelMaps, served: Mapping[Frontend, Served], cause: Failure) -> dict[Frontend, int]:
    """How many flows have failed for one of CAUSES, by frontend."""
    numbers = [each.id for each in served.values()]
    raw = maps.counts("mesh_fe_failures", max(numbers, default=0) + 1)
    return dict(zip(served, _abi.FAILURES.column(cause.value, raw, numbers), strict=True))


def run_time(programs: Mapping[str, _bpf.Program]) -> dict[str, int]:
    """Runs and nanoseconds of each program that has run, for Stats.totals."""
    totals: dict[str, int] = {}
    for name, program in programs.items():
        nanoseconds, runs = program.statistics()
        if runs:
            short = name.removeprefix("mesh_")
            totals |= {f"program_{short}_runs": runs, f"program_{short}_nanoseconds": nanoseconds}
    return totals


def live_slots(maps: KernelMaps, applied: Applied, seconds: float) -> Mapping[Frontend, frozenset[int]]:
    """See Datapath.live_slots. Flows noted under the current owner need no note to reach it."""
    oldest = (time.monotonic_ns() - int(seconds * 1e9)) >> _abi.STAMP_SHIFT
    numbers = {served.id: frontend for frontend, served in maps.served.items()}
    found: dict[Frontend, set[int]] = {}
    for raw, note in maps.notes():
        frontend = numbers.get(note.frontend & ~_abi.NOTE_ASKED)
        entry = applied.frontends.get(frontend) if frontend is not None else None
        if frontend is None or entry is None or note.stamp < oldest:
            continue
        number = hash_packed(raw, entry.state.options.affinity is Affinity.CLIENT_IP)
        slot = slot_of(number, entry.table.size)
        if note.owner != entry.table.slot(slot)[0]:
            found.setdefault(frontend, set()).add(slot)
    return {frontend: frozenset(slots) for frontend, slots in found.items()}


def live_flows(maps: KernelMaps) -> int:
    """How many flows are established: TCP until both ends have closed, UDP for a minute after the last datagram."""
    now = time.monotonic_ns() >> _abi.STAMP_SHIFT
    return sum(
        flags & codec.REVNAT_CLOSED != codec.REVNAT_CLOSED if protocol == Protocol.TCP else now - stamp < UDP_LIVE
        for protocol, flags, stamp in maps.replies()
    )


def wait_for_flows(maps: KernelMaps, seconds: float) -> int:
    """Wait at most `seconds` until no flow is established. Returns how many are left.

    A count takes longer the more flows there are; it stays a small part of the time.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        left = live_flows(maps)
        now = time.monotonic()
        if not left or now >= deadline:
            return left
        time.sleep(min(max(0.2, 20 * (now - began)), deadline - now))


def _frame(flow: Flow) -> bytes:
    """The first packet of a flow as it arrives; the program does not check its checksums."""
    if flow.protocol is Protocol.TCP:
        segment = packets.tcp(flow.source_port, flow.destination_port, packets.SYN, window=65535)
    else:
        segment = packets.udp(flow.source_port, flow.destination_port)
    packet = packets.ip(flow.source, flow.destination, flow.protocol, segment)
    ether = _linux.EthHdr(h_proto=packets.ETHER_TYPE[flow.source.version])
    return _linux.ETHHDR.pack(ether) + packet


def explain(program: _bpf.Program, flow: Flow) -> Explanation:
    """Ask the loaded program mesh_explain by a test run, which counts and notes nothing."""
    answer = program.test_run(_frame(flow), _linux.SKBUFF.pack(_linux.SkBuff())).ctx
    words = codec.unpack_u32s(_linux.SKBUFF.unpack_from(answer).cb)
    verdict = words[_abi.EXPLAIN_VERDICT]
    return Explanation(
        VERDICTS[verdict] if verdict < _abi.VERDICT_COUNT else "not ours",
        words[_abi.EXPLAIN_FRONTEND],
        words[_abi.EXPLAIN_HASH],
        words[_abi.EXPLAIN_SLOT],
        words[_abi.EXPLAIN_OWNER],
    )
