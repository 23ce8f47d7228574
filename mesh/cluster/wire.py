# SPDX-License-Identifier: Apache-2.0
"""The relay's messages: MessagePack (msgspec) in WebSocket frames. Pure: encode, decode, diff, patch.

Compatibility: a message has optional fields only where they came later, unknown fields are ignored, and a peer one
version older or newer is understood (VERSION, OLDEST). Names on the wire are short, stable and documented here.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Final

import msgspec

from mesh import model
from mesh.errors import MeshError
from mesh.model import Backend, EngineKind, Node, Problem, ProofLevel, PublishedPort, Service
from mesh.options import from_compact, to_compact

VERSION: Final = 2
OLDEST: Final = 1
CHANGES: Final = 2  # the version from which a report may tell of digests only what has changed
SOURCE: Final = "relay"  # `source` of an inventory received over the relay
MAX_MESSAGE: Final = 32 << 20  # bytes, from a manager; a snapshot of 10,000 backends has about 2 MB
MAX_REPORT: Final = 2 << 20  # bytes, to a manager; a report with the digests of 10,000 frontends has about 0.3 MB
MAX_DIGESTS: Final = 1 << 16  # frontends of a report


class WireError(MeshError):
    """A peer sent an unusable message; the connection is closed and counted."""


class Port(msgspec.Struct, array_like=True, frozen=True):
    published: int
    target: int
    protocol: int
    address: str = "::"


class WireService(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    name: str
    ports: tuple[Port, ...]
    options: dict[str, Any] = {}  # those that have not their default, in the compact form of mesh.options
    replicas: int | None = None


class WireBackend(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    service: str
    node: str
    name: str = ""
    weight: int = 1
    draining: bool = False
    ready: bool = True
    container: str = ""


class WireNode(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    name: str
    address: str = ""
    up: bool = True
    weight: int = 1
    engine: str = ""
    proof: int = 0  # a value of model.ProofLevel


class WireProblem(msgspec.Struct, array_like=True, frozen=True):
    """What is wrong with labels. `severity` is a value of model.Severity; one that is not known is a warning."""

    where: str
    message: str
    remedy: str = ""
    severity: str = "warning"


class Drain(msgspec.Struct, array_like=True, frozen=True):
    """Whether an operator wants something drained on all nodes. Of two words the one with the later stamp holds."""

    stamp: int  # Unix milliseconds, later than that of the word before, whatever the clock says
    drained: bool


class Key(msgspec.Struct, array_like=True, frozen=True):
    """A key of the swarm (mesh.cluster.keys)."""

    made: int  # Unix milliseconds
    secret: bytes
    active: bool = False  # all agents held it once: nodes prove by it


class Follower(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an agent follows the drains: the digest of those in force there, and connections left by drained thing.

    `addresses` are those of its node's backends there, to be shown to people; a build before tells none.
    """

    digest: str = ""
    held: dict[str, int] = {}
    addresses: dict[str, str] = {}


class HealthReport(msgspec.Struct, array_like=True, frozen=True):
    """A backend's health as its own node sees it; of a manager also PENDING. `health` is a word of HEALTH_WORDS."""

    health: str
    reason: str = ""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message of both sides."""

    version: int
    oldest: int
    mesh: str  # the build's version
    engine: str = ""


class Content(msgspec.Struct, frozen=True):
    """The contents of one generation, keyed by id."""

    services: dict[str, WireService] = {}
    backends: dict[str, WireBackend] = {}
    nodes: dict[str, WireNode] = {}
    verdicts: dict[str, HealthReport] = {}
    problems: dict[str, WireProblem] = {}
    drains: dict[str, Drain] = {}  # by "backend:ID" or "node:ID"
    followers: dict[str, Follower] = {}  # by node
    keys: dict[str, Key] = {}  # by name


KINDS: Final = Content.__struct_fields__
"""The maps of a content; a delta has `drop_KIND` for each."""


class Snapshot(msgspec.Struct, tag="snapshot", frozen=True):
    """The whole state of one generation."""

    generation: int
    content: Content


class Delta(msgspec.Struct, tag="delta", frozen=True, omit_defaults=True):
    """The changes from generation `base` to `generation`. A receiver that does not hold `base` asks for a snapshot."""

    base: int
    generation: int
    put: Content
    drop_services: tuple[str, ...] = ()
    drop_backends: tuple[str, ...] = ()
    drop_nodes: tuple[str, ...] = ()
    drop_verdicts: tuple[str, ...] = ()
    drop_problems: tuple[str, ...] = ()
    drop_drains: tuple[str, ...] = ()
    drop_followers: tuple[str, ...] = ()
    drop_keys: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing has changed."""
        return not any(getattr(self.put, kind) or getattr(self, f"drop_{kind}") for kind in KINDS)


class Report(msgspec.Struct, tag="report", frozen=True):
    """A node's verdicts over its own backends, whole, and what it says of its tables."""

    verdicts: dict[str, HealthReport]
    digests: dict[str, str] = {}  # table digests by frontend, for `mesh status --cluster`
    generation: int = 0
    engine: str = ""
    changes: bool = False  # `digests` are those that have changed since the last report on this connection; "": gone
    reads: bool = False  # the node is a manager and its Engine answers
    drains: dict[str, Drain] | None = None  # all it knows, or {} as before; None: a build without
    follower: Follower = Follower()
    address: str = ""  # where other nodes reach the node, by its own setting; empty: as Swarm says
    proof: int = 0  # how far it proves: a value of model.ProofLevel; 0: a build without
    holds: tuple[str, ...] = ()  # names of the keys that its engine has, first the one that it proves by
    keys: dict[str, Key] = {}  # a manager's, for other managers
    clock: float = 0.0  # Unix seconds there, when this was sent; 0: not told


class Subscribe(msgspec.Struct, tag="subscribe", frozen=True):
    """Asks for a snapshot, then deltas. Sent again when a delta does not fit."""


Message = Hello | Snapshot | Delta | Report | Subscribe
HEALTH_WORDS: Final = {health: health.value for health in model.Health} | {model.Health.PENDING: "awaited"}
"""Health on the wire. PENDING is called "awaited" there for ever: builds before that name know only this word, and take
one that they do not know for UNKNOWN, which would let new tasks in at once."""
_HEALTH_OF: Final = {word: health for health, word in HEALTH_WORDS.items()}
_SEVERITY_OF: Final = {severity.value: severity for severity in model.Severity}
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Encode a message as one frame, MessagePack."""
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Decode one frame.

    Raises:
        WireError: it is not a valid message; the error names the place in it.
    """
    try:
        message: Message = _DECODER.decode(data)
        return message
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise WireError(f"not a message of the relay: {error}", where="relay") from error


def check_version(hello: Hello) -> None:
    """Check that both sides speak a common protocol version.

    Raises:
        WireError: they do not; the remedy says which side to upgrade.
    """
    if hello.version < OLDEST or hello.oldest > VERSION:
        who = "the peer" if hello.version < OLDEST else "this node"
        raise WireError(
            f"relay protocol {hello.version} (mesh {hello.mesh}) against {VERSION} here",
            where="relay",
            remedy=f"upgrade {who}; versions one apart work together",
        )


def health_report(health: model.Health, reason: str = "") -> HealthReport:
    return HealthReport(HEALTH_WORDS[health], reason)


def health_of(report: HealthReport) -> model.Health:
    """The health that a report tells; UNKNOWN for a word that this build does not know."""
    return _HEALTH_OF.get(report.health, model.Health.UNKNOWN)


def service_of(service: Service) -> WireService:
    ports = tuple(Port(p.published, p.target, int(p.protocol), str(p.address)) for p in service.ports)
    return WireService(service.id, service.name, ports, to_compact(service.options), service.replicas)


def backend_of(backend: Backend) -> WireBackend:
    """The address is left out: only the backend's own node reaches it there."""
    b = backend
    draining = b.intent is model.Intent.DRAINING
    return WireBackend(b.id, b.service, b.node, b.name, b.weight, draining, b.ready, b.container)


def node_of(node: Node) -> WireNode:
    return WireNode(node.id, node.name, str(node.address or ""), node.up, node.weight, node.engine, int(node.proof))


def to_service(wire: WireService) -> Service:
    """Raises ValueError for a value out of range, as do `to_backend` and `to_node`."""
    ports = (
        PublishedPort(p.published, p.target, model.Protocol(p.protocol), ipaddress.ip_address(p.address))
        for p in wire.ports
    )
    return Service(wire.id, wire.name, tuple(ports), from_compact(wire.options), wire.replicas)


def to_backend(wire: WireBackend) -> Backend:
    w = wire
    intent = model.Intent.DRAINING if w.draining else model.Intent.ACTIVE
    return Backend(w.id, w.service, w.node, None, w.name, w.weight, intent, w.ready, False, w.container)


def to_node(wire: WireNode) -> Node:
    address = ipaddress.ip_address(wire.address) if wire.address else None
    proof = ProofLevel.told(wire.proof)
    return Node(wire.id, wire.name, address, wire.up, wire.weight, EngineKind.told(wire.engine), proof)


def problem_of(problem: Problem) -> WireProblem:
    return WireProblem(problem.where, problem.message, problem.remedy, problem.severity.value)


def to_problem(wire: WireProblem) -> Problem:
    severity = _SEVERITY_OF.get(wire.severity, model.Severity.WARNING)
    return Problem(wire.where, wire.message, wire.remedy, severity)


def diff(old: Snapshot, new: Snapshot) -> Delta:
    """The changes from one snapshot to another."""
    before, after = old.content, new.content

    def put(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        if a is b:
            return {}
        return {key: value for key, value in b.items() if (held := a.get(key)) is not value and held != value}

    pairs = {kind: (getattr(before, kind), getattr(after, kind)) for kind in KINDS}
    return Delta(
        old.generation,
        new.generation,
        Content(**{kind: put(a, b) for kind, (a, b) in pairs.items()}),
        **{f"drop_{kind}": tuple(a.keys() - b.keys()) for kind, (a, b) in pairs.items()},
    )


def patch(old: Snapshot, delta: Delta) -> Snapshot:
    """Apply a delta to a snapshot.

    Raises:
        WireError: the delta does not start at the generation of `old`.
    """
    if delta.base != old.generation:
        raise WireError(f"a delta from generation {delta.base}, this node has {old.generation}", where="relay")

    def step(a: dict[str, Any], put: dict[str, Any], drop: tuple[str, ...]) -> dict[str, Any]:
        gone = frozenset(drop)
        return {key: value for key, value in {**a, **put}.items() if key not in gone} if put or drop else a

    before, put = old.content, delta.put
    maps = {k: step(getattr(before, k), getattr(put, k), getattr(delta, f"drop_{k}")) for k in KINDS}
    return Snapshot(delta.generation, Content(**maps))
