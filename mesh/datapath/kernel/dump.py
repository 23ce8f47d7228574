# SPDX-License-Identifier: Apache-2.0
"""Reads what the pinned maps of a node hold, with names: what the loaded programs forward by. Writes nothing.

Needs no daemon and disturbs none: a running daemon may change the maps meanwhile, so a frontend and its table are read
within the time for which the daemon leaves a replaced table alone (`arenas.GRACE`).
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mesh import _abi, _bpf, netaddr
from mesh._abi import OWNER_FIRST, OWNER_NONE, OWNER_PASS, SLOT
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import BackendEntry
from mesh.datapath.kernel import codec
from mesh.datapath.kernel.codec import Table
from mesh.datapath.kernel.journal import Journal, Names
from mesh.datapath.kernel.pins import CONTRACT, NAMES, netns_cookie, pin_home
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol
from mesh.netaddr import join_host_port

Json = dict[str, Any]

FLAGS: Final = (
    (_abi.FRONTEND_CLIENT, "client-ip"),
    (_abi.FRONTEND_DENY, "deny-others"),
    (_abi.FRONTEND_PASS_IF_NONE, "pass-if-none"),
    (_abi.FRONTEND_HOLD, "hold"),
)
STATES: Final = {_abi.BACKEND_FREE: "free", _abi.BACKEND_ACTIVE: "active", _abi.BACKEND_DRAINING: "draining"}
KINDS: Final = {_abi.ADDRESS_OWN: "own", _abi.ADDRESS_FLOATING: "floating"}
ACTIONS: Final = {_abi.ACL_ALLOW: "allow", _abi.ACL_DENY: "deny"}
REVERSE: Final = ("mesh_revnat", "mesh_revnat_udp", "mesh_revnat_new")
LOCAL: Final = _abi.Backend().seed  # mesh_backend.seed of a backend that runs here


def read(config: Config) -> Json:
    """The maps that the daemon of `config.state_dir` has, or had, pinned under `config.bpf_fs`.

    Returns:
        config {netns (this, none or the other one's cookie), hairpin, hairpin6, return_path, tunnel_port, error_rate},
        addresses [{address, kind}],
        frontends [{id, frontend, service, flags [str], acl, table_size, arena, offset, digest, tracked_slots,
        owners [{owner, name, current, previous}]}] (`current` and `previous` count slots; `previous` counts those in
        transition from this owner; digest "" where the slots make no sense),
        backends [{id, name, node, address, port, protocol, state, epoch, way, interface, bridge, mac, seed}] (way:
        here, own: an address of this node, nowhere: no route, tunnel, peer: handed over at that node's peer port),
        acl [{acl, source, action}],
        networks [{owner, name, network, source}] (those that a backend has itself, and this node's address by which it
        sees clients there),
        translated [{protocol, client, called, source, owner, name, closed}] (flows that their task sees by `source`),
        nodes [{address, source, interface, mtu, id}] (mtu 0: takes no tunnel),
        ids [{seed, port, protocol, owner, name}] (this node's backends as other nodes call them),
        tunnel_ports [port]: each sorted, names and nodes empty where the journal in the state directory has none.

    Raises:
        DatapathError: there are no maps of this build, or they cannot be opened.
    """
    directory = _directory(config)
    with contextlib.ExitStack() as stack:
        maps = {pin.name: _bpf.Map.open(str(pin)) for pin in sorted(directory.iterdir()) if not pin.is_dir()}
        for each in maps.values():
            stack.callback(each.close)
        return _Reader(maps, Journal(Path(config.state_dir) / NAMES).read()).all()


def _directory(config: Config) -> Path:
    """Where this build's maps are pinned."""
    home = pin_home(config)
    try:
        if (home / CONTRACT / "mesh_config").exists():
            return home / CONTRACT
        others = sorted(pin.parent.name for pin in home.glob("*/mesh_ports"))
    except OSError as error:
        raise DatapathError(f"{error.strerror}", where=str(home), remedy="run as root") from error
    if others:
        raise DatapathError(
            f"the maps are of another build ({', '.join(others)}; this is {CONTRACT})",
            where=str(home),
            remedy="run the `mesh` of that build",
        )
    raise DatapathError(
        "no maps of the kernel engine are pinned there",
        where=str(home),
        remedy="is its engine `proxy` (`mesh status`)? Set --state-dir and --bpf-fs as for `mesh run`, in its network "
        "namespace",
    )


class _Reader:
    """One reading of open maps, by the names of their pins."""

    def __init__(self, maps: Mapping[str, _bpf.Map], names: Names) -> None:
        self._maps = maps
        self._names = names
        self._nodes = {netaddr.unpack(key): _abi.NODE.unpack(value) for key, value in maps["mesh_nodes"].rows()}
        self._backends = dict(self._read_backends())
        self._arenas: dict[int, _bpf.Mapping] = {}

    def all(self) -> Json:
        return {
            "config": self._config(),
            "addresses": self._addresses(),
            "frontends": [self._frontend(frontend, number) for frontend, number in sorted(self._published())],
            "backends": [self._backend(number, slot) for number, slot in sorted(self._backends.items())],
            "acl": self._acl(),
            "networks": self._networks(),
            "translated": self._translated(),
            "nodes": [_node(address, slot) for address, slot in sorted(self._nodes.items(), key=_by_address)],
            "ids": self._ids(),
            "tunnel_ports": [index % _abi.PORT_UDP for index, word in self._port_words() if word & _abi.PORT_TUNNEL],
        }

    def _config(self) -> Json:
        found = _abi.CONFIG.unpack(self._maps["mesh_config"].lookup(codec.pack_u32(0)) or b"")
        cookies = {0: "none", netns_cookie(): "this"}
        return {
            "netns": cookies.get(found.netns_cookie, str(found.netns_cookie)),
            "hairpin": str(found.hairpin),
            "hairpin6": str(found.hairpin6),
            "return_path": "direct" if found.settings & _abi.SETTING_DIRECT else "tunnel",
            "tunnel_port": found.tunnel_port,
            "error_rate": found.error_rate,
        }

    def _addresses(self) -> list[Json]:
        rows = {netaddr.unpack(key): codec.unpack_u32(value) for key, value in self._maps["mesh_addresses"].rows()}
        return [
            {"address": str(address), "kind": KINDS.get(kind, str(kind))}
            for address, kind in sorted(rows.items(), key=_by_address)
        ]

    # ---- frontends ----

    def _port_words(self) -> Iterator[tuple[int, int]]:
        """(index, word) of mesh_ports where the word is not 0."""
        for key, value in self._maps["mesh_ports"].rows():
            if word := codec.unpack_u32(value[:4]):
                index = codec.unpack_u32(key)
                yield index, word

    def _published(self) -> Iterator[tuple[Frontend, int]]:
        for index, word in self._port_words():
            if number := word & _abi.PORT_FRONTEND:
                protocol = Protocol.UDP if index >= _abi.PORT_UDP else Protocol.TCP
                yield Frontend(ANY_ADDRESS, index % _abi.PORT_UDP, protocol), number
        for key, value in self._maps["mesh_exact"].rows():
            yield codec.unpack_frontend_key(key), codec.unpack_u32(value)

    def _frontend(self, frontend: Frontend, number: int) -> Json:
        row = self._maps["mesh_frontends"].lookup(codec.pack_u32(number)) or b""
        table, flags, acl = codec.unpack_frontend(row)
        state = self._names.frontends.get(frontend)
        found: Json = {
            "id": number,
            "frontend": str(frontend),
            "service": state.service_name if state is not None else "",
            "flags": [name for bit, name in FLAGS if flags & bit],
            "acl": acl,
            "table_size": table.size,
            "arena": table.arena,
            "offset": table.offset,
        }
        slots = self._slots(table)
        if slots is None:
            return found | {"digest": "", "tracked_slots": 0, "owners": []}
        current, previous = slots.shares(), self._previous(slots)
        owners = sorted({*current, *previous})
        return found | {
            "digest": slots.digest({owner: self._name(owner) for owner in owners}),
            "tracked_slots": slots.tracked_slots(),
            "owners": [
                {"owner": o, "name": self._name(o), "current": current.get(o, 0), "previous": previous.get(o, 0)}
                for o in owners
            ],
        }

    def _slots(self, table: Table) -> SlotTable | None:
        """A frontend's table; None where there is none, or none that makes sense."""
        if not table.size or f"arena_{table.arena}" not in self._maps:
            return None
        if table.arena not in self._arenas:
            self._arenas[table.arena] = _bpf.Mapping(self._maps[f"arena_{table.arena}"])
        length = table.size * SLOT.size
        try:
            return SlotTable.from_slots(self._arenas[table.arena].read(table.offset * SLOT.size, length))
        except (ValueError, IndexError):
            return None

    @staticmethod
    def _previous(slots: SlotTable) -> Counter[int]:
        """Slots in transition, by the owner that they come from."""
        each = (slots.slot(index) for index in range(slots.size if slots.tracked_slots() else 0))
        return Counter(previous for _, previous, tracked in each if tracked)

    # ---- backends and nodes ----

    def _read_backends(self) -> Iterator[tuple[int, _abi.Backend]]:
        rows, empty = self._maps["mesh_backends"].rows(), bytes(_abi.BACKEND.size)
        for key, value in rows:
            if value != empty and (slot := _abi.BACKEND.unpack(value)).state != _abi.BACKEND_FREE:
                yield codec.unpack_u32(key), slot

    def _entry(self, number: int) -> BackendEntry | None:
        """What the journal says of a backend, if it says it of this one."""
        entry, slot = self._names.backends.get(number), self._backends.get(number)
        if entry is None or slot is None:
            return None
        address = entry.target.via or entry.target.address
        fits = (address, entry.key.port, entry.key.protocol) == (slot.address, slot.port, slot.protocol)
        return entry if fits else None

    def _name(self, owner: int) -> str:
        if owner < OWNER_FIRST:
            return {OWNER_NONE: "none", OWNER_PASS: "pass"}[owner]
        entry = self._entry(owner)
        if entry is not None:
            return entry.key.backend
        return f"backend {owner}" if owner in self._backends else f"gone {owner}"

    def _backend(self, number: int, slot: _abi.Backend) -> Json:
        entry = self._entry(number)
        return {
            "id": number,
            "name": self._name(number),
            "node": entry.target.node if entry is not None else "",
            "address": str(slot.address),
            "port": slot.port,
            "protocol": str(Protocol(slot.protocol)),
            "state": STATES.get(slot.state, str(slot.state)),
            "epoch": slot.epoch,
            "path": self._path(slot),
            "handed": slot.seed == LOCAL or bool(slot.handed),
            "interface": _interface(slot.ifindex),
            "bridge": _interface(slot.bridge) if slot.bridge != _abi.LOOPBACK else "",
            "mac": slot.mac.hex(":") if any(slot.mac) else "",
            "seed": slot.seed.hex() if slot.seed != LOCAL else "",
        }

    def _path(self, slot: _abi.Backend) -> str:
        if slot.seed != LOCAL:
            node = self._nodes.get(slot.address)
            return "tunnel" if node is not None and node.mtu else "peer"
        if slot.bridge == _abi.LOOPBACK:
            return "own"
        return "here" if slot.ifindex or slot.bridge else "nowhere"

    def _ids(self) -> list[Json]:
        found = []
        for key, value in self._maps["mesh_ids"].rows():
            ident = _abi.ID.unpack(key)
            owner = codec.unpack_u32(value)
            name = {"owner": owner, "name": self._name(owner)}
            protocol = str(Protocol(ident.protocol))
            found.append({"seed": ident.seed.hex(), "port": ident.port, "protocol": protocol, **name})
        return sorted(found, key=lambda row: (row["owner"], row["seed"]))

    def _acl(self) -> list[Json]:
        rows = [(codec.unpack_acl_key(key), codec.unpack_u32(value)) for key, value in self._maps["mesh_acl"].rows()]
        rows.sort(key=lambda row: (row[0][0], row[0][1].version, row[0][1]))
        return [
            {"acl": acl, "source": str(network), "action": ACTIONS.get(action, str(action))}
            for (acl, network), action in rows
        ]

    def _networks(self) -> list[Json]:
        held = self._maps["mesh_networks"].rows()
        rows = [(*codec.unpack_network_key(key), netaddr.unpack(value)) for key, value in held]
        rows.sort(key=lambda row: (row[0], row[1].version, row[1]))
        return [
            {"owner": owner, "name": self._name(owner), "network": str(network), "source": str(source)}
            for owner, network, source in rows
        ]

    def _translated(self) -> list[Json]:
        found = []
        for name in REVERSE:
            keys, values = self._maps[name].dump()
            for at in _abi.REVNAT.rows_with("flags", _abi.REVNAT_TRANSLATED, values):
                key = _abi.FLOW.unpack(keys[at * _abi.FLOW.size : (at + 1) * _abi.FLOW.size])
                entry = _abi.REVNAT.unpack(values[at * _abi.REVNAT.size : (at + 1) * _abi.REVNAT.size])
                found.append(
                    {
                        "protocol": str(Protocol(key.protocol)),
                        "client": join_host_port(str(entry.client), entry.client_port),
                        "called": join_host_port(str(entry.called), entry.called_port),
                        "source": join_host_port(str(key.source), key.source_port),
                        "owner": entry.owner,
                        "name": self._name(entry.owner),
                        "closed": entry.flags & codec.REVNAT_CLOSED == codec.REVNAT_CLOSED,
                    }
                )
        return sorted(found, key=lambda row: (row["protocol"], row["client"], row["called"]))


def _node(address: Address, slot: _abi.Node) -> Json:
    return {
        "address": str(address),
        "source": str(slot.source),
        "interface": _interface(slot.ifindex),
        "mtu": slot.mtu,
        "id": slot.id,
        "proves": bool(slot.flags & _abi.NODE_PROVE),
        "demands": bool(slot.flags & _abi.NODE_DEMAND),
        "keys": [f"{key.name:04x}" for key in _abi.NODE_KEY.unpack_rows(slot.keys) if key.valid],
        "unproven": slot.unproven,
    }


def _by_address(row: tuple[Address, object]) -> tuple[int, bytes]:
    return row[0].version, row[0].packed


def _interface(index: int) -> str:
    """The name of an interface of this network namespace, its number where it is not here, empty for 0."""
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return str(index)
