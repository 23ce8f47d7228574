# SPDX-License-Identifier: Apache-2.0
"""What a node says over mutual TLS: who it is, to any node; a manager also inventory, and it takes verdicts back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import structlog
from aiohttp import WSMsgType, web

from mesh import __version__
from mesh.cluster import wire
from mesh.cluster.ask import NODE, PATH, Answer, Query
from mesh.cluster.credentials import CredentialsError, CredentialsWatch, Identity, is_same, peer_identity
from mesh.cluster.heartbeat import Heartbeats
from mesh.cluster.reports import Texts
from mesh.cluster.translate import Outgoing
from mesh.errors import MeshError, plain
from mesh.listener import Listener, RefusedError, http_protocol
from mesh.model import PORT_MARK, EngineKind, Inventory, backend_of_key
from mesh.providers.base import EarlierBuildError

EACH: Final = 2e-4  # seconds that a change costs for each subscriber: TLS, a system call
SHARE: Final = 2.0  # so many times as long as that takes, until the next change is told: at most a third of the time
QUEUE: Final = 64  # frames a slow subscriber may be behind before it gets a snapshot instead
LARGE: Final = 1 << 16  # bytes; larger frames go to LARGE_AT_ONCE nodes at a time, so that pings are answered meanwhile
LARGE_AT_ONCE: Final = 4
ASKED_AT_ONCE: Final = 8  # questions of other nodes that are answered at a time
LARGE_SHARE: Final = 4.0  # so many times as long as a large message took to take, until the next of that node is read
SILENT: Final = 10.0  # seconds after which a connection that asks nothing is closed
EARLY: Final = 10_000  # backends at most of a report that is kept until they are known
_ROTATION_CHECK: Final = 5.0
CLOSED: Final = (1000, 1001, 1002)  # the peer, or we, said why (RFC 6455, 7.4.1)

log = structlog.get_logger("mesh.cluster")

OnReport = Callable[[str, wire.Report], None]
OnNode = Callable[[str, bool], None]


@dataclass(slots=True, eq=False)
class _Peer:
    """One connected agent."""

    identity: Identity
    address: str
    hello: wire.Hello
    socket: web.WebSocketResponse
    queue: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(QUEUE))
    subscribed: bool = False
    silent: bool = False
    digests: dict[str, str] = field(default_factory=dict)  # as it last told
    early: wire.Report | None = None  # its last report, if that speaks of backends that are not known here yet
    ended: bool = False  # by us: it is no member any more


def _ignore_report(node: str, report: wire.Report) -> None:
    """Of a node that is no manager."""


def _ignore_node(node: str, here: bool) -> None:
    """Likewise."""


async def _pass_nothing(node: str, question: str, query: Query) -> Mapping[str, Any]:
    raise MeshError("this node asks nobody")


@dataclass(frozen=True, slots=True)
class Questions:
    """What other nodes may ask this one.

    Attributes:
        answers: by question.
        ask: asks another node, by its id, for one that cannot call it.
    """

    answers: Mapping[str, Answer] = field(default_factory=dict)
    ask: Callable[[str, str, Query], Awaitable[Mapping[str, Any]]] = _pass_nothing


class RelayServer:
    """Serves agents of the same swarm: of the nodes in the inventory, once that is known. Until then nobody is told or
    believed anything, so that the certificate of a node that was removed is of no use at any time.

    Args:
        credentials: this node's.
        port: TCP port, all addresses; 0 lets the kernel choose (tests).
        manager: take reports, and serve inventory after `tell`; a worker only says who it is, which
            `mesh check --cluster` asks.
        on_report: a node's verdicts over its own backends, whole, whenever they change.
        on_node: a node went silent without closing its connection (False) or is back (True).
        questions: what other nodes may ask this one (mesh.cluster.ask).
    """

    def __init__(
        self,
        credentials: CredentialsWatch,
        port: int,
        *,
        engine: EngineKind = EngineKind.UNKNOWN,
        manager: bool = True,
        on_report: OnReport = _ignore_report,
        on_node: OnNode = _ignore_node,
        questions: Questions | None = None,
    ) -> None:
        self._credentials = credentials
        self._manager = manager
        self._engine = engine
        self.port = port
        self.problem = ""  # why it does not listen
        self._on_report = on_report
        self._on_node = on_node
        self._questions = questions or Questions()
        self._asked = asyncio.Semaphore(ASKED_AT_ONCE)
        self._peers: set[_Peer] = set()
        self._owners: dict[str, str] = {}  # backend -> node
        self._own: dict[str, set[str]] = {}  # node -> its backends
        self._members: frozenset[str] | None = None  # nodes of the swarm; None: not known yet
        self._blocked: frozenset[str] = frozenset()  # nodes whose certificates the swarm has revoked
        self._own_identity: Identity | None = None  # as connections were let in by it
        self._listener: Listener | None = None
        self._outgoing = Outgoing()
        self._known: object = None  # the backends that are in `_owners`
        self._snapshot = wire.Snapshot(0, wire.Content())
        self._next: tuple[Inventory, dict[str, wire.HealthReport]] | None = None  # to be told soon
        self._last: tuple[Inventory, dict[str, wire.HealthReport]] | None = None  # as was told last
        self._drains: Mapping[str, wire.Drain] = {}
        self._followers: Mapping[str, wire.Follower] = {}
        self._keys: Mapping[str, wire.Key] = {}
        self._pause: asyncio.TimerHandle | None = None  # until something may be told again
        self._encoded: tuple[wire.Snapshot, bytes] | None = None
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._heartbeats = Heartbeats()
        self._tells = True
        self._closing: set[asyncio.Task[bool]] = set()
        self._silent: set[str] = set()
        self._texts = Texts()  # one for all nodes, which mostly agree
        self.engines: dict[str, EngineKind] = {}  # by node, of all that ever called
        self.refused: Counter[str] = Counter()

    @property
    def nodes(self) -> dict[str, str]:
        """Connected nodes and their mesh versions."""
        return {peer.identity.node: peer.hello.mesh for peer in self._peers}

    def tell(self, tells: bool) -> None:
        """Whether to serve inventory. Who does not sends subscribers away, to other managers, and takes reports."""
        self._tells = tells
        for peer in self._peers if not tells else ():
            if peer.subscribed:
                self._send_away(peer)

    def _send_away(self, peer: _Peer) -> None:
        closing = asyncio.create_task(peer.socket.close(code=1001, message=b"it tells nobody now"))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def know(self, inventory: Inventory) -> None:
        """Learn who may call, and whose backends are whose, which says who may report what."""
        self._know_members(frozenset(node.id for node in inventory.nodes), self._blocked)
        if inventory.backends is self._known:
            return
        self._known = inventory.backends
        before, self._owners = self._owners, {backend.id: backend.node for backend in inventory.backends}
        self._own = {}
        for backend, node in self._owners.items():
            self._own.setdefault(node, set()).add(backend)
        new = self._owners.keys() - before.keys()
        for peer in self._peers:
            if peer.early is not None and not new.isdisjoint(map(backend_of_key, peer.early.verdicts)):
                self._report(peer, peer.early)

    def block(self, nodes: frozenset[str]) -> None:
        """Let nobody in whose certificate the swarm has revoked, by node."""
        self._know_members(self._members, nodes)

    def _know_members(self, members: frozenset[str] | None, blocked: frozenset[str]) -> None:
        """Take who may call, and end the connections of others."""
        if (members, blocked) == (self._members, self._blocked):
            return
        self._members, self._blocked = members, blocked
        for peer in self._peers:
            if self._stranger(peer.identity):
                peer.ended = True
                log.warning("a node has left the swarm; its connection ends", node=peer.identity.node)
        if self._listener is not None:
            self._listener.end(lambda node: node in blocked or (members is not None and node not in members))

    def _stranger(self, identity: Identity) -> bool:
        """Whether a node is known not to belong to the swarm any more."""
        node = identity.node
        return node in self._blocked or (self._members is not None and node not in self._members)

    def publish(self, inventory: Inventory, verdicts: dict[str, wire.HealthReport]) -> None:
        """Hand a new state to all subscribers: at once, or with what comes meanwhile when they have time for it."""
        self.know(inventory)
        self._next = inventory, verdicts
        if self._pause is None:
            self._publish_next()

    def share(self, drains: Mapping[str, wire.Drain], followers: Mapping[str, wire.Follower]) -> None:
        """Tell subscribers what is drained, and how nodes follow that; with the next state, or with the last again."""
        self._drains, self._followers = drains, followers
        self._next = self._next or self._last
        if self._pause is None:
            self._publish_next()

    def share_keys(self, keys: Mapping[str, wire.Key]) -> None:
        """Tell subscribers the swarm's keys, likewise."""
        self._keys = keys
        self._next = self._next or self._last
        if self._pause is None:
            self._publish_next()

    def _publish_next(self) -> None:
        self._pause = None
        if self._next is None:
            return
        (inventory, verdicts), self._last, self._next = self._next, self._next, None
        old = self._snapshot
        content = self._outgoing.content(inventory, verdicts)
        content = msgspec.structs.replace(
            content, drains=dict(self._drains), followers=dict(self._followers), keys=dict(self._keys)
        )
        new = wire.Snapshot(old.generation + 1, content)
        delta = wire.diff(old, new)
        if delta.empty:
            return
        self._snapshot = new
        subscribers = [peer for peer in self._peers if peer.subscribed]
        if subscribers:
            frame = wire.encode(delta)
            for peer in subscribers:
                self._offer(peer, frame)
            pause = SHARE * EACH * len(subscribers)
            self._pause = asyncio.get_running_loop().call_later(pause, self._publish_next)

    def _offer(self, peer: _Peer, frame: bytes) -> None:
        try:
            peer.queue.put_nowait(frame)
        except asyncio.QueueFull:  # back-pressure: one snapshot stands for all that was not taken
            while not peer.queue.empty():
                peer.queue.get_nowait()
            peer.queue.put_nowait(self._whole())

    def _whole(self) -> bytes:
        """The snapshot's frame: one, however many nodes ask for it at once."""
        if self._encoded is None or self._encoded[0] is not self._snapshot:
            self._encoded = self._snapshot, wire.encode(self._snapshot)
        return self._encoded[1]

    async def run(self) -> None:
        """Serve until cancelled. New certificates are taken up without closing what is open."""
        app = web.Application()
        app.router.add_get("/v1/node", self._about)
        app.router.add_get(PATH + "{question}", self._answer)
        if self._manager:
            app.router.add_get("/v1/relay", self._handle)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        protocol = http_protocol(runner, keepalive=SILENT)
        listener = Listener(protocol, self._whose, context=lambda: self._credentials.current().server)
        looking = asyncio.create_task(self._heartbeats.run())
        try:
            said = Counter[str]()
            while True:
                self._listen(listener)
                self.look_again()
                await asyncio.sleep(_ROTATION_CHECK)
                now = Counter({reason: count for reason, count in listener.refused.items() if reason != "handshake"})
                if more := now - said:
                    log.warning("connections to the relay were refused", port=self.port, **more)
                said = now
        finally:
            looking.cancel()
            listener.stop()
            self._listener = None
            if self._pause is not None:
                self._pause.cancel()
                self._pause = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    leaving = [peer.socket.close(code=1001, message=b"it ends") for peer in self._peers]
                    await asyncio.gather(*leaving, return_exceptions=True)
            await runner.cleanup()

    def look_again(self) -> None:
        """End all connections if this node is another one by now than its peers believe: it has left the swarm and
        joined one."""
        with contextlib.suppress(CredentialsError):
            now, before = self._credentials.current().identity, self._own_identity
            self._own_identity = now
            if before is None or is_same(now, before):
                return
            log.warning("this node has joined a swarm anew; connections to it end", node=now.node, was=before.node)
            for peer in self._peers:
                peer.ended = True
            if self._listener is not None:
                self._listener.end(lambda node: True)

    def _listen(self, listener: Listener) -> None:
        """Listen once there are credentials; what comes in later gets those of that time."""
        try:
            self._credentials.current()
            if self._listener is None:
                # A process that takes over listens while its predecessor still does.
                self.port = listener.start("", self.port, shared=True)
                self._listener = listener
                log.info("relay listens", port=self.port)
            self.problem = ""
        except (CredentialsError, OSError) as error:
            said = str(error) if isinstance(error, CredentialsError) else plain(error)
            if said != self.problem:
                self.problem = said
                log.error("relay cannot listen", error=said, port=self.port)

    def _whose(self, transport: asyncio.Transport) -> str:
        """The node whose certificate a new connection has; raises RefusedError for one that is not to be let in."""
        try:
            identity = peer_identity(transport.get_extra_info("peercert") or {})
        except CredentialsError:
            raise RefusedError("certificate") from None
        if self._stranger(identity):
            raise RefusedError("member")
        return identity.node

    def _refuse(self, request: web.Request, reason: str, text: str) -> web.Response:
        self.refused[reason] += 1
        log.warning("relay refused a peer", peer=request.remote, reason=text)
        return web.Response(status=403, text=text + "\n")

    def _admit(self, request: web.Request) -> Identity | web.Response:
        """Who calls, or the refusal."""
        transport = request.transport
        certificate = transport.get_extra_info("peercert") if transport else None
        try:
            identity = peer_identity(certificate or {})
        except CredentialsError as error:
            return self._refuse(request, "certificate", str(error))
        if identity.cluster != self._credentials.current().identity.cluster:
            return self._refuse(request, "cluster", "another swarm's certificate")
        if identity.role not in {"swarm-manager", "swarm-worker"}:
            return self._refuse(request, "role", f"role {identity.role} has no place here")
        if self._stranger(identity):
            return self._refuse(request, "member", f"node {identity.node} is not in the swarm any more")
        return identity

    async def _about(self, request: web.Request) -> web.Response:
        """GET /v1/node, JSON: node, role, mesh (version), engine."""
        caller = self._admit(request)
        if isinstance(caller, web.Response):
            return caller
        ours = self._credentials.current().identity
        return web.json_response({"node": ours.node, "role": ours.role, "mesh": __version__, "engine": self._engine})

    async def _answer(self, request: web.Request) -> web.Response:
        """GET /v1/ask/QUESTION, JSON: the answer, or {"error", "remedy"} with status 400; 404: not known here."""
        caller = self._admit(request)
        if isinstance(caller, web.Response):
            return caller
        question, query = request.match_info["question"], dict(request.query)
        node = query.pop(NODE, "")
        answer = self._questions.answers.get(question)
        if answer is None:
            raise web.HTTPNotFound
        async with self._asked:
            try:
                if node and node != self._credentials.current().identity.node:
                    said = await self._questions.ask(node, question, query)
                else:
                    said = await answer(query)
            except EarlierBuildError:
                raise web.HTTPNotFound from None
            except MeshError as error:
                said = {"error": str(MeshError(error.message, where=error.where)), "remedy": error.remedy}
                return web.json_response(said, status=400)
        return web.json_response(said)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        identity = self._admit(request)
        if isinstance(identity, web.Response):
            return identity
        if self._members is None:
            return web.Response(status=503, text="the swarm has not been read yet\n")
        socket = web.WebSocketResponse(autoping=False, max_msg_size=wire.MAX_REPORT, compress=False)
        await socket.prepare(request)
        peer: _Peer | None = None
        sender: asyncio.Task[None] | None = None
        try:
            peer = await self._greet(socket, identity, request.remote or "")
            sender = asyncio.create_task(self._send(peer))
            async with asyncio.timeout(None) as patience:
                await self._receive(peer, patience)
        except TimeoutError:
            if peer is not None:
                peer.silent = True
            if request.transport is not None:
                request.transport.abort()
        except wire.WireError as error:
            self.refused["message"] += 1
            log.warning("relay closed a connection", node=identity.node, reason=str(error))
            await socket.close(code=1002, message=str(error).encode()[:120])
        finally:
            if sender is not None:
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await sender
            if peer is not None:
                self._leave(peer)
        return socket

    async def _greet(self, socket: web.WebSocketResponse, identity: Identity, address: str) -> _Peer:
        await socket.send_bytes(wire.encode(wire.Hello(wire.VERSION, wire.OLDEST, __version__, self._engine)))
        message = await socket.receive(timeout=5)
        hello = wire.decode(message.data) if message.type is WSMsgType.BINARY else None
        if not isinstance(hello, wire.Hello):
            raise wire.WireError("the first message is not a hello", where="relay")
        wire.check_version(hello)
        peer = _Peer(identity, address, hello, socket)
        self._peers.add(peer)
        self.engines[identity.node] = EngineKind.told(hello.engine)
        if identity.node in self._silent:
            self._silent.discard(identity.node)
            self._on_node(identity.node, True)
        log.info("node connected", node=identity.node, address=address, mesh=hello.mesh)
        return peer

    async def _send(self, peer: _Peer) -> None:
        socket = peer.socket
        while True:
            frame = await peer.queue.get()
            if len(frame) < LARGE:
                await socket.send_bytes(frame)
            else:
                async with self._large:
                    await socket.send_bytes(frame)

    async def _receive(self, peer: _Peer, patience: asyncio.Timeout) -> None:
        """Take what a node says until one side ends it; `patience` ends when it is silent."""
        socket, loop = peer.socket, asyncio.get_running_loop()
        sock = socket.get_extra_info("socket")
        pulse = self._heartbeats.watch(sock, socket.ping, lambda: patience.reschedule(loop.time()))
        try:
            async for message in socket:
                pulse.heard()
                if message.type is WSMsgType.BINARY:
                    begun = loop.time()
                    self._take(peer, wire.decode(message.data))
                    if len(message.data) >= LARGE:  # one node's words leave time for the others'
                        await asyncio.sleep(LARGE_SHARE * (loop.time() - begun))
                elif message.type is WSMsgType.PING:
                    await socket.pong(message.data)
                elif message.type is WSMsgType.ERROR:  # the connection broke
                    return
                elif message.type is not WSMsgType.PONG:
                    raise wire.WireError(f"a frame of type {message.type.name}", where="relay")
        finally:
            pulse.end()

    def _take(self, peer: _Peer, message: wire.Message) -> None:
        if isinstance(message, wire.Report):
            if len(message.digests) + len(peer.digests) * message.changes > wire.MAX_DIGESTS:
                raise wire.WireError(f"a report of more than {wire.MAX_DIGESTS} tables", where="relay")
            self._report(peer, message)
        elif not isinstance(message, wire.Subscribe):
            raise wire.WireError(f"{type(message).__name__} is not for managers", where="relay")
        elif self._tells:
            peer.subscribed = True
            self._offer(peer, self._whole())
        else:
            self._send_away(peer)

    def _report(self, peer: _Peer, report: wire.Report) -> None:
        """Take a node's word for its own backends only; for those that another manager knew first, once they are known
        here."""
        node, mine, reported = peer.identity.node, self._own.get(peer.identity.node, set()), report.verdicts.keys()
        own = {key: report.verdicts[key] for key in mine & reported}
        others = reported - own.keys() if len(own) < len(reported) else set()
        unknown = others - self._owners.keys()
        marked = (key for key in unknown if PORT_MARK in key)
        ports = {key: owner for key in marked if (owner := self._owners.get(backend_of_key(key)))}
        own |= {key: report.verdicts[key] for key, owner in ports.items() if owner == node}
        unknown -= ports.keys()
        if foreign := len(reported) - len(own) - len(unknown):
            self.refused["foreign_verdict"] += foreign
            log.warning("a node reported backends that are not its own", node=node, count=foreign)
        peer.early = report if 0 < len(unknown) <= EARLY else None
        if not report.changes:
            peer.digests = {}
        for frontend, digest in report.digests.items():
            if digest:
                peer.digests[self._texts.one(frontend)] = self._texts.one(digest)
            else:
                peer.digests.pop(frontend, None)
        reads = report.reads and peer.identity.is_manager
        keys = report.keys if peer.identity.is_manager else {}
        whole = msgspec.structs.replace(
            report, verdicts=own, digests=peer.digests, changes=False, reads=reads, keys=keys
        )
        self._on_report(node, whole)

    def _leave(self, peer: _Peer) -> None:
        self._peers.discard(peer)
        node = peer.identity.node
        silent = not peer.ended and (peer.silent or peer.socket.close_code not in CLOSED)
        log.info("node disconnected", node=node, silent=silent)
        if silent and all(other.identity.node != node for other in self._peers):
            self._silent.add(node)
            self._on_node(node, False)
