# SPDX-License-Identifier: Apache-2.0
"""Every metric that the daemon exports: name, type, labels, help. docs/OPERATIONS.md has the table (`make docs`).

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

BUILD_INFO: Final = Family(
    "mesh_build_info", Kind.GAUGE, ("version", "abi", "engine"), "Always 1; the labels say what is running."
)
START_TIME: Final = Family(
    "mesh_start_time_seconds", Kind.GAUGE, (), "Start time of the daemon in seconds since the epoch."
)
READY: Final = Family("mesh_ready", Kind.GAUGE, (), "1 if the node serves everything that it should (as /readyz).")
STOPPING: Final = Family("mesh_stopping", Kind.GAUGE, (), "1 while the daemon drains connections before it stops.")
PROBLEMS: Final = Family(
    "mesh_problems",
    Kind.GAUGE,
    (),
    "Invalid settings, ports that cannot be served, paths that are down, and other problems; see mesh status.",
)
PATHS_DOWN: Final = Family("mesh_paths_down", Kind.GAUGE, (), "Problems with paths to other nodes; see mesh status.")
PATHS_REFUSED: Final = Family(
    "mesh_paths_refused",
    Kind.GAUGE,
    (),
    "Those of mesh_paths_down whose node refuses the peer port: no agent runs there.",
)
PATH_UP: Final = Family(
    "mesh_path_up",
    Kind.GAUGE,
    ("node", "path"),
    "1 while a path from here to a node (tunnel, peer, peer-udp) is shown to work, else 0.",
)
TRAFFIC: Final = Family(
    "mesh_traffic",
    Kind.GAUGE,
    ("verdict",),
    "1 for how new connections fare here: ok, degraded (tasks masked, left to Docker, or a rule not in force), failing "
    "(not served).",
)
BACKENDS_MASKED: Final = Family(
    "mesh_backends_masked",
    Kind.GAUGE,
    ("service", "node"),
    "Tasks on a node that get no new connections from here because no path to it works.",
)
PROVIDER_CONNECTED: Final = Family(
    "mesh_provider_connected", Kind.GAUGE, ("provider",), "1 if the last read of the source of services succeeded."
)
PROVIDER_AGE: Final = Family(
    "mesh_provider_age_seconds",
    Kind.GAUGE,
    ("provider",),
    "Seconds since the last successful read of the source of services; absent before the first.",
)
CERTIFICATE_EXPIRES: Final = Family(
    "mesh_certificate_expiry_timestamp_seconds",
    Kind.GAUGE,
    (),
    "When this node's certificate in the cluster expires, in seconds since the epoch; absent where none is used.",
)
NODE_LEFT: Final = Family(
    "mesh_node_left", Kind.GAUGE, (), "1 once this node has left the swarm; what it serves is the last state it knew."
)
NODE_UP: Final = Family(
    "mesh_node_up",
    Kind.GAUGE,
    ("node",),
    "1 if the node is up as this one sees it, 0 if Swarm or the failure detector says that it is down.",
)
GENERATION_DESIRED: Final = Family(
    "mesh_generation_desired", Kind.GAUGE, (), "Generation of the state that should be served."
)
GENERATION_APPLIED: Final = Family(
    "mesh_generation_applied", Kind.GAUGE, (), "Generation of the state that the engine has applied."
)
APPLIES: Final = Family(
    "mesh_applies_total", Kind.COUNTER, ("result",), "Plans applied by the engine, by result: ok or failed."
)
APPLY_SECONDS: Final = Family("mesh_apply_last_seconds", Kind.GAUGE, (), "Duration of the last apply.")
PROBES: Final = Family("mesh_probes_total", Kind.COUNTER, ("result",), "Health probes, by result: ok or failed.")
GUARD_HOLDS: Final = Family(
    "mesh_guard_holds_total", Kind.COUNTER, (), "Mass removals of backends that were held back."
)
GUARD_HELD: Final = Family(
    "mesh_guard_held_backends", Kind.GAUGE, (), "Backends that stay in use because their removal is held back."
)
DRAINED: Final = Family("mesh_drained", Kind.GAUGE, ("kind",), "Backends and nodes that are drained by mesh drain.")

OPENED: Final = Family(
    "mesh_connections_opened_total",
    Kind.COUNTER,
    _PORT,
    "TCP connections and UDP sessions given to a backend. In the kernel engine TCP counts with the client's second "
    "packet, on the node of the task; calls of the node's own processes count when the socket is connected, on the "
    "calling node.",
)
CLOSED: Final = Family(
    "mesh_connections_closed_total",
    Kind.COUNTER,
    _PORT,
    "Connections and sessions that ended. In the kernel engine UDP flows and calls of the node's own processes have no "
    "end that it sees: they count as closed at once.",
)
ACTIVE: Final = Family(
    "mesh_connections_active", Kind.GAUGE, _PORT, "TCP connections and UDP sessions that are open: opened minus closed."
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
    "Bytes from clients (in) and to clients (out): payload in the proxy engine, whole packets in the kernel engine.",
)
PACKETS: Final = Family(
    "mesh_packets_total",
    Kind.COUNTER,
    (*_PORT, "direction"),
    "Packets (kernel engine) or datagrams (proxy engine, UDP only).",
)
CONNECT: Final = Family(
    "mesh_connect_seconds",
    Kind.HISTOGRAM,
    _PORT,
    "Time until a backend accepted a connection (proxy engine); absent before the first.",
)
REPLICAS: Final = Family(
    "mesh_service_replicas",
    Kind.GAUGE,
    ("service",),
    "Tasks that the service is asked to have; absent where there is no such number (global services, static files).",
)
SERVED: Final = Family("mesh_frontend_served", Kind.GAUGE, _PORT, "1 if the engine serves this published port.")
PANIC: Final = Family(
    "mesh_frontend_panic", Kind.GAUGE, _PORT, "1 while all backends are used because too few are healthy."
)
TARGETS: Final = Family("mesh_frontend_backends", Kind.GAUGE, _PORT, "Backends of the frontend.")
ELIGIBLE: Final = Family("mesh_frontend_backends_eligible", Kind.GAUGE, _PORT, "Backends that get new connections.")
TRACKED: Final = Family(
    "mesh_frontend_slots_tracked", Kind.GAUGE, _PORT, "Slots of the frontend's table that are in transition."
)
TABLE: Final = Family("mesh_frontend_slots", Kind.GAUGE, _PORT, "Slots of the frontend's table.")

BACKEND_OPENED: Final = Family(
    "mesh_backend_connections_opened_total",
    Kind.COUNTER,
    _TARGET,
    "TCP connections and UDP sessions given to this backend.",
)
BACKEND_ACTIVE: Final = Family(
    "mesh_backend_connections_active",
    Kind.GAUGE,
    _TARGET,
    "TCP connections and UDP sessions that are open to this backend.",
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
    "Connections that failed at this backend, by cause; a cause appears with its first failure. The kernel engine "
    "counts refused and unanswered.",
)
BACKEND_BYTES: Final = Family(
    "mesh_backend_bytes_total",
    Kind.COUNTER,
    (*_TARGET, "direction"),
    "Bytes of this backend's connections, counted as mesh_bytes_total.",
)
BACKEND_PACKETS: Final = Family(
    "mesh_backend_packets_total",
    Kind.COUNTER,
    (*_TARGET, "direction"),
    "Packets (kernel engine) or datagrams (proxy engine, UDP) of this backend; absent before the first.",
)
BACKEND_CONNECT: Final = Family(
    "mesh_backend_connect_seconds",
    Kind.SUMMARY,
    _TARGET,
    "Time until this backend accepted connections, sum and count (proxy engine); absent before the first.",
)
BACKEND_WEIGHT: Final = Family(
    "mesh_backend_weight", Kind.GAUGE, _TARGET, "Effective weight; 0: keeps its connections and gets no new ones."
)
BACKEND_SLOTS: Final = Family(
    "mesh_backend_slots", Kind.GAUGE, _TARGET, "Slots of the frontend's table that this backend owns."
)
BACKEND_INFO: Final = Family(
    "mesh_backend_info",
    Kind.GAUGE,
    (*_BACKEND, "name", "node", "address"),
    "Always 1; name, node and address of a backend, to join on the label backend.",
)
BACKEND_HEALTHY: Final = Family(
    "mesh_backend_healthy",
    Kind.GAUGE,
    _BACKEND,
    "0 if probes or traffic show that the backend, or one of its ports, is down, else 1.",
)
BACKEND_DRAINING: Final = Family(
    "mesh_backend_draining", Kind.GAUGE, _BACKEND, "1 while the backend gets no new connections but keeps those it has."
)
VERDICTS: Final = Family(
    "mesh_verdicts_total", Kind.COUNTER, ("verdict",), "Packets by verdict: what the kernel engine did with them."
)

FAMILIES: Final = (
    BUILD_INFO, START_TIME, READY, STOPPING, PROBLEMS, PATHS_DOWN, PATHS_REFUSED, PATH_UP, TRAFFIC, BACKENDS_MASKED,
    PROVIDER_CONNECTED, PROVIDER_AGE,
    CERTIFICATE_EXPIRES, NODE_LEFT, NODE_UP,
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
        (Kind.GAUGE, "connections", "TCP connections in the proxy engine, including those of drained frontends."),
        (Kind.GAUGE, "connections_connecting", "TCP connections that wait for a backend."),
        (Kind.GAUGE, "connections_limit", "Number of TCP connections at which accepting pauses."),
        (Kind.GAUGE, "descriptors", "File descriptors in use by the proxy engine."),
        (Kind.GAUGE, "descriptors_limit", "File descriptor limit of the process."),
        (Kind.GAUGE, "pipes", "Open pipes for splicing."),
        (Kind.GAUGE, "pipes_used", "Pipes in use by a transfer."),
        (Kind.GAUGE, "buffers_used", "Buffers in use by a transfer."),
        (Kind.GAUGE, "accept_paused_threads", "Threads that do not accept connections because a limit is reached."),
        (Kind.GAUGE, "udp_sessions", "UDP sessions in the proxy engine."),
        (Kind.GAUGE, "flow_cache_entries", "Flows in the kernel engine's flow cache (their slots are in transition)."),
        (Kind.GAUGE, "flow_cache_size", "Capacity of the flow cache; the least recently used entry is evicted."),
        (Kind.GAUGE, "table_arenas", "Arenas: maps that hold the kernel engine's slot tables."),
        (Kind.COUNTER, "accept_pauses", "Pauses of accepting because a limit was reached."),
        (Kind.COUNTER, "accept_errors", "Failed accepts for lack of descriptors or memory."),
        (
            Kind.COUNTER,
            "pipe_failures",
            "Transfers that were copied because no pipe was available.",
        ),
        (Kind.COUNTER, "udp_evictions", "UDP sessions evicted to make room for new ones."),
        (
            Kind.COUNTER,
            "udp_forgotten",
            "UDP flows that connection tracking was told to forget: older than our redirection, or outliving it.",
        ),
        (Kind.COUNTER, "udp_dropped", "Datagrams dropped by the proxy engine."),
        (
            Kind.COUNTER,
            "passed_connections",
            "Connections that the proxy had accepted and then left to Docker's own mesh, for want of a path to a task.",
        ),
        (Kind.COUNTER, "peer_connections", "Connections that other nodes handed over for this node's backends."),
        (Kind.COUNTER, "peer_opened", "Handed-over connections and UDP sessions that a backend accepted."),
        (Kind.COUNTER, "peer_received_bytes", "Bytes received from clients of other nodes."),
        (Kind.COUNTER, "peer_sent_bytes", "Bytes sent to clients of other nodes."),
        (
            Kind.COUNTER,
            "peer_foreign",
            "Callers of the peer port that are not nodes of the cluster; they are disconnected.",
        ),
        (Kind.COUNTER, "peer_malformed", "Callers of the peer port that sent no valid header in time."),
        (Kind.COUNTER, "peer_unknown", "Flows handed over for a backend that this node does not have."),
        (
            Kind.COUNTER,
            "peer_unproven",
            "Flows and answers from a node's address without the proof that this node gives; they are dropped.",
        ),
        (
            Kind.COUNTER,
            "peer_denied",
            "Flows handed over for a client that mesh.allow or mesh.deny of the backend's service denies.",
        ),
        (
            Kind.COUNTER,
            "kernel_losses",
            "Things of ours in the kernel (nftables table, hooks, pins, listening sockets) that somebody else removed.",
        ),
        (Kind.COUNTER, "relay_sources_lost", "Times that this worker lost the manager that told it the services."),
        (Kind.COUNTER, "relay_snapshots_for_slow_nodes", "Full snapshots sent because a worker fell behind."),
        (Kind.COUNTER, "relay_sent_bytes", "Bytes that this manager's relay sent to other nodes."),
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
