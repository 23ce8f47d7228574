# SPDX-License-Identifier: Apache-2.0
"""The domain in frozen dataclasses: what exists (Inventory), what should be served (DesiredState). No I/O; it needs
the standard library and the contract.

Words are those of docs/GLOSSARY.md. *Task* is said in `mesh.providers.swarm` only; everywhere else it is a Backend.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh._abi import TABLE_SIZE_DEFAULT
from mesh.netaddr import join_host_port

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

WEIGHT_MAX: Final = 65535


class Protocol(enum.IntEnum):
    """Transport protocol, by its IANA number."""

    TCP = 6
    UDP = 17

    def __str__(self) -> str:
        return self.name.lower()


class Affinity(enum.Enum):
    """What is hashed: the whole 5-tuple, or the client's address alone."""

    FLOW = "flow"
    CLIENT_IP = "client-ip"


class ProxyProtocol(enum.Enum):
    """Whether the proxy engine announces the client to the backend (HAProxy's PROXY protocol)."""

    OFF = "off"
    V2 = "v2"


class Locality(enum.Enum):
    """Which backends a node prefers."""

    CLUSTER = "cluster"
    LOCAL_FIRST = "local-first"


class Intent(enum.Enum):
    """What the orchestrator wants of a backend, apart from its health."""

    ACTIVE = "active"
    DRAINING = "draining"  # keeps its flows, gets no new ones


class Health(enum.Enum):
    """What the probes say of a backend."""

    UNKNOWN = "unknown"
    PENDING = "pending"  # at the readiness gate: no new flows before its first good probe, or before the gate times out
    UP = "up"
    DOWN = "down"
    UNREACHED = "unreached"  # it runs, but none of its networks leads to it from its own node: no flows in any case


class Path(enum.Enum):
    """How flows get from this node to a backend's node."""

    LOCAL = "here"  # the backend runs on this node
    TUNNEL = "tunnel"  # from kernel engine to kernel engine
    PEER = "peer"  # handed over at the other node's peer port: connections
    PEER_UDP = "peer-udp"  # likewise: datagrams


class PathState(enum.Enum):
    """Whether a path carries packets there and back."""

    UNPROVEN = "unproven"  # not tried yet
    UP = "up"
    DOWN = "down"


class EngineKind(enum.StrEnum):
    """How an agent forwards. UNKNOWN, which is empty and false: nobody has told."""

    UNKNOWN = ""
    KERNEL = "kernel"
    PROXY = "proxy"

    @classmethod
    def told(cls, text: str) -> EngineKind:
        """What another process calls its engine; of a later build it may be one that nobody knows here."""
        return cls(text) if text in cls._value2member_map_ else cls.UNKNOWN


class ProofLevel(enum.IntEnum):
    """How far a node proves to others that it is one (mesh.datapath.proof)."""

    NONE = 0  # its build does not know proofs, or its agent has not called yet
    KNOWS = 1  # its build does, and it has no key in use yet
    PROVES = 2  # whatever it sends to the peer port is proven
    TUNNEL = 3  # and whatever it sends through the tunnel; and its programs check what comes from there

    @classmethod
    def told(cls, value: int) -> ProofLevel:
        """The level another node tells; the highest that this build knows, if it tells a higher one."""
        return cls(max(min(value, max(cls)), 0))


class ProbeKind(enum.Enum):
    """How a backend is probed."""

    OFF = "off"
    TCP = "tcp"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How the backends of a service are probed. Times in seconds."""

    kind: ProbeKind = ProbeKind.TCP
    path: str = "/"
    interval: float = 2.0
    timeout: float = 1.0
    rise: int = 2
    fall: int = 3


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What a user can set per service (service labels, or keys of the static file)."""

    enable: bool = True
    affinity: Affinity = Affinity.FLOW
    proxy_protocol: ProxyProtocol = ProxyProtocol.OFF
    health: HealthCheck = field(default_factory=HealthCheck)
    table_size: int = TABLE_SIZE_DEFAULT
    locality: Locality = Locality.CLUSTER
    allow: tuple[Network, ...] = ()  # empty: everybody
    deny: tuple[Network, ...] = ()  # wins over allow
    fail_closed: bool = False  # without `allow` nobody is let in, and while no agent runs only who was admitted is


@dataclass(frozen=True, slots=True)
class Frontend:
    """Where clients call: an address, a port, a protocol. Address `::` is every address of the node, IPv4 included.

    Sorts by these, IPv4 first.
    """

    address: Address
    port: int
    protocol: Protocol

    def __lt__(self, other: Frontend) -> bool:
        return self._rank() < other._rank()

    def _rank(self) -> tuple[int, ...]:
        return self.address.version, int(self.address), self.port, self.protocol

    def __str__(self) -> str:
        host = "*" if self.address == ANY_ADDRESS else str(self.address)
        return f"{join_host_port(host, self.port)}/{self.protocol}"


ANY_ADDRESS: Final = ipaddress.IPv6Address("::")


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A port of the service as the outside sees it, and the port that its backends listen on. Sorts by its fields."""

    published: int
    target: int
    protocol: Protocol
    address: Address = ANY_ADDRESS

    def __lt__(self, other: PublishedPort) -> bool:
        return self._rank() < other._rank()

    def _rank(self) -> tuple[int, ...]:
        return self.published, self.target, self.protocol, self.address.version, int(self.address)

    @property
    def frontend(self) -> Frontend:
        return Frontend(self.address, self.published, self.protocol)


@dataclass(frozen=True, slots=True)
class Backend:
    """One reachable instance of a service.

    `id` is the same on every node (a task id; for the static provider a name) and seeds its permutation of slots.
    `address` is where *this* host reaches it; None while it has none that is reachable from here.
    `container` is the local container's id where the backend runs on this node, else empty.
    `unreached` says why this node does not reach it although it runs here; empty: it does, or nobody knows yet.
    `port` is where it listens if that is not the published port's `target` (static provider only); 0: it is.
    """

    id: str
    service: str
    node: str
    address: Address | None
    name: str = ""
    weight: int = 1
    intent: Intent = Intent.ACTIVE
    ready: bool = True  # running, and healthy by its own HEALTHCHECK if it has one
    local: bool = True
    container: str = ""
    port: int = 0
    unreached: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """A service with the ports it publishes through the mesh. `id` never changes, `name` is for people."""

    id: str
    name: str
    ports: tuple[PublishedPort, ...]
    options: ServiceOptions = field(default_factory=ServiceOptions)
    replicas: int | None = None  # as many tasks are asked for; None: not known, or as many as there are nodes for them


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster. `weight` multiplies into its backends' weights; 0 takes it out for new flows.

    `engine` is how its agent forwards.
    """

    id: str
    name: str
    address: Address | None = None
    up: bool = True
    weight: int = 1
    engine: EngineKind = EngineKind.UNKNOWN
    proof: ProofLevel = ProofLevel.NONE


class Severity(enum.Enum):
    """How much a problem matters."""

    INFO = "info"  # nothing is lost
    WARNING = "warning"  # something is not as it was asked for
    CRITICAL = "critical"  # clients are kept out, or a rule that was asked for is not in force


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a user wrote that cannot be used: the place, what is wrong, the remedy.

    The last good value, or a default, applies.
    """

    where: str  # "service web, label mesh.affinity"
    message: str  # "'sticky' is not one of: client-ip, flow"
    remedy: str = ""
    severity: Severity = Severity.WARNING

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" ({self.remedy})" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything a provider knows, whole: never a delta. Sorted by id, so that equal inventories compare equal."""

    services: tuple[Service, ...] = ()
    backends: tuple[Backend, ...] = ()
    nodes: tuple[Node, ...] = ()
    problems: tuple[Problem, ...] = ()
    source: str = ""  # "swarm" | "static" | "relay"


PORT_MARK: Final = "#"  # between a backend's id and a port of it


def port_key(backend: str, port: int) -> str:
    """The key of a verdict over one port of a backend."""
    return f"{backend}{PORT_MARK}{port}"


def backend_of_key(key: str) -> str:
    """The backend that a verdict's key is about."""
    backend, _, port = key.rpartition(PORT_MARK)
    return backend if backend and port.isdigit() else key


@dataclass(frozen=True, slots=True)
class HealthView:
    """Verdicts of the health monitor, with their reasons; absent means UNKNOWN.

    Both are by backend id. Where a port of a backend stands otherwise than the backend, it has a verdict of its own
    under `port_key`; a backend is UP while one of its ports is.
    `addresses`: where backends of other nodes are reached there, as their nodes tell.
    """

    verdicts: Mapping[str, Health] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)

    def of(self, backend_id: str, port: int = 0) -> Health:
        """The verdict over a backend, or over a port of it."""
        return self.verdicts.get(self._key(backend_id, port), Health.UNKNOWN)

    def reason(self, backend_id: str, port: int = 0) -> str:
        """Why it is what `of` says."""
        return self.reasons.get(self._key(backend_id, port), "")

    def _key(self, backend_id: str, port: int) -> str:
        key = port_key(backend_id, port) if port else backend_id
        return key if key in self.verdicts else backend_id

    def apart(self) -> Mapping[str, Mapping[int, Health]]:
        """The verdicts over single ports, by backend and port."""
        found: dict[str, dict[int, Health]] = {}
        for key, verdict in self.verdicts.items():
            if PORT_MARK in key and (backend := backend_of_key(key)) != key:
                found.setdefault(backend, {})[int(key[len(backend) + 1 :])] = verdict
        return found


@dataclass(frozen=True, slots=True)
class PathView:
    """What this node knows of its paths to other nodes: state by node id and path; absent means UNPROVEN."""

    states: Mapping[tuple[str, Path], PathState] = field(default_factory=dict)

    def of(self, node: str, path: Path) -> PathState:
        return self.states.get((node, path), PathState.UNPROVEN)


@dataclass(frozen=True, slots=True)
class Target:
    """A backend as one frontend uses it. `weight` is effective: 0 gets no new flows, but keeps those it has.

    `via` is the address of the node that runs it, where that is another one: this host cannot reach the backend
    itself, so `address` is the same and `port` is for the other node's agent to connect to. `engine` is that node's.
    `path` is how this node gets there. Where no path is proven, `masked` says why: `weight` is 0 here, and `agreed` is
    the weight that all nodes have agreed upon.
    """

    backend: str
    address: Address
    port: int
    weight: int
    local: bool = True
    node: str = ""
    container: str = ""
    via: Address | None = None
    engine: EngineKind = EngineKind.UNKNOWN
    path: Path = Path.LOCAL
    masked: str = ""
    agreed: int = 0  # where it is masked
    handed: bool = True  # on another node: its peer port is shown to take flows, also those of own processes here


@dataclass(frozen=True, slots=True)
class FrontendState:
    """What one frontend should do. `targets` are sorted by backend id.

    `passing`: none of its targets can be reached, from this node or from any, so flows that start are left to Docker's
    own mesh.
    `proxied`: the kernel engine leaves flows that start to its fallback proxy, which announces the client to the task.
    """

    frontend: Frontend
    service: str  # the service's id
    service_name: str
    options: ServiceOptions
    targets: tuple[Target, ...] = ()
    panic: bool = False  # every backend is down by health, so all of them are used
    passing: bool = False
    proxied: bool = False

    @property
    def punted(self) -> bool:
        """Whether the kernel engine's programs leave flows that start to the stack."""
        return self.passing or self.proxied


@dataclass(frozen=True, slots=True)
class DesiredState:
    """What the node should serve, whole. `generation` increases by one with every change."""

    generation: int = 0
    frontends: Mapping[Frontend, FrontendState] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    nodes: tuple[Address, ...] = ()  # all nodes of the cluster, sorted: only they may hand flows to this one


@dataclass(frozen=True, slots=True)
class Flow:
    """A 5-tuple as the client sees it."""

    source: Address
    source_port: int
    destination: Address
    destination_port: int
    protocol: Protocol
