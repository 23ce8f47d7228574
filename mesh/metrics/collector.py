# SPDX-License-Identifier: Apache-2.0
"""From the engine's counters and the agent's state to the text that Prometheus scrapes. Pulled; nothing is kept.

The text is written directly: at 10,000 backends a scrape has over 10^5 samples, for which prometheus_client's general
encoder takes most of a second. It still chooses the format and writes the process's own metrics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import prometheus_client
from prometheus_client.exposition import choose_encoder

from mesh.datapath.base import CONNECT_BUCKETS, Counters, Failure, Stats
from mesh.metrics import families as f
from mesh.metrics.families import Family, Kind
from mesh.metrics.view import Json

Rows = dict[Family, list[str]]

PROCESS: Final = prometheus_client.CollectorRegistry()
prometheus_client.ProcessCollector(registry=PROCESS)
prometheus_client.GCCollector(registry=PROCESS)

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_EOF: Final = b"# EOF\n"
_CONNECT_BOUNDS: Final = (*(f"{bound}" for bound in CONNECT_BUCKETS), "+Inf")
_CAUSES: Final = {cause: f'cause="{cause.value}"' for cause in Failure}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one scrape shows, taken at one moment."""

    stats: Stats
    state: Json
    ready: bool


def render(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """The exposition and its content type, by the scraper's Accept header: OpenMetrics 1.0 or text 0.0.4."""
    encoder, content_type = choose_encoder(accept)
    openmetrics = content_type.startswith("application/openmetrics-text")
    process = encoder(PROCESS).removesuffix(_EOF)
    parts: list[str] = []
    for family, lines in collect(snapshot).items():
        name = family.name.removesuffix("_total") if openmetrics else family.name
        help_text = family.help.translate(_ESCAPES) if openmetrics else family.help
        parts += (f"# HELP {name} {help_text}", f"# TYPE {name} {family.kind.value}", *lines)
    text = "\n".join(parts).encode() + b"\n" + process
    return (text + _EOF if openmetrics else text), content_type


def collect(snapshot: Snapshot) -> Rows:
    """Sample lines by family, in the order of FAMILIES; families without samples are left out."""
    rows: Rows = defaultdict(list)
    state = snapshot.state
    _agent(rows, state, snapshot.ready)
    names = _state(rows, state)
    stats = snapshot.stats
    for frontend, counters in stats.frontends.items():
        key = str(frontend)
        _frontend(rows, _frontend_labels(key, names.get(key, "")), counters)
    escaped = {str(frontend): _escape(str(frontend)) for frontend in stats.frontends}
    services = {key: _escape(name) for key, name in names.items()}
    keys: dict[object, str] = {}
    for (frontend, backend), counters in stats.backends.items():
        key = keys.get(frontend) or keys.setdefault(frontend, str(frontend))
        labels = (
            f'frontend="{escaped.get(key, key)}",service="{services.get(key, "")}",'
            f'backend="{_escape(backend.backend)}",port="{backend.port}"'
        )
        _backend(rows, labels, counters)
    rows[f.VERDICTS] = [_line(f.VERDICTS, _labels(verdict=k), v) for k, v in stats.verdicts.items()]
    order = {family: i for i, family in enumerate(f.FAMILIES)}
    result = {family: rows[family] for family in sorted(rows, key=order.__getitem__) if rows[family]}
    for kind, values in ((Kind.GAUGE, stats.gauges), (Kind.COUNTER, stats.totals)):
        for name in sorted(values):
            family = f.engine_family(name, kind)
            result[family] = [_line(family, "", values[name])]
    return result


def _agent(rows: Rows, state: Json, ready: bool) -> None:
    def put(family: Family, value: float, **labels: object) -> None:
        rows[family].append(_line(family, _labels(**labels), value))

    put(f.BUILD_INFO, 1, version=state["version"], abi=state["abi"], engine=state["engine"])
    put(f.START_TIME, state["started"])
    put(f.READY, int(ready))
    put(f.STOPPING, int(state["stopping"]))
    put(f.PROBLEMS, len(state["problems"]))
    provider = state["provider"]
    put(f.PROVIDER_CONNECTED, int(provider["connected"]), provider=provider["kind"])
    if provider["age_seconds"] is not None:
        put(f.PROVIDER_AGE, provider["age_seconds"], provider=provider["kind"])
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


def _state(rows: Rows, state: Json) -> dict[str, str]:
    """Gauges of what should be served. Returns the service's name by frontend."""
    names: dict[str, str] = {}
    backends: set[str] = set()
    for service in state["services"]:
        name = service["name"]
        for frontend in service["frontends"]:
            key = frontend["frontend"]
            names[key] = name
            labels = _frontend_labels(key, name)
            targets = frontend["targets"]
            for family, value in (
                (f.SERVED, int(frontend["served"])),
                (f.PANIC, int(frontend["panic"])),
                (f.TARGETS, len(targets)),
                (f.ELIGIBLE, sum(1 for t in targets if t["weight"] > 0)),
                (f.TABLE, frontend["table_size"]),
                (f.TRACKED, frontend["tracked_slots"]),
            ):
                rows[family].append(f"{family.name}{{{labels}}} {value}")
            prefix = f'frontend="{_escape(key)}",service="{_escape(name)}"'
            for target in targets:
                _target(rows, prefix, _escape(name), target, backends)
    return names


def _target(rows: Rows, prefix: str, service: str, target: Json, seen: set[str]) -> None:
    backend = _escape(target["backend"])
    labels = f'{prefix},backend="{backend}",port="{target["port"]}"'
    rows[f.BACKEND_WEIGHT].append(f"mesh_backend_weight{{{labels}}} {target['weight']}")
    rows[f.BACKEND_SLOTS].append(f"mesh_backend_slots{{{labels}}} {target['slots']}")
    if backend in seen:  # a backend of a service that publishes several ports
        return
    seen.add(backend)
    one = f'backend="{backend}",service="{service}"'
    rows[f.BACKEND_INFO].append(
        f'mesh_backend_info{{{one},name="{_escape(target["name"])}",node="{_escape(target["node"])}",'
        f'address="{target["address"]}"}} 1'
    )
    rows[f.BACKEND_HEALTHY].append(f"mesh_backend_healthy{{{one}}} {int(target['health'] != 'down')}")
    rows[f.BACKEND_DRAINING].append(f"mesh_backend_draining{{{one}}} {int(target['intent'] == 'draining')}")


def _frontend(rows: Rows, labels: str, c: Counters) -> None:
    for family, value in ((f.OPENED, c.opened), (f.CLOSED, c.closed), (f.ACTIVE, c.active), (f.RETRIED, c.retried)):
        rows[family].append(f"{family.name}{{{labels}}} {value}")
    for cause, count in c.failed.items():
        if count:
            rows[f.FAILED].append(f"{f.FAILED.name}{{{labels},{_CAUSES[cause]}}} {count}")
    for family, received, sent in ((f.BYTES, c.bytes_in, c.bytes_out), (f.PACKETS, c.packets_in, c.packets_out)):
        rows[family].append(f'{family.name}{{{labels},direction="in"}} {received}')
        rows[family].append(f'{family.name}{{{labels},direction="out"}} {sent}')
    if c.connect_seconds:
        total = 0
        for bound, count in zip(_CONNECT_BOUNDS, c.connect_seconds, strict=True):
            total += count
            rows[f.CONNECT].append(f'mesh_connect_seconds_bucket{{{labels},le="{bound}"}} {total}')
        rows[f.CONNECT].append(f"mesh_connect_seconds_sum{{{labels}}} {c.connect_seconds_sum}")
        rows[f.CONNECT].append(f"mesh_connect_seconds_count{{{labels}}} {total}")


def _backend(rows: Rows, labels: str, c: Counters) -> None:
    rows[f.BACKEND_OPENED].append(f"mesh_backend_connections_opened_total{{{labels}}} {c.opened}")
    rows[f.BACKEND_ACTIVE].append(f"mesh_backend_connections_active{{{labels}}} {c.active}")
    rows[f.BACKEND_RETRIED].append(f"mesh_backend_connections_retried_total{{{labels}}} {c.retried}")
    lines = rows[f.BACKEND_BYTES]
    lines.append(f'mesh_backend_bytes_total{{{labels},direction="in"}} {c.bytes_in}')
    lines.append(f'mesh_backend_bytes_total{{{labels},direction="out"}} {c.bytes_out}')
    for cause, count in c.failed.items():
        if count:
            rows[f.BACKEND_FAILED].append(f"{f.BACKEND_FAILED.name}{{{labels},{_CAUSES[cause]}}} {count}")
    if c.packets_in or c.packets_out:
        rows[f.BACKEND_PACKETS].append(f'mesh_backend_packets_total{{{labels},direction="in"}} {c.packets_in}')
        rows[f.BACKEND_PACKETS].append(f'mesh_backend_packets_total{{{labels},direction="out"}} {c.packets_out}')
    if c.connect_seconds:
        lines = rows[f.BACKEND_CONNECT]
        lines.append(f"mesh_backend_connect_seconds_sum{{{labels}}} {c.connect_seconds_sum}")
        lines.append(f"mesh_backend_connect_seconds_count{{{labels}}} {sum(c.connect_seconds)}")


def _frontend_labels(frontend: str, service: str) -> str:
    return _labels(frontend=frontend, service=service, protocol=frontend.rpartition("/")[2])


def _escape(text: str) -> str:
    return text.translate(_ESCAPES) if '"' in text or "\\" in text or "\n" in text else text


def _labels(**labels: object) -> str:
    return ",".join(f'{name}="{_escape(str(value))}"' for name, value in labels.items())


def _line(family: Family, labels: str, value: float) -> str:
    return f"{family.name}{{{labels}}} {value}" if labels else f"{family.name} {value}"
