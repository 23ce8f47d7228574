# SPDX-License-Identifier: Apache-2.0
"""The programs' maps in one pin directory: read back, publish. bpf/lib/maps.h has the order of steps."""

from __future__ import annotations

import contextlib
import errno
import heapq
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh import _abi, _bpf, netaddr
from mesh._abi import BACKEND, BACKEND_STATE_WORD, FRONTEND
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.arenas import GRACE, Arenas
from mesh.datapath.kernel.codec import Table
from mesh.errors import BpfError, DatapathError
from mesh.model import ANY_ADDRESS, Address, Flow, Frontend, Network, Protocol

CARRIED: Final = {  # maps that are copied from the pins of another build: name -> former name
    "mesh_nodes": "mesh_nodes",
    "mesh_revnat": "mesh_replies",  # with UDP flows, which have a map of their own now
    "mesh_revnat_udp": "mesh_revnat_udp",
    "mesh_revnat_new": "mesh_openings",
    "mesh_translated": "mesh_translated",
}
BETWEEN: Final = _abi.PORT_TUNNEL | _abi.PORT_NODES


RuleSet = frozenset[tuple[Network, int]]


@dataclass(frozen=True, slots=True)
class Served:
    """A frontend as the maps hold it."""

    id: int
    table: Table
    flags: int
    acl: int


class KernelMaps:
    """All writes to the maps. Not thread-safe, except where a method says so."""

    def __init__(self, maps: Mapping[str, _bpf.Map], directory: Path) -> None:
        self._maps = maps
        self._directory = directory
        self._ports = _bpf.Mapping(maps["mesh_ports"])
        self._frontends = _bpf.Mapping(maps["mesh_frontends"])
        self._backends = _bpf.Mapping(maps["mesh_backends"])
        self._config = _bpf.Mapping(maps["mesh_config"])
        self._exact = maps["mesh_exact"]
        self._acl = maps["mesh_acl"]
        self._addresses = maps["mesh_addresses"]
        self._networks = maps["mesh_networks"]
        self._networks_of: dict[int, dict[Network, Address]] = {}  # by backend
        self.reverse = maps["mesh_revnat"]
        self.arenas = Arenas(maps["mesh_arenas"], directory)
        self.served: dict[Frontend, Served] = {}
        self.backends: dict[int, _abi.Backend] = {}
        self._free: list[int] = list(range(1, _abi.MAX_FRONTENDS))
        self._freed: list[tuple[float, int]] = []
        self._acls = 0
        self._between: dict[int, int] = {}  # by offset in mesh_ports, flags of the ports where nodes' flows come in
        self._rules: dict[int, RuleSet] = {}  # by acl; several frontends may have one
        self._acl_of: dict[RuleSet, int] = {}
        self._ruled: set[Frontend] = set()  # frontends with source rules
        self._guarding: set[Frontend] = set()  # frontends with source rules, or UDP
        self._settings = _abi.CONFIG.unpack(self._config.read(0, _abi.CONFIG.size))
        self._clock = 0  # Unix time less CLOCK_MONOTONIC; 0: that of the settings
        self._restore()
        for frontend, entry in self.served.items():
            self._guard(frontend, rules=bool(entry.acl or entry.flags & _abi.FRONTEND_DENY))

    # ---- restore ----

    def _restore(self) -> None:
        """Read back what an earlier process left, and remove what is invalid."""
        for frontend, number in list(self._published()):
            row = self._frontends.read(number * FRONTEND.size, FRONTEND.size)
            table, flags, acl = codec.unpack_frontend(row)
            if table.size and not self.arenas.claim(table):
                self._unpublish(frontend)
                continue
            self.served[frontend] = Served(number, table, flags, acl)
        taken = {s.id for s in self.served.values()}
        self._free = [n for n in self._free if n not in taken]
        self._restore_rules()
        for key, source in self._networks.rows():
            owner, network = codec.unpack_network_key(key)
            self._networks_of.setdefault(owner, {})[network] = netaddr.unpack(source)
        data = self._backends.read(0, _abi.MAX_BACKENDS * BACKEND.size)
        empty = bytes(BACKEND.size)
        for number in range(_abi.OWNER_FIRST, _abi.MAX_BACKENDS):
            data_row = data[number * BACKEND.size : (number + 1) * BACKEND.size]
            if data_row != empty:
                self.backends[number] = BACKEND.unpack(data_row)

    def _restore_rules(self) -> None:
        """Take the rule sets that frontends have, and remove the others: a process was killed as it wrote them."""
        found: defaultdict[int, list[tuple[Network, int]]] = defaultdict(list)
        for key, value in self._acl.rows():
            acl, network = codec.unpack_acl_key(key)
            found[acl].append((network, codec.unpack_u32(value)))
        self._acls = max(found, default=0)
        used = {s.acl for s in self.served.values()}
        self._rules = {acl: frozenset(rules) for acl, rules in found.items() if acl in used}
        self._acl_of = {rules: acl for acl, rules in self._rules.items()}
        for acl in found.keys() - used:
            self._delete_rules(acl, (network for network, _ in found[acl]))

    def _published(self) -> Iterator[tuple[Frontend, int]]:
        """(frontend, id) of everything in mesh_ports and mesh_exact."""
        words = self._ports.read(0, self._ports.size)
        empty = bytes(8 * 256)
        for base in range(0, len(words), len(empty)):
            if words[base : base + len(empty)] == empty:
                continue
            for offset in range(base, base + len(empty), 8):
                word = codec.unpack_u32(words[offset : offset + 4])
                number = word & _abi.PORT_FRONTEND
                if flags := word & BETWEEN:
                    self._between[offset] = flags
                if number:
                    port, udp = offset // 8 % _abi.PORT_UDP, offset // 8 >= _abi.PORT_UDP
                    yield Frontend(ANY_ADDRESS, port, Protocol.UDP if udp else Protocol.TCP), number
        for key, value in self._exact.rows():
            yield codec.unpack_frontend_key(key), codec.unpack_u32(value)

    def pins(self) -> Mapping[Path, _bpf.Map]:
        """All maps by their pins."""
        return {self._directory / name: held for name, held in self._maps.items()} | self.arenas.pins()

    # ---- the node ----

    def configure(self, config: _abi.Config) -> None:
        """Write the settings of the whole node."""
        self._settings, self._clock = config, self._clock or config.clock
        self._write_settings()

    def _write_settings(self) -> None:
        guard = _abi.SETTING_GUARD if self._guarding else 0
        settings = self._settings.settings & ~_abi.SETTING_GUARD | guard
        self._config.write(0, _abi.CONFIG.pack(self._settings._replace(settings=settings, clock=self._clock)))

    def set_clock(self, clock: int) -> None:
        """Have the programs follow a change of the time of day. Any thread."""
        self._clock = clock
        self._config.store64(_abi.CONFIG.offsets["clock"], clock)

    def _guard(self, frontend: Frontend, *, rules: bool, served: bool = True) -> None:
        """Note whether a frontend has source rules, and whether packets with unknown ports may be meant for it and must
        not pass then."""
        held = bool(self._guarding)
        guarding = served and (rules or frontend.protocol is Protocol.UDP)
        (self._guarding.add if guarding else self._guarding.discard)(frontend)
        (self._ruled.add if served and rules else self._ruled.discard)(frontend)
        if held != bool(self._guarding):
            self._write_settings()

    @property
    def has_rules(self) -> bool:
        """Whether any frontend has source rules."""
        return bool(self._ruled)

    def leave(self) -> None:
        """Answer no more trials of the tunnel, until the next `configure`."""
        self.configure(self._settings._replace(settings=self._settings.settings | _abi.SETTING_LEAVING))

    def listen(self, tunnel: int, peer: int) -> None:
        """Accept other nodes' flows at this UDP port and at no other, and keep containers from it and from the peer
        port; 0: accept none, keep from none."""
        wanted: dict[int, int] = {}
        for port, protocol, flags in (
            (peer, Protocol.TCP, _abi.PORT_NODES),
            (peer, Protocol.UDP, _abi.PORT_NODES),
            (tunnel, Protocol.UDP, BETWEEN),
        ):
            if port:
                offset = codec.port_index(port, protocol) * self._ports.step
                wanted[offset] = wanted.get(offset, 0) | flags
        for offset in wanted.keys() | self._between.keys():
            flags = wanted.get(offset, 0)
            if flags != self._between.get(offset, 0):
                self._ports.store32(offset, self._ports.load32(offset) & ~BETWEEN | flags)
        self._between = wanted

    def set_addresses(self, addresses: Iterable[Address], floating: Collection[Address] = ()) -> None:
        """Make exactly these addresses the node's own. Flows to those in `floating` may have begun on another node."""
        kinds = codec.pack_u32(_abi.ADDRESS_OWN), codec.pack_u32(_abi.ADDRESS_FLOATING)
        wanted = {netaddr.pack(a): kinds[a in floating] for a in addresses}
        held = dict(self._addresses.rows())
        for key, kind in wanted.items():
            if held.get(key) != kind:
                self._addresses.update(key, kind)
        for key in held.keys() - wanted.keys():
            self._addresses.delete(key)

    # ---- backends ----

    def put_backends(self, entries: Mapping[int, _abi.Backend]) -> None:
        """Write backends. Their `epoch` is ignored, and increases where an id is given to another backend; so is their
        `frontend`, which `rule_backends` writes."""
        fresh = []
        for number, entry in entries.items():
            held = self.backends.get(number)
            same = held is not None and (held.address, held.port, held.protocol, held.seed) == (
                entry.address,
                entry.port,
                entry.protocol,
                entry.seed,
            )
            stays = same and held is not None and held.state != _abi.BACKEND_FREE
            epoch = (held.epoch if held else 0) + (0 if stays else 1)
            frontend = held.frontend if held is not None and stays else 0
            new = entry._replace(epoch=epoch & 0xFFFFFFFF, frontend=frontend)
            if new == held:
                continue
            if not same:
                fresh.append(number)
            self._write_backend(number, new, in_place=same)
        if fresh:
            self._zero("mesh_be_metrics", fresh)
            self._zero("mesh_be_failures", fresh)

    def put_networks(self, number: int, networks: Iterable[Network], source: Address | None) -> None:
        """Make these the networks that a backend has itself: it sees clients with addresses there by `source`, which
        is this node's; None: as they are.

        Networks for which there is no room are left out.
        """
        wanted: dict[Network, Address] = dict.fromkeys(networks, source) if source is not None else {}
        held = self._networks_of.pop(number, {})
        for network in held.keys() - wanted.keys():
            self._networks.delete(codec.pack_network_key(number, network))
        kept = {network: address for network, address in held.items() if wanted.get(network) == address}
        for network, address in wanted.items() - kept.items():
            with contextlib.suppress(BpfError):
                self._networks.update(codec.pack_network_key(number, network), netaddr.pack(address))
                kept[network] = address
        if kept:
            self._networks_of[number] = kept

    def _write_backend(self, number: int, new: _abi.Backend, *, in_place: bool) -> None:
        offset, row = number * BACKEND.size, BACKEND.pack(new)
        word, rest = BACKEND_STATE_WORD, BACKEND_STATE_WORD + codec.WORD
        if not in_place:  # a free id: nothing refers to it
            self._backends.store64(offset + word, 0)
            self._backends.write(offset, row[:word])
        self._backends.write(offset + rest, row[rest:])
        self._backends.store64(offset + word, codec.word_at(row, word))
        self.backends[number] = new

    def rule_backends(self, numbers: Iterable[int], frontend: Frontend) -> None:
        """Let a frontend's source rules hold for other nodes' flows for those of these backends that run here and have
        no frontend yet."""
        served = self.served.get(frontend)
        for number in numbers if served is not None else ():
            held = self.backends.get(number)
            if held is not None and served is not None and not held.frontend and not any(held.seed):
                self._write_backend(number, held._replace(frontend=served.id), in_place=True)

    def unrule_backends(self, frontends: Iterable[Frontend]) -> bool:
        """Take the rules of these frontends from all backends. Returns whether any had them."""
        gone = {self.served[frontend].id for frontend in frontends if frontend in self.served}
        found = [number for number, held in self.backends.items() if held.frontend in gone] if gone else []
        for number in found:
            self._write_backend(number, self.backends[number]._replace(frontend=0), in_place=True)
        return bool(found)

    def free_backends(self, numbers: Iterable[int]) -> None:
        """Mark backends as gone: their flows go to their slots' current owners. The epochs stay."""
        for number in numbers:
            held = self.backends.get(number)
            if held is not None and held.state != _abi.BACKEND_FREE:
                self._write_backend(number, held._replace(state=_abi.BACKEND_FREE), in_place=True)
                self.put_networks(number, (), None)

    # ---- frontends ----

    def put_frontend(
        self, frontend: Frontend, slots: bytes | None, flags: int, rules: Sequence[tuple[Network, int]] | None
    ) -> None:
        """Publish a frontend, or change it. Its rules are in force before its table is.

        Args:
            slots: its table as mesh_slot array; None: unchanged.
            rules: of its acl, each with ACL_ALLOW or ACL_DENY; None: unchanged.

        Raises:
            DatapathError: no room. A frontend that was served keeps its table, and its rules unless these are in force.
        """
        held = self.served.get(frontend)
        if held is None and slots is None:
            raise ValueError(f"{frontend} has no table yet")
        acl = self._put_rules(rules) if rules is not None else (held.acl if held else 0)
        self._guard(frontend, rules=bool(acl or flags & _abi.FRONTEND_DENY))
        if held is not None and (flags, acl) != (held.flags, held.acl):
            _, options = codec.frontend_words(held.table, flags, acl)
            self._frontends.store64(held.id * FRONTEND.size + _abi.FRONTEND_OPTIONS_WORD, options)
            self.served[frontend] = Served(held.id, held.table, flags, acl)
            self._forget_rules(held.acl)
        number = held.id if held is not None else 0
        try:
            number = number or self._new_id(frontend)
            table = self.arenas.publish(slots) if slots is not None else self.served[frontend].table
        except DatapathError:
            self._forget_rules(acl)
            if held is None:
                self._guard(frontend, rules=False, served=False)
                if number:
                    heapq.heappush(self._free, number)
            raise
        place, options = codec.frontend_words(table, flags, acl)
        if held is None:
            self._frontends.store64(number * FRONTEND.size + _abi.FRONTEND_OPTIONS_WORD, options)
        if held is None or table != held.table:
            self._frontends.store64(number * FRONTEND.size + _abi.FRONTEND_TABLE_WORD, place)
        self.served[frontend] = Served(number, table, flags, acl)
        if held is None:
            self._publish(frontend, number)
        elif table != held.table:
            self.arenas.retire(held.table)

    def _new_id(self, frontend: Frontend) -> int:
        now = time.monotonic()
        while self._freed and self._freed[0][0] <= now:
            heapq.heappush(self._free, self._freed.pop(0)[1])
        if not self._free and self._freed:
            time.sleep(GRACE)
            return self._new_id(frontend)
        if not self._free:
            raise DatapathError(f"no room for more than {_abi.MAX_FRONTENDS - 1} frontends", where=str(frontend))
        number = heapq.heappop(self._free)
        self._zero("mesh_fe_metrics", [number])
        self._zero("mesh_fe_failures", [number])
        return number

    def _publish(self, frontend: Frontend, number: int) -> None:
        offset = codec.port_index(frontend.port, frontend.protocol) * self._ports.step
        word = self._ports.load32(offset)
        if frontend.address == ANY_ADDRESS:
            self._ports.store32(offset, word & ~_abi.PORT_FRONTEND | number)
            return
        self._exact.update(codec.pack_frontend_key(frontend), codec.pack_u32(number))
        self._ports.store32(offset, word | _abi.PORT_EXACT)

    def _unpublish(self, frontend: Frontend) -> None:
        offset = codec.port_index(frontend.port, frontend.protocol) * self._ports.step
        word = self._ports.load32(offset)
        if frontend.address == ANY_ADDRESS:
            self._ports.store32(offset, word & ~_abi.PORT_FRONTEND)
            return
        self._exact.delete(codec.pack_frontend_key(frontend))
        others = (f for f in self.served if f != frontend and f.address != ANY_ADDRESS)
        if not any((f.port, f.protocol) == (frontend.port, frontend.protocol) for f in others):
            self._ports.store32(offset, word & ~_abi.PORT_EXACT)

    def drop_frontend(self, frontend: Frontend) -> None:
        """Stop serving a frontend: its packets pass to the kernel."""
        held = self.served.get(frontend)
        if held is None:
            return
        self._unpublish(frontend)
        self._guard(frontend, rules=False, served=False)
        del self.served[frontend]
        self._freed.append((time.monotonic() + GRACE, held.id))
        self.arenas.retire(held.table)
        self._forget_rules(held.acl)

    def read_table(self, frontend: Frontend) -> bytes:
        """The slots of a served frontend, as mesh_slot array."""
        return self.arenas.read(self.served[frontend].table)

    # ---- acl ----

    def rules_of(self, frontend: Frontend) -> RuleSet:
        """The rules that a served frontend has."""
        return self._rules.get(self.served[frontend].acl, frozenset())

    def _put_rules(self, rules: Sequence[tuple[Network, int]]) -> int:
        """The acl with just these rules, made if there is none. All or nothing."""
        wanted = frozenset(rules)
        if not wanted:
            return 0
        if wanted in self._acl_of:
            return self._acl_of[wanted]
        self._acls += 1
        written: list[Network] = []
        try:
            for network, action in rules:
                self._acl.update(codec.pack_acl_key(self._acls, network), codec.pack_u32(action))
                written.append(network)
        except BpfError as error:
            self._delete_rules(self._acls, written)
            if error.errno != errno.ENOSPC:
                raise
            raise DatapathError(
                f"no room for {len(rules)} prefixes of mesh.allow and mesh.deny",
                remedy=f"all services together have room for {self._acl.max_entries}; write wider networks",
            ) from None
        self._rules[self._acls], self._acl_of[wanted] = wanted, self._acls
        return self._acls

    def _forget_rules(self, acl: int) -> None:
        """Remove a rule set unless a frontend has it."""
        if acl in self._rules and all(s.acl != acl for s in self.served.values()):
            rules = self._rules.pop(acl)
            if self._acl_of.get(rules) == acl:
                del self._acl_of[rules]
            self._delete_rules(acl, (network for network, _ in rules))

    def _delete_rules(self, acl: int, networks: Iterable[Network]) -> None:
        for network in networks:
            self._acl.delete(codec.pack_acl_key(acl, network))

    # ---- counters and the flow cache ----

    def _zero(self, name: str, numbers: Sequence[int]) -> None:
        target = self._maps[name]
        target.update_batch(b"".join(map(codec.pack_u32, numbers)), bytes(target.stride * len(numbers)))

    def counts(self, name: str, limit: int) -> bytes:
        """The first `limit` rows of a per-CPU array, summed; any thread."""
        return self._maps[name].sums(limit)[1]

    def notes(self) -> Iterator[tuple[bytes, _abi.Note]]:
        """(flow as mesh_flow bytes, note) of the whole flow cache, flows of one packet included; any thread."""
        for name in ("mesh_flows", "mesh_flows_new"):
            for flow, note in self._maps[name].rows():
                yield flow, _abi.NOTE.unpack(note)

    def forget(self, flows: Iterable[Flow]) -> None:
        """Remove flows from the flow cache: their next packet is given an owner by the tables."""
        for flow in flows:
            key = _abi.FLOW.pack(
                _abi.Flow(
                    source=flow.source,
                    destination=flow.destination,
                    source_port=flow.source_port,
                    destination_port=flow.destination_port,
                    protocol=int(flow.protocol),
                )
            )
            for name in ("mesh_flows", "mesh_flows_new"):
                self._maps[name].delete(key)

    def size(self, name: str) -> int:
        """The capacity of a map, in entries."""
        return self._maps[name].max_entries

    def replies(self) -> Iterator[tuple[int, int, int]]:
        """(protocol, flags, stamp) of all of reverse NAT, except for backends that are gone; any thread."""
        dumps = [self._maps[name].dump() for name in ("mesh_revnat", "mesh_revnat_udp")]
        keys, values = (b"".join(parts) for parts in zip(*dumps, strict=True))
        names = ("owner", "epoch", "flags", "stamp")
        columns = [_abi.FLOW.column("protocol", keys), *(_abi.REVNAT.column(name, values) for name in names)]
        for protocol, owner, epoch, flags, stamp in zip(*columns, strict=True):
            backend = self.backends.get(owner)
            if backend is not None and backend.state != _abi.BACKEND_FREE and backend.epoch == epoch:
                yield protocol, flags, stamp

    def entries(self, name: str) -> int:
        """How many entries a hash holds; any thread."""
        source = self._maps[name]
        return len(source.dump()[0]) // source.key_size

    def carry_over(self, other: Path) -> None:
        """Copy the established flows from the pins of a build whose structs mean the same."""
        for name, former in CARRIED.items():
            pin = next((pin for pin in (other / name, other / former) if pin.exists()), None)
            if pin is None:
                continue
            source, target = _bpf.Map.open(str(pin)), self._maps[name]
            mixed = name == "mesh_revnat" and not (other / "mesh_revnat_udp").exists()
            if source.key_size != target.key_size or source.value_size > target.value_size:
                continue
            if mixed or source.value_size < target.value_size:
                self._convert(name, source, target.value_size - source.value_size)
            else:
                target.update_batch(*source.dump())

    def _convert(self, name: str, source: _bpf.Map, grown: int) -> None:
        """Copy a map of a build whose struct was `grown` bytes shorter: members are added at the end, and mean unknown
        by zeros. mesh_revnat had UDP flows as well."""
        rows: dict[str, list[tuple[bytes, bytes]]] = {}
        for key, value in source.rows():
            udp = name == "mesh_revnat" and _abi.FLOW.load("protocol", key) == Protocol.UDP
            rows.setdefault("mesh_revnat_udp" if udp else name, []).append((key, value + bytes(grown)))
        for into, pairs in rows.items():
            self._maps[into].update_batch(b"".join(k for k, _ in pairs), b"".join(v for _, v in pairs))

    def close(self) -> None:
        """Close the descriptors; pinned maps stay."""
        for each in self._maps.values():
            with contextlib.suppress(BpfError):
                each.close()
