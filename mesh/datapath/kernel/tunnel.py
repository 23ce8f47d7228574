# SPDX-License-Identifier: Apache-2.0
"""The tunnel to other nodes: which may send through it, how each is reached, and how backends are named there."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from mesh import _abi, _bpf, netaddr
from mesh._maglev import backend_seed
from mesh.config.keys import Config
from mesh.datapath.base import BackendEntry, BackendKey
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.lately import Lately
from mesh.datapath.netlink import Netlink, Topology
from mesh.datapath.proof import Proof
from mesh.datapath.tunnel_proof import pack_keys
from mesh.model import Address, EngineKind, Frontend, Protocol

AGAIN: Final = 4.0  # seconds until routes are read again: they change without interfaces or addresses changing
UNPROVEN_FEW: Final = 16  # packets without a proof: trials of an agent that starts and has no key yet
# What a task that calls itself sees as its peer: addresses that no host has (RFC 7600, RFC 6666).
HAIRPIN: Final = ipaddress.IPv4Address("192.0.0.8")
HAIRPIN6: Final = ipaddress.IPv6Address("100::8")
NOWHERE: Final = ipaddress.IPv4Address(0)


def node_config(config: Config, cookie: int) -> _abi.Config:
    """The settings of this node, in the network namespace of this cookie."""
    settings = _abi.SETTING_DIRECT if config.return_path == "direct" else 0
    return _abi.Config(
        netns_cookie=cookie,
        hairpin=HAIRPIN,
        hairpin6=HAIRPIN6,
        settings=settings,
        tunnel_port=config.tunnel_port,
        error_rate=config.error_rate,
        clock=clock(),
    )


def clock() -> int:
    """Unix time less CLOCK_MONOTONIC, in nanoseconds: mesh_config.clock."""
    return time.time_ns() - time.monotonic_ns()


def seed_of(key: BackendKey) -> bytes:
    """A backend's name between nodes, next to its port: the first 8 bytes of its permutation's seed."""
    return backend_seed(key.backend)[:8]


def _known(value: bytes) -> _abi.Node:
    """A mesh_node, but for what the programs write."""
    return _abi.NODE.unpack(value)._replace(path_mtu=0, path_stamp=0, hint=0, heard=0, unproven=0)


class Nodes:
    """Keeps mesh_nodes and mesh_node_addrs in line with the cluster and the routes. Not thread-safe."""

    def __init__(self, maps: Mapping[str, _bpf.Map], netlink: Netlink) -> None:
        self._nodes = maps["mesh_nodes"]
        self._paths = maps["mesh_node_addrs"]
        self._netlink = netlink
        self._engines: dict[Address, EngineKind] = {}
        self._seen: tuple[object, ...] = ()
        self._again = 0.0
        self._next = 0
        self._proof: Proof | None = None  # None: not given yet, what the maps say holds
        self._unproven: Lately[Address] = Lately(UNPROVEN_FEW)
        self.held: dict[Address, _abi.Node] = {}
        self.all: tuple[Address, ...] = ()
        self.restore()

    def restore(self) -> None:
        """Read back what is in the maps."""
        held = self.held = {netaddr.unpack(key): _known(value) for key, value in self._nodes.rows()}
        for address, slot in held.items():
            self._paths.update(codec.pack_u32(slot.id), netaddr.pack(address))
        self._unproven = Lately(UNPROVEN_FEW, self._counts())
        own = {slot.source for slot in held.values()} - {NOWHERE}
        self.all = tuple(sorted({*held, *own}, key=lambda a: (a.version, a.packed)))
        self._next = max((slot.id for slot in held.values()), default=-1) + 1
        self._seen = ()

    def put(self, nodes: Iterable[Address]) -> None:
        """The nodes of the cluster, this one included; the next `refresh` puts them into the maps."""
        self.all = tuple(nodes)
        known = set(self.all)
        self._engines = {address: engine for address, engine in self._engines.items() if address in known}

    def learn(self, backends: Iterable[BackendEntry]) -> None:
        """Learn from backends which engines their nodes run. A node that no backend names keeps its known engine."""
        told = {e.target.via: e.target.engine for e in backends if e.target.via is not None and e.target.engine}
        self._engines |= told

    def prove(self, proof: Proof) -> None:
        """Prove to nodes, and demand proofs of them, from now on."""
        if proof != self._proof:
            self._proof = proof
            for address, slot in list(self.held.items()):
                self._put(address, slot)

    def _proving(self, address: Address, slot: _abi.Node) -> _abi.Node:
        """A slot with the keys, and what holds of this node's proofs."""
        proof = self._proof
        if proof is None:
            return slot
        proves, demanded = address in proof.tunnel_checking, address in proof.tunnel_proving
        if not proof.known:
            proves, demanded = bool(slot.flags & _abi.NODE_PROVE), bool(slot.flags & _abi.NODE_DEMAND)
        flags = _abi.NODE_PROVE * bool(proves and proof.keys) | _abi.NODE_DEMAND * bool(demanded or proof.require)
        called = proof.own if proof.own is not None and proof.own.version == address.version else slot.source
        return slot._replace(flags=flags, keys=pack_keys(proof.keys, called, address))

    def _counts(self) -> dict[Address, int]:
        return {netaddr.unpack(key): _abi.NODE.unpack(value).unproven for key, value in self._nodes.rows()}

    def unproven(self) -> Iterator[tuple[Address, int]]:
        """Nodes' addresses from which more than a few packets without a proof came lately, and how many in all. For one
        thread."""
        found = self._unproven.look(self._counts(), time.monotonic())
        yield from sorted(((address, count) for address, count, _ in found), key=lambda row: str(row[0]))

    def refresh(self, topology: Topology) -> None:
        """Bring the maps in line with the cluster and with this node's routes."""
        called = self._proof.own if self._proof is not None else None
        seen = (topology.interfaces, topology.addresses, self.all, dict(self._engines), called)
        now = time.monotonic()
        if seen == self._seen and now < self._again:
            return
        own = [address for address in self.all if address in topology.addresses]
        here = {*own, called}
        for address in self.held.keys() - set(self.all) | self.held.keys() & here:
            self._nodes.delete(netaddr.pack(address))
            del self.held[address]
        for address in self.all:
            if address not in here:
                self._put(address, self._slot(address, own, topology))
        self._seen, self._again = seen, now + AGAIN

    def _slot(self, address: Address, own: Iterable[Address], topology: Topology) -> _abi.Node:
        """The path to a node. Without a route it stays unchanged: flows wait for it instead of being rejected."""
        held = self.held.get(address)
        number = held.id if held is not None else self._number()
        route = self._netlink.route(address)
        interface = topology.interfaces.get(route.interface) if route is not None else None
        if route is None or interface is None or route.local:
            return held or _abi.Node(source=NOWHERE, id=number)
        source = next((a for a in own if a.version == address.version), route.source) or NOWHERE
        takes = self._engines.get(address) != EngineKind.PROXY and (interface.ethernet or interface.bare)
        mtu = min(route.mtu or interface.mtu, interface.mtu) * takes
        return (held or _abi.Node())._replace(source=source, ifindex=interface.index, mtu=mtu, id=number)

    def _number(self) -> int:
        """A free node id. Ids of nodes that are gone come last, because replies to them may still be on their way."""
        used = {slot.id for slot in self.held.values()}
        numbers = (n % _abi.MAX_NODES for n in range(self._next, self._next + _abi.MAX_NODES))
        number = next((n for n in numbers if n not in used), 0)
        self._next = number + 1
        return number

    def _put(self, address: Address, slot: _abi.Node) -> None:
        slot, before = self._proving(address, slot), self.held.get(address)
        if before == slot:
            return
        key = netaddr.pack(address)
        written = _abi.NODE.unpack(now) if (now := self._nodes.lookup(key)) is not None else slot
        self._paths.update(codec.pack_u32(slot.id), key)
        ends = before is not None and before.flags & ~slot.flags & _abi.NODE_PROVE  # an earlier build is back there
        heard = 0 if ends else written.heard
        self._nodes.update(key, _abi.NODE.pack(slot._replace(heard=heard, unproven=written.unproven)))
        self.held[address] = slot

    @property
    def interfaces(self) -> frozenset[int]:
        """Interfaces where other nodes' packets come in."""
        return frozenset(slot.ifindex for slot in self.held.values() if slot.ifindex)

    def problems(self, frontends: Iterable[Frontend], tunnel_port: int) -> list[str]:
        """Nodes without a route, and frontends whose port the tunnel has."""
        found = [f"node {address}: no route to it" for address, slot in self.held.items() if not slot.ifindex]
        found += [
            f"node {address}: packets through the tunnel have its address and not its proof, {count} so far; they are "
            "dropped (does another host use its address? are the clocks of both nodes right?)"
            for address, count in self.unproven()
        ]
        hidden = {f for f in frontends if (f.port, f.protocol) == (tunnel_port, Protocol.UDP)} if self.held else ()
        why = "not served, its port is that of the tunnel between nodes; publish another one, or set tunnel_port"
        return found + [f"{frontend}: {why}" for frontend in sorted(hidden, key=str)]


class Ids:
    """mesh_ids: this node's backends by the names that other nodes use. Not thread-safe."""

    def __init__(self, maps: Mapping[str, _bpf.Map]) -> None:
        self._map = maps["mesh_ids"]
        self._owners = {key: codec.unpack_u32(value) for key, value in self._map.rows()}

    def put(self, backends: Iterable[BackendEntry]) -> None:
        """Accept other nodes' flows for those of these backends that run here."""
        for entry in backends:
            key = codec.pack_id(seed_of(entry.key), entry.key.port, entry.key.protocol)
            if entry.target.via is not None:
                self._delete(key)
            elif self._owners.get(key) != entry.id:
                self._map.update(key, codec.pack_u32(entry.id))
                self._owners[key] = entry.id

    def drop(self, numbers: Iterable[int]) -> None:
        """Accept no more flows for these owners."""
        gone = set(numbers)
        for key in [key for key, owner in self._owners.items() if owner in gone] if gone else ():
            self._delete(key)

    def keep(self, numbers: Iterable[int]) -> None:
        """Accept flows for no other owners than these."""
        self.drop(set(self._owners.values()) - set(numbers))

    def _delete(self, key: bytes) -> None:
        if self._owners.pop(key, None) is not None:
            self._map.delete(key)
