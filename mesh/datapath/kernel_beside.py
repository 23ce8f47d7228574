# SPDX-License-Identifier: Apache-2.0
"""The proxy engine beside the kernel engine: it serves clients of the IP version that a task does not speak.

The programs leave such flows to the kernel (verdict FAMILY), which hands them to sockets on this node's own addresses
of that version. Tables are the same, so the proxy sends a flow to the task that the programs would have chosen.

It also keeps the peer port, at which nodes with the proxy engine hand over flows for the tasks of this one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mesh.config import Config
from mesh.datapath.base import Applied, BackendEntry, BackendKey, Counters, FrontendEntry, Plan, Signal, Stats
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend

if TYPE_CHECKING:
    from mesh.datapath.proxy import ProxyDatapath


def needed(applied: Applied, addresses: Iterable[Address]) -> dict[Frontend, FrontendEntry]:
    """The frontends that the proxy serves: (address of this node, port) by the frontend's own entry. Pure.

    Loopback addresses are left out: the socket hooks connect local processes whatever the version.
    """
    usable = sorted(
        (a for a in addresses if not (a.is_link_local or a.is_multicast or a.is_unspecified or a.is_loopback)),
        key=lambda a: (a.version, a),
    )
    found: dict[Frontend, FrontendEntry] = {}
    for frontend, entry in applied.frontends.items():
        versions = {10 - target.address.version for target in entry.state.targets}  # 4 needs 6, 6 needs 4
        chosen = usable if frontend.address == ANY_ADDRESS else [frontend.address]
        for address in chosen:
            if address.version in versions:
                found[dataclasses.replace(frontend, address=address)] = entry
    return found


def for_peers(applied: Applied) -> dict[BackendKey, BackendEntry]:
    """The backends for which other nodes may hand flows over: all that run here, where there are other nodes. Pure."""
    if len(applied.nodes or ()) < 2:
        return {}
    return {key: entry for key, entry in applied.backends.items() if entry.target.via is None}


def added(a: Counters, b: Counters) -> Counters:
    """Two rows of counters as one."""
    causes = {*a.failed, *b.failed}
    return Counters(
        opened=a.opened + b.opened,
        closed=a.closed + b.closed,
        active=a.active + b.active,
        retried=a.retried + b.retried,
        failed={cause: a.failed.get(cause, 0) + b.failed.get(cause, 0) for cause in causes},
        bytes_in=a.bytes_in + b.bytes_in,
        bytes_out=a.bytes_out + b.bytes_out,
        packets_in=a.packets_in + b.packets_in,
        packets_out=a.packets_out + b.packets_out,
        connect_seconds=tuple(x + y for x, y in zip(a.connect_seconds, b.connect_seconds, strict=True))
        if a.connect_seconds and b.connect_seconds
        else a.connect_seconds or b.connect_seconds,
        connect_seconds_sum=a.connect_seconds_sum + b.connect_seconds_sum,
    )


class Beside:
    """A ProxyDatapath that is started when the first frontend needs it, or the second node is known."""

    def __init__(self, config: Config, *, docker_host: bool) -> None:
        self._config = dataclasses.replace(config, threads=config.threads or 1)
        self._docker_host = docker_host
        self._proxy: ProxyDatapath | None = None
        self._applied = Applied()
        self._sources: dict[Frontend, FrontendEntry] = {}
        self._peers: tuple[object, ...] = ()
        self._problem = ""

    def apply(self, applied: Applied, addresses: Iterable[Address]) -> None:
        """Serve what `applied` needs on these addresses of the node. What fails is told by `problems`."""
        sources = needed(applied, addresses)
        same = sources.keys() == self._sources.keys() and all(self._sources[f] is e for f, e in sources.items())
        peers = for_peers(applied)
        same = same and self._peers == (applied.nodes, peers)
        if (same and not self._problem) or not (sources or peers or self._proxy):
            return
        try:
            self._carry_out(applied, sources, peers)
            self._peers = (applied.nodes, peers)
            self._problem = ""
        except (DatapathError, ImportError, OSError) as error:
            self._problem = (
                f"clients of the other IP version than their tasks', or of other nodes, are not served: {error}"
            )

    def _carry_out(
        self, applied: Applied, sources: Mapping[Frontend, FrontendEntry], peers: Mapping[BackendKey, BackendEntry]
    ) -> None:
        if self._proxy is None:
            from mesh.datapath.proxy import ProxyDatapath  # noqa: PLC0415 -- only where it is needed

            self._proxy = ProxyDatapath(self._config, docker_host=self._docker_host)
            self._proxy.open()
        entries = {
            frontend: self._applied.frontends[frontend]
            if self._sources.get(frontend) is source and frontend in self._applied.frontends
            else dataclasses.replace(source, state=dataclasses.replace(source.state, frontend=frontend))
            for frontend, source in sources.items()
        }
        used = {owner for entry in entries.values() for owner in entry.backends}
        backends = {key: entry for key, entry in applied.backends.items() if entry.id in used or key in peers}
        held = self._applied
        self._applied = self._proxy.apply(
            Plan(
                generation=applied.generation,
                put_backends=tuple(e for key, e in backends.items() if held.backends.get(key) != e),
                put_frontends=tuple(e for f, e in entries.items() if held.frontends.get(f) is not e),
                drop_frontends=tuple(f for f in held.frontends if f not in entries),
                drop_backends=tuple(e for key, e in held.backends.items() if key not in backends),
                put_nodes=applied.nodes,
                result=Applied(applied.generation, entries, backends, applied.nodes),
            )
        )
        self._sources = dict(sources)

    def problems(self) -> Sequence[str]:
        found = list(self._proxy.problems()) if self._proxy else []
        return [*found, self._problem] if self._problem else found

    def signals(self) -> Sequence[Signal]:
        return self._proxy.signals() if self._proxy else ()

    def merge(self, stats: Stats, applied: Applied) -> Stats:
        """The kernel engine's counters and the proxy's, under the frontends that the user knows."""
        if self._proxy is None:
            return stats
        ours = self._proxy.stats()
        frontends = dict(stats.frontends)
        backends: dict[tuple[Frontend, BackendKey], Counters] = dict(stats.backends)
        for frontend, row in ours.frontends.items():
            known = self._known(frontend, applied)
            if known in frontends:
                frontends[known] = added(frontends[known], row)
        for (frontend, key), row in ours.backends.items():
            pair = self._known(frontend, applied), key
            if pair[0] in applied.frontends and key in applied.backends:
                backends[pair] = added(backends.get(pair, Counters()), row)
        return dataclasses.replace(
            stats,
            frontends=frontends,
            backends=backends,
            gauges={**ours.gauges, **stats.gauges},
            totals={**ours.totals, **stats.totals},
        )

    @staticmethod
    def _known(frontend: Frontend, applied: Applied) -> Frontend:
        return frontend if frontend in applied.frontends else dataclasses.replace(frontend, address=ANY_ADDRESS)

    def drain(self, seconds: float) -> int:
        return self._proxy.drain(seconds) if self._proxy else 0

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.close(release=True)
            self._proxy = None
