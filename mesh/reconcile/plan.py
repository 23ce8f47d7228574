# SPDX-License-Identifier: Apache-2.0
"""The difference between what an engine holds and what it should hold, as steps that make before they break. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import replace

from mesh._abi import MAX_BACKENDS, MAX_FRONTENDS, OWNER_FIRST, OWNER_PASS
from mesh._maglev import SlotTable, backend_seed
from mesh.datapath.base import (
    Applied,
    BackendEntry,
    BackendKey,
    FrontendEntry,
    Plan,
    key_of,
)
from mesh.errors import DatapathError
from mesh.model import Address, DesiredState, Frontend, FrontendState, Target


def plan(applied: Applied, desired: DesiredState, reserved: Set[int] = frozenset()) -> Plan:
    """The steps from `applied` to `desired`; `plan(p.result, desired).empty` holds for each result `p`.

    A backend keeps its id for as long as it is held. A frontend that is the same keeps the very same table; one that
    changed gets a transition from its table, a new one a transition from PASS. A backend that left a frontend's
    targets under one port while it lives on under another stays until no flow can belong to it.

    Args:
        applied: what the engine holds.
        desired: what it should hold.
        reserved: ids freed so recently that something may still name them; not given out.

    Raises:
        DatapathError: more backends or frontends than the engines' maps have room for.
    """
    if len(desired.frontends) > MAX_FRONTENDS:
        raise DatapathError(
            f"{len(desired.frontends)} published ports, but there is room for {MAX_FRONTENDS}",
            where="plan",
            remedy="take services out with the label mesh.enable=false",
        )
    names = {entry.id: entry for entry in applied.backends.values()}
    changed = _changed(applied, desired)
    keys = _touched(applied, desired, names, changed)
    backends = _assign(applied, _wanted(desired, keys), keys, reserved)
    frontends = {
        frontend: _frontend(held, state, applied, names, backends)
        if (held := applied.frontends.get(frontend)) is None or frontend in changed
        else held
        for frontend, state in desired.frontends.items()
    }
    return _steps(applied, desired.generation, frontends, backends, desired.nodes, keys)


def _changed(applied: Applied, desired: DesiredState) -> set[Frontend]:
    """Frontends that are new, gone, doubtful or not known to be the same; others have the same targets under the same
    ids."""
    held = applied.frontends
    same = {
        frontend
        for frontend, state in desired.frontends.items()
        if (entry := held.get(frontend)) is not None
        and entry.state is state
        and not entry.doubtful
        and len(entry.backends) == len(state.targets)
    }
    return {*held, *desired.frontends} - same


def _touched(
    applied: Applied, desired: DesiredState, names: Mapping[int, BackendEntry], changed: Set[Frontend]
) -> set[BackendKey] | None:
    """Keys whose entries may have to change with these frontends; None: any may, as so many frontends do."""
    if 2 * len(changed) >= len(desired.frontends):
        return None
    keys = {entry.key for entry in applied.backends.values() if entry.doubtful}
    for frontend in changed:
        if (held := applied.frontends.get(frontend)) is not None:
            keys.update(_keys(held.state))
            keys.update(names[owner].key for owner in held.backends if owner in names)
        if (state := desired.frontends.get(frontend)) is not None:
            keys.update(_keys(state))
    return keys


def settle(applied: Applied, due: Collection[Frontend], live: Mapping[Frontend, frozenset[int]]) -> Plan:
    """The steps that take the tables of the frontends `due` out of their transition (after a long calm).

    Slots in `live` (Datapath.live_slots) stay in it: a flow in them would lose its backend.
    """
    frontends = dict(applied.frontends)
    for frontend in due:
        entry = frontends.get(frontend)
        if entry is not None and entry.table.tracked:
            table = entry.table.settled(live.get(frontend, frozenset()))
            ids = {applied.backends[key].id for key in _keys(entry.state) if key in applied.backends}
            frontends[frontend] = FrontendEntry(entry.state, table, _named(table, ids))
    used = {owner for entry in frontends.values() for owner in entry.backends}
    backends = {key: entry for key, entry in applied.backends.items() if entry.id in used}
    return _steps(applied, applied.generation, frontends, backends, applied.nodes)


def doubtful(applied: Applied, failed: Plan) -> Applied:
    """What an engine may hold after `failed` was carried out to an unknown part: whatever it touched is due again.

    Both ends of every step are in it, so that the next plan, whatever is desired by then, puts or drops each thing
    that was touched and gives no id of it to anybody else.
    """
    backends = dict(applied.backends) | {entry.key: entry for entry in failed.put_backends}
    for touched in (*failed.put_backends, *failed.drop_backends):
        backends[touched.key] = replace(touched, doubtful=True)
    frontends = dict(applied.frontends) | {entry.state.frontend: entry for entry in failed.put_frontends}
    for frontend in (*(entry.state.frontend for entry in failed.put_frontends), *failed.drop_frontends):
        frontends[frontend] = replace(frontends[frontend], doubtful=True)
    return Applied(applied.generation, frontends, backends, None if failed.put_nodes is not None else applied.nodes)


def _keys(state: FrontendState) -> Iterator[BackendKey]:
    return (key_of(state, target) for target in state.targets)


def _wanted(desired: DesiredState, keys: Set[BackendKey] | None) -> dict[BackendKey, Target]:
    """Every target by key, or those of these keys. Frontends that share a key share its first target's description."""
    wanted: dict[BackendKey, Target] = {}
    ids = None if keys is None else {key.backend for key in keys}
    for state in desired.frontends.values():
        for target in state.targets:
            if ids is None or target.backend in ids:
                wanted.setdefault(key_of(state, target), target)
    return wanted if keys is None else {key: target for key, target in wanted.items() if key in keys}


def _assign(
    applied: Applied, wanted: Mapping[BackendKey, Target], keys: Set[BackendKey] | None, reserved: Set[int]
) -> dict[BackendKey, BackendEntry]:
    """Entries for all wanted keys, beside those held for others than `keys`: known keys keep their id, new ones get the
    lowest that is free."""
    entries = dict(applied.backends) if keys is not None else {}
    for key in keys or ():
        entries.pop(key, None)
    new: list[BackendKey] = []
    for key, target in wanted.items():
        held = applied.backends.get(key)
        if held is None:
            new.append(key)
        elif not held.doubtful and (held.target is target or held.target == target):
            entries[key] = held
        else:
            entries[key] = BackendEntry(held.id, key, target)
    if not new:
        return entries
    count = len(entries) + len(new)
    used = {entry.id for entry in applied.backends.values()} | reserved
    free = (n for n in itertools.count(OWNER_FIRST) if n not in used)
    for key in sorted(new):
        number = next(free)
        if number >= MAX_BACKENDS:
            raise DatapathError(
                f"{count} backends, but there is room for {MAX_BACKENDS - OWNER_FIRST}",
                where="plan",
                remedy="take services out with the label mesh.enable=false",
            )
        entries[key] = BackendEntry(number, key, wanted[key])
    return entries


@functools.lru_cache(maxsize=8)
def _passing(size: int) -> SlotTable:
    return SlotTable.uniform(size, OWNER_PASS)


def _frontend(
    held: FrontendEntry | None,
    state: FrontendState,
    applied: Applied,
    names: Mapping[int, BackendEntry],
    backends: dict[BackendKey, BackendEntry],
) -> FrontendEntry:
    """The entry for one frontend. Entries of left ports that flows may still name are put into `backends`."""
    ids = {backends[key].id for key in _keys(state)}
    if held is None:
        table = _passing(state.options.table_size).transition(_build(state, backends))
        return FrontendEntry(state, table, _named(table, ids))
    if not held.doubtful and (held.state is state or held.state == state) and ids == set(held.backends):
        if held.state is state:
            return held
        return FrontendEntry(state, held.table, held.backends)  # the same state next time, by identity
    alive = {target.backend for target in state.targets}
    stale = [owner for owner in held.backends if owner not in ids]
    gone = frozenset(owner for owner in stale if owner not in names or names[owner].key.backend not in alive)
    same_size = held.table.size == state.options.table_size and held.state.punted == state.punted
    if not gone and not held.doubtful and same_size and _drawn(held.state, applied.backends) == _drawn(state, backends):
        entry = held if held.state == state else FrontendEntry(state, held.table, _named(held.table, ids))
    else:
        table = held.table.transition(_build(state, backends), gone)
        entry = FrontendEntry(state, table, _named(table, ids))
    _keep((owner for owner in entry.backends if owner not in ids), names, backends)
    return entry


def _keep(owners: Iterable[int], names: Mapping[int, BackendEntry], backends: dict[BackendKey, BackendEntry]) -> None:
    """Keep what flows may still name. One that is reached by another path now drains: its datagrams change over."""
    for owner in owners:
        entry = names.get(owner)
        if entry is not None and entry.key not in backends:
            if entry.doubtful:
                entry = replace(entry, doubtful=False)
            if entry.target.weight and any(other in backends for other in entry.key.on_other_paths()):
                entry = replace(entry, target=replace(entry.target, weight=0))
            backends[entry.key] = entry


def _drawn(state: FrontendState, backends: Mapping[BackendKey, BackendEntry]) -> list[tuple[BackendKey, int, int]]:
    """What a table is a function of, besides its size: key (hence seed), id and weight of all that get slots."""
    keyed = ((key_of(state, target), target.weight) for target in state.targets if target.weight)
    return sorted((key, backends[key].id if key in backends else 0, weight) for key, weight in keyed)


def _build(state: FrontendState, backends: Mapping[BackendKey, BackendEntry]) -> SlotTable:
    if state.punted:
        return _passing(state.options.table_size)
    return SlotTable.build(
        state.options.table_size,
        (
            (backend_seed(target.backend), backends[key_of(state, target)].id, target.weight)
            for target in state.targets
            if target.weight
        ),
    )


def _named(table: SlotTable, ids: Set[int]) -> tuple[int, ...]:
    return tuple(sorted(ids | {owner for owner in table.owners() if owner >= OWNER_FIRST}))


def _is_same(held: FrontendEntry | None, entry: FrontendEntry) -> bool:
    if held is None or held.doubtful or held.table is not entry.table:
        return False
    return held.backends == entry.backends and held.state == entry.state


def _steps(
    applied: Applied,
    generation: int,
    frontends: Mapping[Frontend, FrontendEntry],
    backends: Mapping[BackendKey, BackendEntry],
    nodes: tuple[Address, ...] | None,
    keys: Set[BackendKey] | None = None,
) -> Plan:
    """`keys`: of the backends that may differ; None: all may."""
    before, after = applied.backends, backends
    if keys is not None:
        ordered = sorted(keys)
        before, after = ({key: held[key] for key in ordered if key in held} for held in (before, after))
    return Plan(
        generation=generation,
        put_backends=tuple(
            entry for key, entry in after.items() if (held := before.get(key)) is not entry and held != entry
        ),
        put_frontends=tuple(
            entry
            for frontend, entry in frontends.items()
            if (was := applied.frontends.get(frontend)) is not entry and not _is_same(was, entry)
        ),
        drop_frontends=tuple(frontend for frontend in applied.frontends if frontend not in frontends),
        drop_backends=tuple(entry for key, entry in before.items() if key not in after),
        put_nodes=None if nodes == applied.nodes else nodes,
        result=Applied(generation, frontends, backends, nodes),
    )
