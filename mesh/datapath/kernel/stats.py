# SPDX-License-Identifier: Apache-2.0
"""The kernel engine's counters, live flows and test runs: reads only, any thread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mesh import _bpf
from mesh._maglev import hash_client, hash_flow, slot_of
from mesh.datapath.base import Applied, BackendKey, Explanation, Stats
from mesh.datapath.counters import CounterTable
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.maps import KernelMaps, Served
from mesh.model import Affinity, Flow, Frontend, Protocol

VERDICTS: Final = tuple(name.lower() for name, _ in _bpf.VERDICTS)
SKB: Final = 192  # bytes of struct __sk_buff
SKB_CB: Final = 48  # offset of its cb
ETHER: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}
UDP_LIVE: Final = 64  # stamps since a UDP flow was last heard for which it counts as live
REPLY_CLOSED: Final = 0x4 | 0x8


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
    data = memoryview(raw).cast("Q").tolist()
    width = codec.COUNTS.size // 8
    packets_in, bytes_in, packets_out, bytes_out, opened, ended = (
        [column[row] for row in rows] for column in (data[i::width] for i in range(width))
    )
    tcp = Protocol.TCP
    closed = [min(e, s) if p is tcp else s for s, e, p in zip(opened, ended, protocols, strict=True)]
    return [opened, closed, [0] * len(rows), bytes_in, bytes_out, packets_in, packets_out]


def read(maps: KernelMaps, order: Order) -> Stats:
    """Read all counters."""
    raw = maps.counts("mesh_fe_metrics", max(order.numbers, default=0) + 1)
    columns = _columns(raw, order.numbers, [frontend.protocol for frontend in order.frontends])
    frontends = CounterTable(order.frontends, columns)
    raw = maps.counts("mesh_be_metrics", max(order.ids, default=0) + 1)
    columns = _columns(raw, order.ids, [frontend.protocol for frontend, _ in order.backends])
    backends = CounterTable(order.backends, columns)
    raw = maps.counts("mesh_verdicts", len(VERDICTS))
    verdicts = {name: codec.unpack_u64(raw[8 * i : 8 * i + 8]) for i, name in enumerate(VERDICTS)}
    tracked = any(entry.table.tracked for entry in order.applied.frontends.values())
    gauges = {
        "flow_cache_entries": float(maps.entries("mesh_flows")) if tracked else 0.0,
        "flow_cache_size": float(maps.size("mesh_flows")),
        "table_arenas": float(len(maps.arenas)),
    }
    return Stats(frontends=frontends, backends=backends, verdicts=verdicts, gauges=gauges)


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
    oldest = (time.monotonic_ns() - int(seconds * 1e9)) >> codec.STAMP_SHIFT
    numbers = {served.id: frontend for frontend, served in maps.served.items()}
    found: dict[Frontend, set[int]] = {}
    for raw, note in maps.notes():
        frontend = numbers.get(note.frontend)
        entry = applied.frontends.get(frontend) if frontend is not None else None
        if frontend is None or entry is None or note.stamp < oldest:
            continue
        source, destination, source_port, destination_port, protocol = codec.FLOW.unpack(raw)
        if entry.state.options.affinity is Affinity.CLIENT_IP:
            number = hash_client(source)
        else:
            ports = codec.be16(source_port), codec.be16(destination_port)
            number = hash_flow(source, ports[0], destination, ports[1], protocol)
        slot = slot_of(number, entry.table.size)
        if note.owner != entry.table.slot(slot)[0]:
            found.setdefault(frontend, set()).add(slot)
    return {frontend: frozenset(slots) for frontend, slots in found.items()}


def live_flows(maps: KernelMaps) -> int:
    """How many flows are established: TCP until both ends have closed, UDP for a minute after the last datagram."""
    now = time.monotonic_ns() >> codec.STAMP_SHIFT
    return sum(
        flags & REPLY_CLOSED != REPLY_CLOSED if protocol == Protocol.TCP else now - stamp < UDP_LIVE
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


def _packet(flow: Flow) -> bytes:
    """The first packet of a flow as it arrives; the program does not check its checksums."""
    if flow.protocol is Protocol.TCP:
        segment = codec.NETWORK.tcp.pack(flow.source_port, flow.destination_port, 0, 0, 0x50, 0x02, 65535, 0, 0)
    else:
        segment = codec.NETWORK.udp.pack(flow.source_port, flow.destination_port, 8, 0)
    source, destination, protocol = flow.source.packed, flow.destination.packed, int(flow.protocol)
    if flow.source.version == 4:
        header = codec.NETWORK.ipv4.pack(0x45, 0, 20 + len(segment), 0, 0, 64, protocol, 0, source, destination)
    else:
        header = codec.NETWORK.ipv6.pack(6 << 28, len(segment), protocol, 64, source, destination)
    return bytes(12) + ETHER[flow.source.version] + header + segment


def explain(program: _bpf.Program, flow: Flow) -> Explanation:
    """Ask the loaded program mesh_explain by a test run, which counts and notes nothing."""
    answer = program.test_run(_packet(flow), bytes(SKB)).ctx
    verdict, frontend, number, slot, owner = (
        codec.unpack_u32(answer[SKB_CB + 4 * i : SKB_CB + 4 * i + 4]) for i in range(5)
    )
    name = VERDICTS[verdict] if verdict < len(VERDICTS) else "not ours"
    return Explanation(name, frontend, number, slot, owner)
