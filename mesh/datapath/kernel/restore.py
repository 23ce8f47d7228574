# SPDX-License-Identifier: Apache-2.0
"""Restores what an earlier process left, as an Applied: from the maps, or from the journal alone."""

from __future__ import annotations

import dataclasses
import ipaddress
import time
from typing import Final

from mesh import _abi, _bpf, netaddr
from mesh._maglev import SlotTable, backend_seed, hash_flow
from mesh.datapath.base import Applied, BackendEntry, BackendKey, FrontendEntry, key_of
from mesh.datapath.kernel import codec, stats
from mesh.datapath.kernel.acl import compile_rules
from mesh.datapath.kernel.arenas import GRACE
from mesh.datapath.kernel.journal import Names
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.publisher import flags_of
from mesh.datapath.kernel.tunnel import seed_of
from mesh.errors import DatapathError
from mesh.model import Address, Flow, Frontend, FrontendState, Protocol, ServiceOptions, Target

LOCAL: Final = _abi.Backend().seed  # mesh_backend.seed of a backend that runs here


def from_maps(maps: KernelMaps, names: Names, nodes: tuple[Address, ...], *, pass_if_none: bool) -> Applied:
    """What the maps hold, with the journal's names where they match, else with made-up ones.

    What the journal has in doubt, and what the maps contradict, is `doubtful`.

    Args:
        nodes: as the maps hold them.
        pass_if_none: the flag that frontends should have.
    """
    backends: dict[BackendKey, BackendEntry] = {}
    for number, slot in maps.backends.items():
        if slot.state == _abi.BACKEND_FREE:
            continue
        entry = _entry(number, slot, names)
        backends[entry.key] = entry
    frontends: dict[Frontend, FrontendEntry] = {}
    for frontend in list(maps.served):
        try:
            table = SlotTable.from_slots(maps.read_table(frontend))
        except ValueError:
            maps.drop_frontend(frontend)
            continue
        state = names.frontends.get(frontend) or FrontendState(frontend, "", "", ServiceOptions(table_size=table.size))
        keys = (key_of(state, target) for target in state.targets)
        ids = {backends[key].id for key in keys if key in backends}
        ids |= {owner for owner in table.owners() if owner >= _abi.OWNER_FIRST}
        doubtful = (
            frontend in names.doubt.frontends
            or not _serves(maps, frontend, state, pass_if_none=pass_if_none)
            or (not state.punted and _is_handed_back(table))
        )
        frontends[frontend] = FrontendEntry(state, table, tuple(sorted(ids)), doubtful)
    return Applied(names.generation, frontends, backends, nodes)


def _entry(number: int, slot: _abi.Backend, names: Names) -> BackendEntry:
    """A backend of the maps."""
    held = slot.address, slot.port, slot.protocol, slot.seed
    weight = 0 if slot.state == _abi.BACKEND_DRAINING else 1
    known = (names.backends.get(number), names.doubt.former.get(number))
    for entry in known:
        if entry is not None and _published(entry) == held:
            same = bool(entry.target.weight) == bool(weight)
            target = entry.target if same else dataclasses.replace(entry.target, weight=weight)
            return BackendEntry(number, entry.key, target, not same or number in names.doubt.backends)
    key = BackendKey(f"restored-{number}", slot.port, slot.protocol)
    away = slot.address if slot.seed != LOCAL else None
    return BackendEntry(number, key, Target(key.backend, slot.address, slot.port, weight, local=away is None, via=away))


def _serves(maps: KernelMaps, frontend: Frontend, state: FrontendState, *, pass_if_none: bool) -> bool:
    """Whether the maps hold the options of a frontend and enforce its rules; of a table's weights they do not tell."""
    options = state.options
    same = maps.served[frontend].flags == flags_of(options, pass_if_none=pass_if_none)
    return same and maps.rules_of(frontend) == frozenset(compile_rules(options.allow, options.deny))


def _is_handed_back(table: SlotTable) -> bool:
    """Whether all new flows are left to the kernel: `cleanup.hand_back` does so, and the journal does not tell."""
    return table.shares().keys() == {_abi.OWNER_PASS}


def joined(built: Applied, held: Applied) -> Applied:
    """Tables that were built to be published, and those that the maps hold: these stay, under the names they have."""
    frontends = {**built.frontends, **held.frontends}
    return Applied(built.generation, frontends, {**built.backends, **held.backends}, built.nodes)


def rejoined(maps: KernelMaps, applied: Applied) -> Applied:
    """Publish the tables of an agent that was away for so long that they were orphaned; they still are.

    Flows that started meanwhile are noted as the kernel's, all others belong to their slots' owners. So every slot
    becomes one whose notes count. Waits until no program reads the tables of before.
    """
    tables = {f: codec.track(entry.table.to_bytes()) for f, entry in applied.frontends.items() if f in maps.served}
    maps.arenas.reserve(len(table) // _abi.SLOT.size for table in tables.values())
    for frontend, table in tables.items():
        maps.put_frontend(frontend, table, maps.served[frontend].flags, None)
    if tables:
        time.sleep(GRACE)
    frontends = {
        f: dataclasses.replace(entry, table=SlotTable.from_slots(tables[f])) if f in tables else entry
        for f, entry in applied.frontends.items()
    }
    return dataclasses.replace(applied, frontends=frontends)


def _published(entry: BackendEntry) -> tuple[Address, int, int, bytes]:
    """What the maps should hold for a backend."""
    away = entry.target.via
    return away or entry.target.address, entry.key.port, entry.key.protocol, seed_of(entry.key) if away else LOCAL


def from_journal(names: Names) -> Applied:
    """The same tables from the journal, where the maps are of another contract.

    Connections stay where they are, except those of slots that were in transition.
    """
    entries = {entry.key: entry for entry in names.backends.values()}
    frontends: dict[Frontend, FrontendEntry] = {}
    for frontend, state in names.frontends.items():
        keys = [key_of(state, target) for target in state.targets]
        held = [(t, entries[key].id) for t, key in zip(state.targets, keys, strict=True) if key in entries]
        seeds = [(backend_seed(t.backend), number, t.weight) for t, number in held]
        size = state.options.table_size
        table = SlotTable.uniform(size, _abi.OWNER_PASS) if state.punted else SlotTable.build(size, seeds)
        frontends[frontend] = FrontendEntry(state, table, tuple(sorted(number for _, number in held)))
    return Applied(names.generation, frontends, entries, names.nodes)


def check_hash(program: _bpf.Program) -> None:
    """Check by the loaded mesh_explain that programs and user space hash alike; nodes would disagree otherwise.

    Raises:
        DatapathError: they hash differently.
    """
    addresses = ipaddress.ip_address("198.51.100.7"), ipaddress.ip_address("192.0.2.1")
    flow = Flow(addresses[0], 40000, addresses[1], 9, Protocol.TCP)
    source, destination = netaddr.pack(flow.source), netaddr.pack(flow.destination)
    expected = hash_flow(source, flow.source_port, destination, flow.destination_port, int(flow.protocol))
    found = stats.explain(program, flow)
    if found.hash != expected:
        raise DatapathError(
            f"the loaded program hashes a known flow to {found.hash:#x}, not {expected:#x}",
            where="kernel engine",
            remedy="build the package again",
        )
