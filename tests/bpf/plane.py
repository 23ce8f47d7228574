# SPDX-License-Identifier: Apache-2.0
"""The kernel engine's programs under BPF_PROG_TEST_RUN: maps set up by hand, packets in, packets out. Nothing is pinned
or attached: all is gone with the object."""

from __future__ import annotations

import ipaddress
import re
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from mesh import _abi, _bpf
from mesh.datapath.kernel import codec
from tests.oracle.tunnel_proof import key_between

ROOT: Final = Path(__file__).parents[2]
OBJECTS: Final = ROOT / "mesh/datapath/kernel/objects"
ABI: Final = (ROOT / "bpf/include/mesh/abi.h").read_text()
VERDICTS: Final = re.findall(r"X\((\w+),", ABI[ABI.index("define MESH_VERDICTS") : ABI.index("MESH_VERDICT_ENUM")])
CAUSES: Final = [
    name.upper() for name in re.findall(r"__u64 (\w+);", ABI.partition("struct mesh_failures {")[2].partition("}")[0])
]
OK, SHOT, REDIRECT = 0xFFFFFFFF, 2, 7  # OK: TC_ACT_UNSPEC
TCP, UDP = 6, 17
FREE, ACTIVE, DRAINING = 0, 1, 2
CLIENT, DENY, PASS_IF_NONE, HOLD = 1, 2, 4, 8
ALLOW_RULE, DENY_RULE = 1, 2
NONE, PASS = 0, 1
TRACKED = 0x80000000
ARENA_SLOTS = 1 << 20
SHARED: Final = (
    "mesh_ports",
    "mesh_exact",
    "mesh_addresses",
    "mesh_frontends",
    "mesh_arenas",
    "mesh_backends",
    "mesh_acl",
    "mesh_networks",
    "mesh_translated",
    "mesh_flows",
    "mesh_flows_new",
    "mesh_revnat",
    "mesh_revnat_udp",
    "mesh_revnat_new",
    "mesh_fragments",
    "mesh_verdicts",
    "mesh_fe_metrics",
    "mesh_fe_failures",
    "mesh_be_metrics",
    "mesh_config",
    "mesh_heartbeat",
    "mesh_sk_revnat",
    "mesh_udp_revnat",
    "mesh_nodes",
    "mesh_node_addrs",
    "mesh_ids",
    "mesh_fib_gen",
)
LARGE: Final = {
    "mesh_flows",
    "mesh_flows_new",
    "mesh_revnat",
    "mesh_revnat_udp",
    "mesh_revnat_new",
    "mesh_fragments",
    "mesh_frontends",
    "mesh_backends",
    "mesh_fe_metrics",
    "mesh_fe_failures",
    "mesh_be_metrics",
}
HASHES: Final = (
    "mesh_exact",
    "mesh_addresses",
    "mesh_acl",
    "mesh_networks",
    "mesh_flows",
    "mesh_flows_new",
    "mesh_revnat",
    "mesh_revnat_udp",
    "mesh_revnat_new",
    "mesh_fragments",
    "mesh_nodes",
    "mesh_ids",
)
TUNNEL_PORT = 6084
CLOCK_MONOTONIC_COARSE = 6  # linux/time.h
DIRECT = 1  # MESH_SETTING_DIRECT
HAIRPIN, HAIRPIN6 = "169.254.77.1", "fe80::6d65:7368"


def packed(address: str) -> bytes:
    """16 bytes, IPv4 mapped."""
    ip = ipaddress.ip_address(address)
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


class Plane:
    """One node's data plane. Ids are given by the caller; tables are lists of (current, previous)."""

    def __init__(
        self, objects: Sequence[str] = ("ingress", "task"), *, entries: int = 4096, sizes: Mapping[str, int] = {}
    ) -> None:
        self.programs: dict[str, _bpf.Program] = {}
        self.maps: dict[str, _bpf.Map] = {}
        self.recent: list[_bpf.Mapping] = []  # each object has its own
        self.early: list[_bpf.Map] = []  # likewise
        for name in objects:
            item = _bpf.Object(str(OBJECTS / f"{name}.bpf.o"))
            own = set(item.maps())
            for shared in own & set(SHARED):
                if shared in self.maps:
                    item.reuse(shared, self.maps[shared])
                elif shared in sizes or shared in LARGE:
                    item.resize(shared, sizes.get(shared, entries))
            item.load()
            for array_of_programs in own & {"mesh_tail_calls", "mesh_task_calls"}:  # emptied once nobody holds them
                self.maps[array_of_programs] = item.map(array_of_programs)
            for shared in own & set(SHARED):
                self.maps.setdefault(shared, item.map(shared))
            if name == "task":
                self.hops = item.map("fib_cache")
            self.recent += [_bpf.Mapping(item.map(known)) for known in own & {"mesh_recent"}]
            self.early += [item.map(known) for known in own & {"early_datagrams"}]
            for program in item.programs():
                self.programs[program] = item.program(program)
        self.arena = _bpf.Map.create(_bpf.ARRAY, "arena", 4, 8, ARENA_SLOTS, _bpf.MMAPABLE)
        self.maps["mesh_arenas"].update(u32(0), u32(self.arena.fileno()))
        self.free = 0
        self.used: set[tuple[str, int]] = set()
        self.configure()

    # Of all nodes: 1, what is sent there is proven; 2, proofs are demanded; (number, secret) of the swarm's keys.
    proofs: ClassVar[tuple[int, Sequence[tuple[int, bytes]]]] = (0, ())
    _loaded: ClassVar[dict[tuple[str, ...], Plane]] = {}

    @classmethod
    def fresh(cls, *objects: str) -> Plane:
        """A plane without a past: loaded once, emptied for every caller."""
        objects = objects or ("ingress", "task")
        if objects not in cls._loaded:
            cls._loaded[objects] = cls(objects)
        plane = cls._loaded[objects]
        plane.empty()
        return plane

    def empty(self) -> None:
        """Take everything out of the maps."""
        for name, index in self.used:
            self.maps[name].update(u32(index), bytes(self.maps[name].stride))
        self.used.clear()
        for number in range(len(VERDICTS)):
            self.maps["mesh_verdicts"].update(u32(number), bytes(self.maps["mesh_verdicts"].stride))
        for number in {frontend for frontend, _ in self.failures()}:
            self.maps["mesh_fe_failures"].update(u32(number), bytes(self.maps["mesh_fe_failures"].stride))
        for name in HASHES:
            if name in self.maps and (keys := self.maps[name].dump()[0]):
                self.maps[name].delete_batch(keys)
        for early in self.early:
            if keys := early.dump()[0]:
                early.delete_batch(keys)
        for recent in self.recent:
            recent.write(0, bytes(recent.size))
        if "mesh_translated" in self.maps:
            translated = _bpf.Mapping(self.maps["mesh_translated"])
            translated.write(0, bytes(translated.size))
        self.free = 0
        self.reroute()
        self.configure()

    def reroute(self) -> None:
        """Say that routes have changed."""
        held = self.maps["mesh_fib_gen"].lookup(u32(0))
        assert held
        self.maps["mesh_fib_gen"].update(u32(0), u32(struct.unpack("=I", held)[0] + 1))

    def configure(self, cookie: int = 0, *, settings: int = 0, error_rate: int = 0, clock: int | None = None) -> None:
        """`clock`: Unix time less CLOCK_MONOTONIC, in nanoseconds; None: as it is."""
        clock = time.time_ns() - time.monotonic_ns() if clock is None else clock
        value = struct.pack("=Q16s16sI", cookie, packed(HAIRPIN), packed(HAIRPIN6), settings)
        value += struct.pack("!H", TUNNEL_PORT) + struct.pack("=HQ", error_rate, clock)
        self.maps["mesh_config"].update(u32(0), value)

    def orphan(self, stamps: int = 0) -> None:
        """The tables have been orphaned for so many stamps; negative: they will be after so many."""
        self.used.add(("mesh_heartbeat", 0))
        now = time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) >> 30  # the programs' clock
        self.maps["mesh_heartbeat"].update(u32(0), u32((now - stamps) % (1 << 32) or 1))

    def tunnel(
        self,
        number: int,
        node: str,
        own: str,
        *,
        mtu: int = 1500,
        ifindex: int = 1,
        flags: int | None = None,
        keys: Sequence[tuple[int, bytes]] | None = None,
    ) -> None:
        """Another node, and this one's address by which it is known there. `flags` and `keys`: see `proofs`."""
        flags, keys = self.proofs[0] if flags is None else flags, self.proofs[1] if keys is None else keys
        self.maps["mesh_node_addrs"].update(u32(number), packed(node))
        value = packed(own) + struct.pack("=10I", ifindex, mtu, number, 0, 0, 0, flags, 0, 0, 0)
        for name, secret in keys:
            ways = key_between(secret, own, node) + key_between(secret, node, own)
            value += struct.pack("!H", name % 65536) + struct.pack("=HI32s", 1, 0, ways)
        self.maps["mesh_nodes"].update(packed(node), value.ljust(self.maps["mesh_nodes"].value_size, b"\0"))
        self.maps["mesh_ports"].update(u32(65536 + TUNNEL_PORT), u32(0x40000000))
        self.used |= {("mesh_node_addrs", number), ("mesh_ports", 65536 + TUNNEL_PORT)}

    def believe_hints(self) -> bool:
        """As the agent does where no probe is answered: path MTUs that were told count. Whether there were any."""
        found = False
        for key, value in self.maps["mesh_nodes"].rows():
            node = _abi.NODE.unpack(value)
            if node.hint:
                found, stamp = True, time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) >> 30
                node = node._replace(path_mtu=node.hint, path_stamp=stamp, hint=0)
                self.maps["mesh_nodes"].update(key, _abi.NODE.pack(node))
        return found

    def away(
        self,
        owner: int,
        node: str,
        port: int,
        seed: bytes,
        *,
        protocol: int = TCP,
        state: int = ACTIVE,
        version: int = 4,
        handed: bool = False,
    ) -> None:
        """A backend on another node."""
        value = packed(node) + struct.pack("!HBB", port, protocol, state)
        value += struct.pack("=III6sBB8s16x", 1, 0, 0, bytes(6), version, handed, seed)
        self.used |= {("mesh_backends", owner), ("mesh_be_metrics", owner)}
        self.maps["mesh_backends"].update(u32(owner), value)

    def table(self, slots: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Store a table; returns (first, size)."""
        first = self.free
        self.free += len(slots)
        keys = b"".join(u32(first + i) for i in range(len(slots)))
        self.arena.update_batch(keys, b"".join(struct.pack("=II", *slot) for slot in slots))
        return first, len(slots)

    def frontend(
        self,
        number: int,
        port: int,
        slots: Sequence[tuple[int, int]],
        *,
        protocol: int = TCP,
        address: str = "::",
        flags: int = 0,
        acl: int = 0,
    ) -> None:
        """Put a frontend, or give it another table, flags, rules."""
        first, size = self.table(slots)
        self.maps["mesh_frontends"].update(u32(number), struct.pack("=IIII", first, size, flags, acl))
        slot = (0 if protocol == TCP else 65536) + port
        self.used |= {(f"mesh_{name}", number) for name in ("frontends", "fe_metrics", "fe_failures")}
        self.used.add(("mesh_ports", slot))
        index = u32(slot)
        word = struct.unpack("=I", self.maps["mesh_ports"].lookup(index) or bytes(4))[0]
        if address == "::":
            word = word & 0x80000000 | number
        else:
            word |= 0x80000000
            key = packed(address) + struct.pack("!HB5x", port, protocol)
            self.maps["mesh_exact"].update(key, u32(number))
        self.maps["mesh_ports"].update(index, u32(word))

    def backend(
        self,
        owner: int,
        address: str,
        port: int,
        *,
        protocol: int = TCP,
        state: int = ACTIVE,
        epoch: int = 1,
        ifindex: int = 1,
        bridge: int = 1,
        frontend: int = 0,
        networks: Sequence[str] = (),
        source: str = "",
    ) -> None:
        """A backend of this node. `networks`: those that it has itself, whose clients it sees by `source`."""
        own = [ipaddress.ip_network(network) for network in networks]
        for network in own:
            key = codec.pack_network_key(owner, network)
            self.maps["mesh_networks"].update(key, packed(source))
        value = packed(address) + struct.pack("!HBB", port, protocol, state)
        value += struct.pack("=III6s10xI4xQ", epoch, ifindex, bridge, bytes(6), frontend, codec.network_bits(own))
        self.used |= {("mesh_backends", owner), ("mesh_be_metrics", owner)}
        self.maps["mesh_backends"].update(u32(owner), value)

    def local(self, *addresses: str, floating: bool = False) -> None:
        for address in addresses:
            self.maps["mesh_addresses"].update(packed(address), u32(2 if floating else 1))

    def rule(self, acl: int, network: str, rule: int) -> None:
        net = ipaddress.ip_network(network)
        bits = 32 + net.prefixlen + (96 if net.version == 4 else 0)
        key = struct.pack("=II", bits, acl) + packed(str(net.network_address))
        self.maps["mesh_acl"].update(key, u32(rule))

    def run(self, program: str, frame: bytes, *, ifindex: int = 1, gso: int = 0) -> _bpf.RunResult:
        """One packet through a program, as if it came in by `ifindex`."""
        return self.programs[program].test_run(frame, context(ifindex, gso))

    def verdicts(self) -> dict[str, int]:
        """Counted so far, those above 0."""
        _, values = self.maps["mesh_verdicts"].sums()
        counts = struct.unpack(f"={len(VERDICTS)}Q", values)
        return {name: count for name, count in zip(VERDICTS, counts, strict=True) if count}

    def failures(self) -> dict[tuple[int, str], int]:
        """Counted so far by frontend and cause, those above 0."""
        _, values = self.maps["mesh_fe_failures"].sums()
        counts = struct.unpack(f"={len(values) // 8}Q", values)
        return {(i // len(CAUSES), CAUSES[i % len(CAUSES)]): count for i, count in enumerate(counts) if count}

    def counts(self, name: str, number: int) -> tuple[int, ...]:
        """(packets_in, bytes_in, packets_out, bytes_out, starts, ends) of a frontend (mesh_fe_metrics) or backend."""
        raw = self.maps[name].lookup(u32(number))
        assert raw
        each = struct.iter_unpack("=6Q", raw)
        return tuple(map(sum, zip(*each, strict=True)))


def steady_stamp() -> int:
    """The programs' stamp, which does not change within the next 10 ms."""
    left = (1 << 30) - time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) % (1 << 30)
    if left < 10_000_000:
        time.sleep(left / 1e9 + 0.01)  # the clock lags by a tick
    return time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) >> 30


def context(ifindex: int = 1, gso: int = 0) -> bytes:
    """A struct __sk_buff (linux/bpf.h) with what a test run may set."""
    skb = bytearray(192)
    struct.pack_into("=I", skb, 40, ifindex)
    struct.pack_into("=I", skb, 176, gso)
    return bytes(skb)


def explained(result: _bpf.RunResult) -> tuple[str, int, int, int, int]:
    """mesh_explain's answer: verdict ("" for not ours), frontend, hash, slot, owner."""
    verdict, *rest = struct.unpack_from("=5I", result.ctx, 48)
    name = VERDICTS[verdict] if verdict < len(VERDICTS) else ""
    return (name, *rest)
