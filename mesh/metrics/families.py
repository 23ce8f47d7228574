# SPDX-License-Identifier: Apache-2.0
"""Every metric that the daemon exports: name, type, labels, help. A test compares docs/OPERATIONS.md with it.

Both engines export under these names. Labels are bounded by what is deployed: no client address is ever a label.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Kind(enum.Enum):
    """Metric types of the Prometheus text format."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


@dataclass(frozen=True, slots=True, eq=False)  # a key by identity: hashing the fields would cost a scrape its time
class Family:
    """One metric. `name` is what is queried: counters end in `_total`."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


_PORT: Final = ("frontend", "service", "protocol")
_TARGET: Final = ("frontend", "service", "backend", "port")
_BACKEND: Final = ("backend", "service")

BUILD_INFO: Final = Family("mesh_build_info", Kind.GAUGE, ("version", "abi", "engine"), "Always 1: what is running.")
START_TIME: Final = Family(
    "mesh_start_time_seconds", Kind.GAUGE, (), "When the daemon started, in seconds since the epoch."
)
READY: Final = Family("mesh_ready", Kind.GAUGE, (), "1 while the node serves all that it should, as /readyz says.")
STOPPING: Final = Family("mesh_stopping", Kind.GAUGE, (), "1 while the daemon drains in order to stop.")
PROBLEMS: Final = Family(
    "mesh_problems",
    Kind.GAUGE,
    (),
    "Settings that cannot be used, ports that cannot be served, ways to nodes that fail; see mesh status.",
)
WAYS_FAILED: Final = Family(
    "mesh_paths_down",
    Kind.GAUGE,
    (),
    "Ways to other nodes (tunnel, peer port) by which nothing comes back: connections to tasks there fail.",
)
PROVIDER_CONNECTED: Final = Family(
    "mesh_provider_connected", Kind.GAUGE, ("provider",), "1 if the last read of the source of services was good."
)
PROVIDER_AGE: Final = Family(
    "mesh_provider_age_seconds",
    Kind.GAUGE,
    ("provider",),
    "Seconds since the last good read of the source of services; absent before the first.",
)
CERTIFICATE_EXPIRES: Final = Family(
    "mesh_certificate_expiry_timestamp_seconds",
    Kind.GAUGE,
    (),
    "When this node's certificate in the cluster expires, in seconds since the epoch; absent where none is used.",
)
NODE_UP: Final = Family(
    "mesh_node_up",
    Kind.GAUGE,
    ("node",),
    "1 if the node is up as this one sees it, 0 if Swarm or the failure detector says that it is down.",
)
GENERATION_DESIRED: Final = Family(
    "mesh_generation_desired", Kind.GAUGE, (), "Number of the newest state that should be served."
)
GENERATION_APPLIED: Final = Family(
    "mesh_generation_applied", Kind.GAUGE, (), "Number of the newest state that is served."
)
APPLIES: Final = Family(
    "mesh_applies_total", Kind.COUNTER, ("result",), "Plans carried out by the engine, by result: ok or failed."
)
APPLY_SECONDS: Final = Family("mesh_apply_last_seconds", Kind.GAUGE, (), "How long the engine took for the last plan.")
PROBES: Final = Family("mesh_probes_total", Kind.COUNTER, ("result",), "Health probes, by result: ok or failed.")
GUARD_HOLDS: Final = Family(
    "mesh_guard_holds_total", Kind.COUNTER, (), "Mass removals of backends that were held back."
)
GUARD_HELD: Final = Family(
    "mesh_guard_held_backends", Kind.GAUGE, (), "Backends that are still used because their removal is held back."
)
DRAINED: Final = Family(
    "mesh_drained", Kind.GAUGE, ("kind",), "Backends and nodes that an operator drained (mesh drain)."
)

OPENED: Final = Family(
    "mesh_connections_opened_total",
    Kind.COUNTER,
    _PORT,
    "TCP connections and UDP sessions given to a backend. In the kernel engine TCP counts with the client's second "
    "packet, on the node of the task; calls of the node's own processes count when the socket is connected.",
)
CLOSED: Final = Family(
    "mesh_connections_closed_total",
    Kind.COUNTER,
    _PORT,
    "Connections and sessions that ended. In the kernel engine UDP flows and calls of the node's own processes have no "
    "end that it sees: they count as closed at once.",
)
ACTIVE: Final = Family(
    "mesh_connections_active", Kind.GAUGE, _PORT, "Connections and sessions open now: opened minus closed."
)
RETRIED: Final = Family(
    "mesh_connections_retried_total",
    Kind.COUNTER,
    _PORT,
    "Times that a connection went on to its next choice because a backend did not take it (proxy engine).",
)
FAILED: Final = Family(
    "mesh_connections_failed_total",
    Kind.COUNTER,
    (*_PORT, "cause"),
    "Connections that failed, by cause; a cause appears with its first failure. The proxy engine counts connections "
    "and datagrams, the kernel engine packets that would have started a flow: SYNs, each one that a client sends "
    "again too, and datagrams.",
)
UNANSWERED: Final = Family(
    "mesh_connections_unanswered_total",
    Kind.COUNTER,
    _PORT,
    "Connections whose client sent its SYN again (for a task of another node: twice) before the task had answered; "
    "once for each connection, which may still have come about. Kernel engine; the proxy engine counts them as "
    "failed by timeout.",
)
BYTES: Final = Family(
    "mesh_bytes_total",
    Kind.COUNTER,
    (*_PORT, "direction"),
    "Bytes; in is from the client, out is to it. Payload in the proxy engine, packets in the kernel engine.",
)
PACKETS: Final = Family(
    "mesh_packets_total",
    Kind.COUNTER,
    (*_PORT, "direction"),
    "Packets in the kernel engine, datagrams in the proxy engine (UDP only).",
)
CONNECT: Final = Family(
    "mesh_connect_seconds",
    Kind.HISTOGRAM,
    _PORT,
    "Time that backends took to accept a connection (proxy engine); absent before the first.",
)
REPLICAS: Final = Family(
    "mesh_service_replicas",
    Kind.GAUGE,
    ("service",),
    "Tasks that the service is asked to have; absent where there is no such number (global services, static files).",
)
SERVED: Final = Family("mesh_frontend_served", Kind.GAUGE, _PORT, "1 if the engine serves this published port.")
PANIC: Final = Family(
    "mesh_frontend_panic", Kind.GAUGE, _PORT, "1 while all backends are used because (nearly) all are down by health."
)
TARGETS: Final = Family("mesh_frontend_backends", Kind.GAUGE, _PORT, "Backends that the frontend knows.")
ELIGIBLE: Final = Family(
    "mesh_frontend_backends_eligible", Kind.GAUGE, _PORT, "Backends that new connections can be given to."
)
TRACKED: Final = Family(
    "mesh_frontend_slots_tracked", Kind.GAUGE, _PORT, "Slots of the table that are in transition between backends."
)
TABLE: Final = Family("mesh_frontend_slots", Kind.GAUGE, _PORT, "Slots of the table.")

BACKEND_OPENED: Final = Family(
    "mesh_backend_connections_opened_total", Kind.COUNTER, _TARGET, "Connections and sessions given to this backend."
)
BACKEND_ACTIVE: Final = Family(
    "mesh_backend_connections_active", Kind.GAUGE, _TARGET, "Connections and sessions open to this backend now."
)
BACKEND_RETRIED: Final = Family(
    "mesh_backend_connections_retried_total",
    Kind.COUNTER,
    _TARGET,
    "Connections that this backend did not take and that went on to their next choice (proxy engine).",
)
BACKEND_FAILED: Final = Family(
    "mesh_backend_connections_failed_total",
    Kind.COUNTER,
    (*_TARGET, "cause"),
    "Connections that failed at this backend, by cause; a cause appears with its first failure (proxy engine).",
)
BACKEND_BYTES: Final = Family(
    "mesh_backend_bytes_total", Kind.COUNTER, (*_TARGET, "direction"), "Bytes of this backend's connections, likewise."
)
BACKEND_PACKETS: Final = Family(
    "mesh_backend_packets_total",
    Kind.COUNTER,
    (*_TARGET, "direction"),
    "Packets (kernel engine) or datagrams (proxy engine, UDP) of this backend; absent while there were none.",
)
BACKEND_CONNECT: Final = Family(
    "mesh_backend_connect_seconds",
    Kind.SUMMARY,
    _TARGET,
    "Time that this backend took to accept connections: sum and count (proxy engine); absent before the first.",
)
BACKEND_WEIGHT: Final = Family(
    "mesh_backend_weight", Kind.GAUGE, _TARGET, "Effective weight; 0 keeps its connections and gets no new ones."
)
BACKEND_SLOTS: Final = Family(
    "mesh_backend_slots", Kind.GAUGE, _TARGET, "Slots of the frontend's table that this backend owns."
)
BACKEND_INFO: Final = Family(
    "mesh_backend_info",
    Kind.GAUGE,
    (*_BACKEND, "name", "node", "address"),
    "Always 1: name, node and address of a backend, to be joined on the label backend.",
)
BACKEND_HEALTHY: Final = Family(
    "mesh_backend_healthy", Kind.GAUGE, _BACKEND, "0 if probes or traffic say that the backend is down, else 1."
)
BACKEND_DRAINING: Final = Family(
    "mesh_backend_draining", Kind.GAUGE, _BACKEND, "1 while the backend gets no new connections but keeps those it has."
)
VERDICTS: Final = Family(
    "mesh_verdicts_total", Kind.COUNTER, ("verdict",), "Packets by what the kernel engine did with them."
)

FAMILIES: Final = (
    BUILD_INFO, START_TIME, READY, STOPPING, PROBLEMS, WAYS_FAILED, PROVIDER_CONNECTED, PROVIDER_AGE,
    CERTIFICATE_EXPIRES, NODE_UP,
    GENERATION_DESIRED, GENERATION_APPLIED, APPLIES, APPLY_SECONDS, PROBES, GUARD_HOLDS, GUARD_HELD, DRAINED,
    OPENED, CLOSED, ACTIVE, RETRIED, FAILED, UNANSWERED, BYTES, PACKETS, CONNECT,
    REPLICAS, SERVED, PANIC, TARGETS, ELIGIBLE, TABLE, TRACKED,
    BACKEND_OPENED, BACKEND_ACTIVE, BACKEND_RETRIED, BACKEND_FAILED, BACKEND_BYTES, BACKEND_PACKETS, BACKEND_CONNECT,
    BACKEND_WEIGHT, BACKEND_SLOTS, BACKEND_INFO, BACKEND_HEALTHY, BACKEND_DRAINING, VERDICTS,
)  # fmt: skip


def _engine(name: str, kind: Kind, help_text: str) -> Family:
    return Family(f"mesh_{name}" + ("_total" if kind is Kind.COUNTER else ""), kind, (), help_text)


ENGINE: Final = {
    (name, kind): _engine(name, kind, help_text)
    for kind, name, help_text in (
        (Kind.GAUGE, "threads", "Forwarding threads of the proxy engine."),
        (Kind.GAUGE, "connections", "TCP connections in the proxy engine, those of drained frontends included."),
        (Kind.GAUGE, "connections_connecting", "TCP connections that wait for a backend to accept them."),
        (Kind.GAUGE, "connections_limit", "TCP connections from which on accepting pauses."),
        (Kind.GAUGE, "descriptors", "File descriptors that the proxy engine uses."),
        (Kind.GAUGE, "descriptors_limit", "File descriptors that the process may use."),
        (Kind.GAUGE, "pipes", "Pipes open for splicing."),
        (Kind.GAUGE, "pipes_used", "Pipes that a transfer uses now."),
        (Kind.GAUGE, "buffers_used", "Buffers that a transfer uses now."),
        (Kind.GAUGE, "accept_paused_threads", "Threads that accept nothing now because a limit is reached."),
        (Kind.GAUGE, "udp_sessions", "UDP sessions in the proxy engine."),
        (Kind.GAUGE, "flow_cache_entries", "Flows noted by the kernel engine because their slot is in transition."),
        (Kind.GAUGE, "flow_cache_size", "Flows that the kernel engine can note; the oldest gives way."),
        (Kind.GAUGE, "table_arenas", "Maps that hold the slot tables of the kernel engine."),
        (Kind.COUNTER, "accept_pauses", "Times that accepting paused because a limit was reached."),
        (Kind.COUNTER, "accept_errors", "Times that accepting failed for lack of descriptors or memory."),
        (
            Kind.COUNTER,
            "pipe_failures",
            "Times that no pipe could be had, so that a transfer was copied instead.",
        ),
        (Kind.COUNTER, "udp_evictions", "UDP sessions ended before their time to make room for new ones."),
        (Kind.COUNTER, "udp_dropped", "Datagrams dropped by the proxy engine."),
        (Kind.COUNTER, "peer_connections", "Connections that other nodes handed over for backends of this one."),
        (Kind.COUNTER, "peer_opened", "Connections and UDP sessions that other nodes handed over and a backend took."),
        (Kind.COUNTER, "peer_received_bytes", "Bytes from clients of other nodes."),
        (Kind.COUNTER, "peer_sent_bytes", "Bytes to clients of other nodes."),
        (Kind.COUNTER, "peer_foreign", "Callers of the peer port that are no node of the cluster, cut off."),
        (Kind.COUNTER, "peer_malformed", "Callers of the peer port that sent no header, or none in time."),
        (Kind.COUNTER, "peer_unknown", "Flows handed over for a backend that is not here."),
        (Kind.COUNTER, "relay_sources_lost", "Times that this worker lost the manager it got its services from."),
        (Kind.COUNTER, "relay_snapshots_for_slow_nodes", "Whole inventories sent because a worker fell behind."),
        (Kind.COUNTER, "relay_sent_bytes", "Bytes that this manager's relay sent to workers."),
    )
}
"""What engines report themselves, by name in Stats.gauges (gauges) or Stats.totals (counters)."""


def engine_family(name: str, kind: Kind) -> Family:
    """The family of an engine-wide gauge or counter, by its name in Stats.gauges or Stats.totals."""
    return ENGINE.get((name, kind)) or _engine(name, kind, "Reported by the engine.")


def table() -> str:
    """All metrics as the Markdown table of docs/OPERATIONS.md."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in (*FAMILIES, *ENGINE.values()):
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{family.name}` | {family.kind.value} | {labels} | {family.help} |")
    return "\n".join(rows)
