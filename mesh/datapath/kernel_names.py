# SPDX-License-Identifier: Apache-2.0
"""The names of what the pinned maps hold: kept in a file, because maps hold addresses and numbers only.

The maps are the truth; the file only names things. Without it, or with one that tells of other things, an agent takes
what it finds under names of its own, and the next plan replaces them while connections go on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from mesh.datapath.base import BackendEntry, BackendKey
from mesh.model import (
    Affinity,
    Frontend,
    FrontendState,
    HealthCheck,
    Locality,
    ProbeKind,
    Protocol,
    ProxyProtocol,
    ServiceOptions,
    Target,
)

VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Names:
    """What the file says."""

    generation: int = 0
    backends: dict[int, BackendEntry] = field(default_factory=dict)
    frontends: dict[Frontend, FrontendState] = field(default_factory=dict)


def _target_out(target: Target) -> list[Any]:
    place = [target.backend, str(target.address), target.port, target.weight, target.local]
    return [*place, target.node, target.container, str(target.via or ""), target.engine]


def _target_in(row: list[Any]) -> Target:
    backend, address, port, weight, local, node, container, via, engine = row
    away = ipaddress.ip_address(via) if via else None
    return Target(backend, ipaddress.ip_address(address), port, weight, local, node, container, away, engine)


def _options_out(options: ServiceOptions) -> dict[str, Any]:
    health = options.health
    return {
        "enable": options.enable,
        "affinity": options.affinity.value,
        "proxy_protocol": options.proxy_protocol.value,
        "health": [health.kind.value, health.path, health.interval, health.timeout, health.rise, health.fall],
        "table_size": options.table_size,
        "locality": options.locality.value,
        "allow": [str(network) for network in options.allow],
        "deny": [str(network) for network in options.deny],
    }


def _options_in(row: dict[str, Any]) -> ServiceOptions:
    kind, *rest = row["health"]
    return ServiceOptions(
        enable=row["enable"],
        affinity=Affinity(row["affinity"]),
        proxy_protocol=ProxyProtocol(row["proxy_protocol"]),
        health=HealthCheck(ProbeKind(kind), *rest),
        table_size=row["table_size"],
        locality=Locality(row["locality"]),
        allow=tuple(ipaddress.ip_network(text) for text in row["allow"]),
        deny=tuple(ipaddress.ip_network(text) for text in row["deny"]),
    )


def _frontend_out(state: FrontendState) -> dict[str, Any]:
    frontend = state.frontend
    return {
        "frontend": [str(frontend.address), frontend.port, int(frontend.protocol)],
        "service": [state.service, state.service_name],
        "options": _options_out(state.options),
        "targets": [_target_out(target) for target in state.targets],
        "panic": state.panic,
    }


def _frontend_in(row: dict[str, Any]) -> FrontendState:
    address, port, protocol = row["frontend"]
    service, name = row["service"]
    return FrontendState(
        frontend=Frontend(ipaddress.ip_address(address), port, Protocol(protocol)),
        service=service,
        service_name=name,
        options=_options_in(row["options"]),
        targets=tuple(_target_in(target) for target in row["targets"]),
        panic=row["panic"],
    )


def _backend_out(entry: BackendEntry) -> list[Any]:
    return [entry.id, entry.key.backend, entry.key.port, entry.key.protocol, _target_out(entry.target)]


def _backend_in(row: list[Any]) -> BackendEntry:
    number, backend, port, protocol, target = row
    return BackendEntry(number, BackendKey(backend, port, protocol), _target_in(target))


class NamesFile:
    """One file, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[Any, tuple[Any, msgspec.Raw]] = {}  # by id or frontend: what was encoded, and its text

    def read(self) -> Names:
        """What it says; nothing where it is absent, of another version or damaged."""
        try:
            row = msgspec.json.decode(self._path.read_bytes())
            if row["version"] != VERSION:
                return Names()
            backends = [_backend_in(each) for each in row["backends"]]
            frontends = [_frontend_in(each) for each in row["frontends"]]
            return Names(row["generation"], {b.id: b for b in backends}, {f.frontend: f for f in frontends})
        except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
            return Names()

    def write(self, generation: int, backends: Iterable[BackendEntry], frontends: Iterable[FrontendState]) -> None:
        """Replace it."""
        row = {
            "version": VERSION,
            "generation": generation,
            "backends": [self._row(entry.id, entry, _backend_out) for entry in backends],
            "frontends": [self._row(state.frontend, state, _frontend_out) for state in frontends],
        }
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(row))
        os.replace(partial, self._path)  # noqa: PTH105

    def _row(self, key: Any, value: Any, encode: Callable[[Any], Any]) -> msgspec.Raw:
        """Most rows are those of the last time: the very same objects."""
        held = self._rows.get(key)
        if held is None or held[0] is not value:
            held = self._rows[key] = (value, msgspec.Raw(msgspec.json.encode(encode(value))))
        return held[1]

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
