# SPDX-License-Identifier: Apache-2.0
"""The programs' maps in one pin directory: read back, publish. bpf/lib/maps.h has the order of steps."""

from __future__ import annotations

import contextlib
import heapq
import time
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
    "mesh_revnat": "mesh_replies",
    "mesh_revnat_new": "mesh_openings",
}


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
        self.reverse = maps["mesh_revnat"]
        self.arenas = Arenas(maps["mesh_arenas"], directory)
        self.served: dict[Frontend, Served] = {}
        self.backends: dict[int, _abi.Backend] = {}
        self._free: list[int] = list(range(1, _abi.MAX_FRONTENDS))
        self._freed: list[tuple[float, int]] = []
        self._acls = 0
        self._tunnel: set[int] = set()  # offsets in mesh_ports of the ports where other nodes' flows come in
        self._restore()

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
        rules = [codec.unpack_acl_key(key) for key in self._keys(self._acl)]
        self._acls = max((acl for acl, _ in rules), default=0)
        used = {s.acl for s in self.served.values()}
        self._drop_rules(rule for rule in rules if rule[0] not in used)
        data = self._backends.read(0, _abi.MAX_BACKENDS * BACKEND.size)
        empty = bytes(BACKEND.size)
        for number in range(_abi.OWNER_FIRST, _abi.MAX_BACKENDS):
            data_row = data[number * BACKEND.size : (number + 1) * BACKEND.size]
            if data_row != empty:
                self.backends[number] = BACKEND.unpack(data_row)

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
                if word & _abi.PORT_TUNNEL:
                    self._tunnel.add(offset)
                if number:
                    port, udp = offset // 8 % _abi.PORT_UDP, offset // 8 >= _abi.PORT_UDP
                    yield Frontend(ANY_ADDRESS, port, Protocol.UDP if udp else Protocol.TCP), number
        for key, value in self._exact.rows():
            yield codec.unpack_frontend_key(key), codec.unpack_u32(value)

    @staticmethod
    def _keys(source: _bpf.Map) -> list[bytes]:
        return [key for key, _ in source.rows()]

    def pins(self) -> Mapping[Path, _bpf.Map]:
        """All maps by their pins."""
        return {self._directory / name: held for name, held in self._maps.items()} | self.arenas.pins()

    # ---- the node ----

    def configure(self, config: _abi.Config) -> None:
        """Write the settings of the whole node."""
        self._config.write(0, _abi.CONFIG.pack(config))

    def listen(self, port: int) -> None:
        """Accept other nodes' flows at this UDP port and at no other; 0: at none."""
        wanted = {codec.port_index(port, Protocol.UDP) * self._ports.step} if port else set()
        for offset in wanted - self._tunnel:
            self._ports.store32(offset, self._ports.load32(offset) | _abi.PORT_TUNNEL)
        for offset in self._tunnel - wanted:
            self._ports.store32(offset, self._ports.load32(offset) & ~_abi.PORT_TUNNEL)
        self._tunnel = wanted

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
        """Write backends. Their `epoch` is ignored, and increases where an id is given to another backend."""
        fresh = []
        for number, entry in entries.items():
            held = self.backends.get(number)
            same = held is not None and (held.address, held.port, held.protocol, held.seed) == (
                entry.address,
                entry.port,
                entry.protocol,
                entry.seed,
            )
            epoch = (held.epoch if held else 0) + (0 if same and held and held.state else 1)
            new = entry._replace(epoch=epoch & 0xFFFFFFFF)
            if new == held:
                continue
            if not same:
                fresh.append(number)
            self._write_backend(number, new, in_place=same)
        if fresh:
            self._zero("mesh_be_metrics", fresh)

    def _write_backend(self, number: int, new: _abi.Backend, *, in_place: bool) -> None:
        offset, row = number * BACKEND.size, BACKEND.pack(new)
        word, rest = BACKEND_STATE_WORD, BACKEND_STATE_WORD + codec.WORD
        if not in_place:  # a free id: nothing refers to it
            self._backends.store64(offset + word, 0)
            self._backends.write(offset, row[:word])
        self._backends.write(offset + rest, row[rest:])
        self._backends.store64(offset + word, codec.word_at(row, word))
        self.backends[number] = new

    def free_backends(self, numbers: Iterable[int]) -> None:
        """Mark backends as gone: their flows go to their slots' current owners. The epochs stay."""
        for number in numbers:
            held = self.backends.get(number)
            if held is not None and held.state != _abi.BACKEND_FREE:
                self._write_backend(number, held._replace(state=_abi.BACKEND_FREE), in_place=True)

    # ---- frontends ----

    def put_frontend(
        self, frontend: Frontend, slots: bytes | None, flags: int, rules: Sequence[tuple[Network, int]] | None
    ) -> None:
        """Publish a frontend, or change it.

        Args:
            slots: its table as mesh_slot array; None: unchanged.
            rules: of its acl, each with ACL_ALLOW or ACL_DENY; None: unchanged.
        """
        held = self.served.get(frontend)
        if slots is not None:
            table = self.arenas.publish(slots)
        elif held is not None:
            table = held.table
        else:
            raise ValueError(f"{frontend} has no table yet")
        acl = self._put_rules(rules) if rules is not None else (held.acl if held else 0)
        number = held.id if held else self._new_id(frontend)
        place, options = codec.frontend_words(table, flags, acl)
        if held is None or (flags, acl) != (held.flags, held.acl):
            self._frontends.store64(number * FRONTEND.size + _abi.FRONTEND_OPTIONS_WORD, options)
        if held is None or table != held.table:
            self._frontends.store64(number * FRONTEND.size + _abi.FRONTEND_TABLE_WORD, place)
        self.served[frontend] = Served(number, table, flags, acl)
        if held is None:
            self._publish(frontend, number)
            return
        if table != held.table:
            self.arenas.retire(held.table)
        if acl != held.acl:
            self._forget_rules(held.acl)

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
        del self.served[frontend]
        self._freed.append((time.monotonic() + GRACE, held.id))
        self.arenas.retire(held.table)
        self._forget_rules(held.acl)

    def read_table(self, frontend: Frontend) -> bytes:
        """The slots of a served frontend, as mesh_slot array."""
        return self.arenas.read(self.served[frontend].table)

    # ---- acl ----

    def _put_rules(self, rules: Sequence[tuple[Network, int]]) -> int:
        if not rules:
            return 0
        self._acls += 1
        for network, action in rules:
            self._acl.update(codec.pack_acl_key(self._acls, network), codec.pack_u32(action))
        return self._acls

    def _forget_rules(self, acl: int) -> None:
        if acl:
            keys = (codec.unpack_acl_key(key) for key in self._keys(self._acl))
            self._drop_rules(rule for rule in keys if rule[0] == acl)

    def _drop_rules(self, rules: Iterable[tuple[int, Network]]) -> None:
        for acl, network in rules:
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
        keys, values = self._maps["mesh_revnat"].dump()
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
            if (source.key_size, source.value_size) == (target.key_size, target.value_size):
                target.update_batch(*source.dump())

    def close(self) -> None:
        """Close the descriptors; pinned maps stay."""
        for each in self._maps.values():
            with contextlib.suppress(BpfError):
                each.close()
