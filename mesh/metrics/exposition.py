# SPDX-License-Identifier: Apache-2.0
"""Turns the engine's counters and the agent's state into the text that Prometheus scrapes. No number is kept here.

The text is written directly: at 10,000 backends a scrape has over 10^5 samples, for which prometheus_client's general
encoder takes most of a second. It still chooses the format and writes the process's own metrics. The text around the
numbers is kept from scrape to scrape, for as long as the things that it names are the same.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import prometheus_client
from prometheus_client.exposition import choose_encoder

from mesh.api.view import Json, Verdict
from mesh.datapath.base import BackendKey, Stats
from mesh.datapath.counters import CounterTable
from mesh.incremental import KeyedCache, Latest
from mesh.metrics import families as f
from mesh.metrics import series
from mesh.metrics.families import Family, Kind
from mesh.metrics.series import Blocks, Series, escape, labelled
from mesh.model import Frontend

Rows = dict[Family, list[str]]

PROCESS: Final = prometheus_client.CollectorRegistry()
prometheus_client.ProcessCollector(registry=PROCESS)
prometheus_client.GCCollector(registry=PROCESS)

_HELP_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_EOF: Final = b"# EOF\n"
_ORDER: Final = {family: i for i, family in enumerate(f.FAMILIES)}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one scrape shows, taken at one moment."""

    stats: Stats
    state: Json
    ready: bool
    nodes: Sequence[Json] = ()  # of the cluster, as AgentView.nodes lists them


class Exposition:
    """Writes scrapes, on any thread. It keeps the text around the numbers between scrapes, never a number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._services = _Services()
        self._frontends: Series[Frontend] = Series(
            _frontend_labels,
            single={
                f.OPENED: series.opened,
                f.CLOSED: series.closed,
                f.ACTIVE: series.active,
                f.RETRIED: series.retried,
                f.UNANSWERED: series.unanswered,
            },
            double={f.BYTES: (*series.BYTES, False), f.PACKETS: (*series.PACKETS, False)},
            failed=f.FAILED,
            connect=f.CONNECT,
            histogram=True,
        )
        self._backends: Series[tuple[Frontend, BackendKey]] = Series(
            _backend_labels,
            single={
                f.BACKEND_OPENED: series.opened,
                f.BACKEND_ACTIVE: series.active,
                f.BACKEND_RETRIED: series.retried,
            },
            double={f.BACKEND_BYTES: (*series.BYTES, False), f.BACKEND_PACKETS: (*series.PACKETS, True)},
            failed=f.BACKEND_FAILED,
            connect=f.BACKEND_CONNECT,
            histogram=False,
        )

    def render(self, snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, by the scraper's Accept header: OpenMetrics 1.0 or text 0.0.4."""
        encoder, content_type = choose_encoder(accept)
        openmetrics = content_type.startswith("application/openmetrics-text")
        parts: list[bytes] = []
        for family, lines in self.collect(snapshot).items():
            name = family.name.removesuffix("_total") if openmetrics else family.name
            help_text = family.help.translate(_HELP_ESCAPES) if openmetrics else family.help
            parts += (f"# HELP {name} {help_text}\n# TYPE {name} {family.kind.value}".encode(), lines)
        # One copy of the whole, which is megabytes: none more to put something before or behind it.
        parts += (encoder(PROCESS).removesuffix(_EOF) + _EOF if openmetrics else encoder(PROCESS),)
        return b"\n".join(parts), content_type

    def collect(self, snapshot: Snapshot) -> Blocks:
        """Sample lines by family, in the order of FAMILIES; families without samples are left out."""
        state, stats = snapshot.state, snapshot.stats
        agent: Rows = defaultdict(list)
        _agent(agent, state, snapshot.ready)
        agent[f.NODE_UP] = [_line(f.NODE_UP, labelled(node=name), up) for name, up in _up(snapshot.nodes).items()]
        agent[f.VERDICTS] = [_line(f.VERDICTS, labelled(verdict=k), v) for k, v in stats.verdicts.items()]
        found = {family: "\n".join(lines).encode() for family, lines in agent.items()}
        with self._lock:
            found |= self._services.blocks(state["services"])
            found |= self._frontends.blocks(CounterTable.of(stats.frontends), self._services.names)
            found |= self._backends.blocks(CounterTable.of(stats.backends), self._services.names)
        result = {family: found[family] for family in sorted(found, key=_ORDER.__getitem__) if found[family]}
        for kind, values in ((Kind.GAUGE, stats.gauges), (Kind.COUNTER, stats.totals)):
            for name in sorted(values):
                family = f.engine_family(name, kind)
                result[family] = _line(family, "", values[name]).encode()
        return result


def render(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """One scrape by itself."""
    return Exposition().render(snapshot, accept)


def collect(snapshot: Snapshot) -> Blocks:
    """One scrape by itself, by family."""
    return Exposition().collect(snapshot)


def _up(nodes: Sequence[Json]) -> dict[str, int]:
    """Whether nodes are up, by name. Of several with one name (a node that left and joined again) one suffices."""
    found: dict[str, int] = {}
    for node in nodes:
        name = node["name"] or node["id"]
        found[name] = max(found.get(name, 0), int(node["up"]))
    return found


def _traffic(lines: Rows, state: Json) -> None:
    def put(family: Family, value: float, **labels: object) -> None:
        lines[family].append(_line(family, labelled(**labels), value))

    for path in state["paths"]:
        put(f.PATH_UP, int(path["state"] == "up"), node=path["node_name"], path=path["path"])
    for verdict in Verdict:
        put(f.TRAFFIC, int(verdict.value == state["traffic"]["verdict"]), verdict=verdict.value)
    if state["traffic"]["verdict"] == Verdict.OK.value:
        return
    masked = {(s["name"], t["node_name"], t["backend"]) for s in state["services"] for t in _masked(s)}
    for (service, node), count in sorted(Counter(row[:2] for row in masked).items()):
        put(f.BACKENDS_MASKED, count, service=service, node=node)


def _masked(service: Json) -> Iterator[Json]:
    return (target for frontend in service["frontends"] for target in frontend["targets"] if target["masked"])


def _agent(lines: Rows, state: Json, ready: bool) -> None:
    def put(family: Family, value: float, **labels: object) -> None:
        lines[family].append(_line(family, labelled(**labels), value))

    put(f.BUILD_INFO, 1, version=state["version"], abi=state["abi"], engine=state["engine"])
    put(f.START_TIME, state["started"])
    put(f.READY, int(ready))
    put(f.STOPPING, int(state["stopping"]))
    put(f.PROBLEMS, len(state["problems"]))
    put(f.PATHS_DOWN, state["paths_down"])
    put(f.PATHS_REFUSED, state["paths_refused"])
    _traffic(lines, state)
    provider = state["provider"]
    put(f.PROVIDER_CONNECTED, int(provider["connected"]), provider=provider["kind"])
    if provider["age_seconds"] is not None:
        put(f.PROVIDER_AGE, provider["age_seconds"], provider=provider["kind"])
    if provider["certificate_expires"] is not None:
        put(f.CERTIFICATE_EXPIRES, provider["certificate_expires"])
    put(f.NODE_LEFT, int(provider["left"]))
    put(f.GENERATION_DESIRED, state["generation"]["desired"])
    put(f.GENERATION_APPLIED, state["generation"]["applied"])
    apply = state["apply"]
    put(f.APPLIES, apply["count"] - apply["failed"], result="ok")
    put(f.APPLIES, apply["failed"], result="failed")
    if apply["last_seconds"] is not None:
        put(f.APPLY_SECONDS, apply["last_seconds"])
    for result, count in state["probes"].items():
        put(f.PROBES, count, result=result)
    guard: Mapping[str, int] = state["guard"]
    put(f.GUARD_HOLDS, guard["holds"])
    put(f.GUARD_HELD, guard["held"])
    put(f.DRAINED, len(state["drained"]["backends"]), kind="backend")
    put(f.DRAINED, len(state["drained"]["nodes"]), kind="node")


_Target = tuple[str, str, str, str, str, str]  # its labels, and its lines in the order of _OF_TARGET
_Targets = KeyedCache[str, Json, _Target]  # of one frontend, by backend
_Service = tuple[Rows, dict[str, _Targets]]  # lines by family, and the targets by frontend
_OF_FRONTEND: Final = (f.SERVED, f.PANIC, f.TARGETS, f.ELIGIBLE, f.TABLE, f.TRACKED)
_OF_TARGET: Final = (f.BACKEND_WEIGHT, f.BACKEND_SLOTS, f.BACKEND_INFO, f.BACKEND_HEALTHY, f.BACKEND_DRAINING)


class _Services:
    """Gauges of what should be served. A service that is the same object as before keeps its text, and so does each of
    its targets."""

    def __init__(self) -> None:
        self.names: Mapping[str, str] = {}  # a service's name by frontend
        self._blocks: Latest[Sequence[Json], Blocks] = Latest(operator.is_)
        self._each: KeyedCache[str, Json, _Service] = KeyedCache(operator.is_)

    def blocks(self, services: Sequence[Json]) -> Blocks:
        return self._blocks.of(services, self._make)

    def _make(self, services: Sequence[Json]) -> Blocks:
        all_of: Rows = defaultdict(list)
        for found, _ in self._each.update([(service["id"], service) for service in services], _service).values():
            for family, lines in found.items():
                all_of[family] += lines
        self.names = {front["frontend"]: service["name"] for service in services for front in service["frontends"]}
        return {family: "\n".join(lines).encode() for family, lines in all_of.items()}


def _service(service: Json, before: tuple[Json, _Service] | None) -> _Service:
    """The lines of one service. `before`: the service as it was, and what was made of it."""
    held = before[1][1] if before is not None and before[0]["name"] == service["name"] else {}
    lines: Rows = defaultdict(list)
    name = escape(service["name"])
    if service["replicas"] is not None:
        lines[f.REPLICAS].append(f'{f.REPLICAS.name}{{service="{name}"}} {service["replicas"]}')
    backends: set[str] = set()
    kept: dict[str, _Targets] = {}
    down = _with_a_port_down(service)
    for frontend in service["frontends"]:
        key = frontend["frontend"]
        prefix = f'frontend="{escape(key)}",service="{name}"'
        labels = f'{prefix},protocol="{escape(key.rpartition("/")[2])}"'
        targets = frontend["targets"]
        values = (
            int(frontend["served"]),
            int(frontend["panic"]),
            len(targets),
            sum([t["weight"] > 0 for t in targets]),
            frontend["table_size"],
            frontend["tracked_slots"],
        )
        for family, value in zip(_OF_FRONTEND, values, strict=True):
            lines[family].append(f"{family.name}{{{labels}}} {value}")
        kept[key] = held.get(key) or KeyedCache(operator.is_)
        ids = [target["backend"] for target in targets]
        found = list(kept[key].update(zip(ids, targets, strict=True), partial(_target, prefix, name)).values())
        fresh = found
        if down:
            fresh = [
                (*row[:4], f"{row[4][:-1]}0", *row[5:]) if backend in down else row
                for row, backend in zip(found, ids, strict=True)
            ]
        if not backends.isdisjoint(ids):  # of a service that publishes several ports
            fresh = [of_target for of_target, backend in zip(fresh, ids, strict=True) if backend not in backends]
        backends.update(ids)
        columns = (*list(zip(*found, strict=True))[1:3], *list(zip(*fresh, strict=True))[3:])
        for family, column in zip(_OF_TARGET, columns, strict=False):
            lines[family] += column
    return lines, kept


def _with_a_port_down(service: Json) -> frozenset[str]:
    """Backends of which a port is down, of a service that publishes several."""
    if len(service["frontends"]) < 2:
        return frozenset()
    targets = (target for frontend in service["frontends"] for target in frontend["targets"])
    return frozenset(target["backend"] for target in targets if target["health"] == "down")


_OTHERS: Final = operator.itemgetter("port", "weight", "health", "intent", "name", "node", "node_name", "address")


def _target(prefix: str, service: str, target: Json, before: tuple[Json, _Target] | None) -> _Target:
    """The labels and lines of a target.

    Args:
        prefix: the first labels of all.
        service: the service's name, escaped.
        before: the target as it was, and what was made of it: often nothing has changed but the slots.
    """
    if before is not None and _OTHERS(before[0]) == _OTHERS(target):
        labels, weight, _, info, healthy, draining = before[1]
        return labels, weight, f"mesh_backend_slots{{{labels}}} {target['slots']}", info, healthy, draining
    backend = escape(target["backend"])
    labels = f'{prefix},backend="{backend}",port="{target["port"]}"'
    one = f'backend="{backend}",service="{service}"'
    node = escape(target["node_name"] or target["node"])
    return (
        labels,
        f"mesh_backend_weight{{{labels}}} {target['weight']}",
        f"mesh_backend_slots{{{labels}}} {target['slots']}",
        f'mesh_backend_info{{{one},name="{escape(target["name"])}",node="{node}",address="{target["address"]}"}} 1',
        f"mesh_backend_healthy{{{one}}} {int(target['health'] != 'down')}",
        f"mesh_backend_draining{{{one}}} {int(target['intent'] == 'draining')}",
    )


def _frontend_labels(order: Sequence[Frontend], names: Mapping[str, str]) -> list[str]:
    keys = [(str(frontend), frontend.protocol) for frontend in order]
    return [labelled(frontend=key, service=names.get(key, ""), protocol=protocol) for key, protocol in keys]


def _backend_labels(order: Sequence[tuple[Frontend, BackendKey]], names: Mapping[str, str]) -> list[str]:
    labels: list[str] = []
    last, prefix = None, ""
    plain = [key.backend for _, key in order]
    named = plain if escape(joined := "".join(plain)) is joined else [escape(name) for name in plain]
    for name, (frontend, (_, port, *_)) in zip(named, order, strict=True):
        if frontend is not last:
            key = str(frontend)
            last, prefix = frontend, f'frontend="{escape(key)}",service="{escape(names.get(key, ""))}",backend="'
        labels.append(f'{prefix}{name}",port="{port}"')
    return labels


def _line(family: Family, labels: str, value: float) -> str:
    return f"{family.name}{{{labels}}} {value}" if labels else f"{family.name} {value}"
