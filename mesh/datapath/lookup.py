# SPDX-License-Identifier: Apache-2.0
"""Where a flow goes by an engine's tables: the one look-up, for both engines, `explain` and tests."""

from __future__ import annotations

import ipaddress

from mesh._maglev import hash_client, hash_flow, slot_of
from mesh.datapath.base import Applied, BackendEntry, Choice, FrontendEntry
from mesh.model import ANY_ADDRESS, Address, Affinity, Flow, Frontend


def mapped(address: Address) -> bytes:
    """An address as 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2)."""
    packed = address.packed
    return packed if len(packed) == 16 else b"\x00" * 10 + b"\xff\xff" + packed


def lookup(applied: Applied, flow: Flow) -> Choice | None:
    """Where a new connection of this flow goes by the tables in `applied`; None where no frontend matches."""
    entry = _match(applied, flow)
    if entry is None:
        return None
    source = mapped(flow.source)
    if entry.state.options.affinity is Affinity.CLIENT_IP:
        hashed = hash_client(source)
    else:
        destination = mapped(flow.destination)
        hashed = hash_flow(source, flow.source_port, destination, flow.destination_port, int(flow.protocol))
    slot = slot_of(hashed, entry.table.size)
    current, previous, _ = entry.table.slot(slot)
    entries = {e.id: e for e in applied.backends.values() if e.id in entry.backends}
    choices: list[BackendEntry] = [entries[o] for o in entry.table.choices(hashed) if o in entries]
    following = tuple(c for c in choices if c.id != current)
    return Choice(entry.state.frontend, hashed, slot, current, previous, entries.get(current), following)


def _match(applied: Applied, flow: Flow) -> FrontendEntry | None:
    """The frontend of the exact address, else the one of every address."""
    candidates: list[Address] = [flow.destination, ANY_ADDRESS]
    if isinstance(flow.destination, ipaddress.IPv6Address) and flow.destination.ipv4_mapped:
        candidates.insert(1, flow.destination.ipv4_mapped)
    for address in candidates:
        entry = applied.frontends.get(Frontend(address, flow.destination_port, flow.protocol))
        if entry is not None:
            return entry
    return None
