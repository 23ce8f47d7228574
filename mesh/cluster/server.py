# SPDX-License-Identifier: Apache-2.0
"""What a node says over mutual TLS: who it is, to any node; a manager also inventory, and it takes verdicts back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from aiohttp import WSMsgType, web

from mesh import __version__
from mesh.cluster import wire
from mesh.cluster.credentials import CredentialsError, CredentialsWatch, Identity, peer_identity
from mesh.cluster.memo import Outgoing
from mesh.model import Inventory

HEARTBEAT: Final = 1.0  # seconds between pings; a pong is due within half of that
QUEUE: Final = 64  # frames a slow subscriber may be behind before it gets a snapshot instead
LARGE: Final = 1 << 16  # bytes; larger frames go to LARGE_AT_ONCE nodes at a time, so that pings are answered meanwhile
LARGE_AT_ONCE: Final = 4
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
    queue: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(QUEUE))
    subscribed: bool = False
    digests: dict[str, str] = field(default_factory=dict)  # as it last told
    early: wire.Report | None = None  # its last report, if that speaks of backends that are not known here yet


def _ignore_report(node: str, report: wire.Report) -> None:
    """Of a node that is no manager."""


def _ignore_node(node: str, here: bool) -> None:
    """Likewise."""


class RelayServer:
    """Serves agents of the same swarm.

    Args:
        credentials: this node's.
        port: TCP port, all addresses; 0 lets the kernel choose (tests).
        manager: serve inventory too; a worker only says who it is, which `mesh check --cluster` asks.
        on_report: a node's verdicts over its own backends, whole, whenever they change.
        on_node: a node went silent without closing its connection (False) or is back (True).
    """

    def __init__(
        self,
        credentials: CredentialsWatch,
        port: int,
        *,
        engine: str = "",
        manager: bool = True,
        on_report: OnReport = _ignore_report,
        on_node: OnNode = _ignore_node,
    ) -> None:
        self._credentials = credentials
        self._manager = manager
        self._engine = engine
        self.port = port
        self._on_report = on_report
        self._on_node = on_node
        self._peers: set[_Peer] = set()
        self._owners: dict[str, str] = {}  # backend -> node
        self._outgoing = Outgoing()
        self._published: Inventory | None = None
        self._snapshot = wire.Snapshot(0, wire.Content())
        self._encoded: tuple[wire.Snapshot, bytes] | None = None
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._silent: set[str] = set()
        self.engines: dict[str, str] = {}  # by node, of all that ever called
        self.refused: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    @property
    def nodes(self) -> dict[str, str]:
        """Connected nodes and their mesh versions."""
        return {peer.identity.node: peer.hello.mesh for peer in self._peers}

    def publish(self, inventory: Inventory, verdicts: dict[str, wire.Verdict]) -> None:
        """Hand a new state to all subscribers: one encoding, however many there are."""
        content = self._outgoing.content(inventory, verdicts)
        if content == self._snapshot.content:
            return
        old, self._snapshot = self._snapshot, wire.Snapshot(self._snapshot.generation + 1, content)
        if self._published is None or inventory.backends is not self._published.backends:
            before, self._owners = self._owners, {backend.id: backend.node for backend in inventory.backends}
            new = self._owners.keys() - before.keys()
            for peer in self._peers:
                if peer.early is not None and not new.isdisjoint(peer.early.verdicts):
                    self._report(peer, peer.early)
        self._published = inventory
        frame = wire.encode(wire.diff(old, self._snapshot))
        for peer in self._peers:
            if peer.subscribed:
                self._offer(peer, frame)

    def _offer(self, peer: _Peer, frame: bytes) -> None:
        try:
            peer.queue.put_nowait(frame)
        except asyncio.QueueFull:  # back-pressure: one snapshot stands for all that was not taken
            self.totals["relay_snapshots_for_slow_nodes"] += 1
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
        if self._manager:
            app.router.add_get("/v1/relay", self._handle)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        site: web.TCPSite | None = None
        server = None
        said = ""
        try:
            while True:
                try:
                    context = self._credentials.current().server
                    if context is not server:
                        if site is not None:
                            await site.stop()
                        # A process that takes over listens while its predecessor still does.
                        site = web.TCPSite(runner, None, self.port, ssl_context=context, reuse_port=True)
                        await site.start()
                        self.port = int(runner.addresses[0][1])
                        server = context
                        log.info("relay listens", port=self.port)
                    said = ""
                except (CredentialsError, OSError) as error:
                    if str(error) != said:
                        said = str(error)
                        log.error("relay cannot listen", error=said, port=self.port)
                await asyncio.sleep(_ROTATION_CHECK)
        finally:
            await runner.cleanup()

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
        return identity

    async def _about(self, request: web.Request) -> web.Response:
        """GET /v1/node, JSON: node, role, mesh (version), engine."""
        caller = self._admit(request)
        if isinstance(caller, web.Response):
            return caller
        ours = self._credentials.current().identity
        return web.json_response({"node": ours.node, "role": ours.role, "mesh": __version__, "engine": self._engine})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        identity = self._admit(request)
        if isinstance(identity, web.Response):
            return identity
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=wire.MAX_MESSAGE, compress=False)
        await socket.prepare(request)
        peer: _Peer | None = None
        sender: asyncio.Task[None] | None = None
        try:
            peer = await self._greet(socket, identity, request.remote or "")
            sender = asyncio.create_task(self._send(socket, peer))
            await self._receive(socket, peer)
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
                self._leave(socket, peer)
        return socket

    async def _greet(self, socket: web.WebSocketResponse, identity: Identity, address: str) -> _Peer:
        await socket.send_bytes(wire.encode(wire.Hello(wire.VERSION, wire.OLDEST, __version__, self._engine)))
        message = await socket.receive(timeout=5)
        hello = wire.decode(message.data) if message.type is WSMsgType.BINARY else None
        if not isinstance(hello, wire.Hello):
            raise wire.WireError("the first message is not a hello", where="relay")
        wire.check_version(hello)
        peer = _Peer(identity, address, hello)
        self._peers.add(peer)
        self.engines[identity.node] = hello.engine
        if identity.node in self._silent:
            self._silent.discard(identity.node)
            self._on_node(identity.node, True)
        log.info("node connected", node=identity.node, address=address, mesh=hello.mesh)
        return peer

    async def _send(self, socket: web.WebSocketResponse, peer: _Peer) -> None:
        while True:
            frame = await peer.queue.get()
            self.totals["relay_bytes_sent"] += len(frame)
            if len(frame) < LARGE:
                await socket.send_bytes(frame)
            else:
                async with self._large:
                    await socket.send_bytes(frame)

    async def _receive(self, socket: web.WebSocketResponse, peer: _Peer) -> None:
        async for message in socket:
            if message.type is WSMsgType.ERROR:  # the connection broke
                return
            if message.type is not WSMsgType.BINARY:
                raise wire.WireError(f"a frame of type {message.type.name}", where="relay")
            received: Any = wire.decode(message.data)
            if isinstance(received, wire.Subscribe):
                peer.subscribed = True
                self._offer(peer, self._whole())
            elif isinstance(received, wire.Report):
                self._report(peer, received)
            else:
                raise wire.WireError(f"{type(received).__name__} is not for managers", where="relay")

    def _report(self, peer: _Peer, report: wire.Report) -> None:
        """Take a node's word for its own backends only; for those that another manager knew first, once they are known
        here."""
        own = {key: value for key, value in report.verdicts.items() if self._owners.get(key) == peer.identity.node}
        foreign = sum(1 for key in report.verdicts if self._owners.get(key, peer.identity.node) != peer.identity.node)
        if foreign:
            self.refused["foreign_verdict"] += foreign
            log.warning("a node reported backends that are not its own", node=peer.identity.node, count=foreign)
        peer.early = None if report.verdicts.keys() <= self._owners.keys() else report
        if not report.changes:
            peer.digests = {}
        for frontend, digest in report.digests.items():
            if digest:
                peer.digests[frontend] = digest
            else:
                peer.digests.pop(frontend, None)
        reads = report.reads and peer.identity.is_manager
        whole = wire.Report(own, peer.digests, report.generation, report.engine, reads=reads)
        self._on_report(peer.identity.node, whole)

    def _leave(self, socket: web.WebSocketResponse, peer: _Peer) -> None:
        self._peers.discard(peer)
        node = peer.identity.node
        silent = socket.close_code not in CLOSED
        log.info("node disconnected", node=node, silent=silent)
        if silent and all(other.identity.node != node for other in self._peers):
            self._silent.add(node)
            self._on_node(node, False)
