# SPDX-License-Identifier: Apache-2.0
"""Where a flow goes by an engine's tables: the one look-up of all engines, of `explain` and of tests."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from mesh import netaddr
from mesh._maglev import hash_client, hash_flow, slot_of
from mesh.datapath.base import Applied, Choice, FrontendEntry
from mesh.model import ANY_ADDRESS, Address, Affinity, Flow, Frontend, Protocol

CHOICES: Final = 4  # backends that an answer names, the first choice included


def lookup(
    applied: Applied, flow: Flow, *, own: Container[Address] | None = None, choices: int = CHOICES
) -> Choice | None:
    """Where a new connection of this flow goes by the tables in `applied`; None: no frontend matches.

    Args:
        own: addresses to which a frontend on every address answers; None: to all.
        choices: how many backends the answer names at most, the first choice included.
    """
    entry = _match(applied, flow, own)
    if entry is None:
        return None
    hashed = _hash(entry, flow)
    slot = slot_of(hashed, entry.table.size)
    current, previous, _ = entry.table.slot(slot)
    named = frozenset(entry.backends)
    backends = {backend.id: backend for backend in applied.backends.values() if backend.id in named}
    following = (owner for owner in entry.table.choices(hashed, choices) if owner != current and owner in backends)
    return Choice(
        frontend=entry.state.frontend,
        hash=hashed,
        slot=slot,
        owner=current,
        previous=previous,
        backend=backends.get(current),
        next=tuple(backends[owner] for owner in following),
    )


def _match(applied: Applied, flow: Flow, own: Container[Address] | None) -> FrontendEntry | None:
    """The frontend of the exact address, else the one of every address."""
    addresses: list[Address] = [flow.destination]
    if (bare := netaddr.unmap(flow.destination)) != flow.destination:
        addresses.append(bare)
    if own is None or any(address in own for address in addresses):
        addresses.append(ANY_ADDRESS)
    protocol = Protocol(flow.protocol)
    found = (applied.frontends.get(Frontend(address, flow.destination_port, protocol)) for address in addresses)
    return next((entry for entry in found if entry is not None), None)


def _hash(entry: FrontendEntry, flow: Flow) -> int:
    source = netaddr.pack(flow.source)
    if entry.state.options.affinity is Affinity.CLIENT_IP:
        return hash_client(source)
    return hash_flow(
        source, flow.source_port, netaddr.pack(flow.destination), flow.destination_port, int(Protocol(flow.protocol))
    )
