# SPDX-License-Identifier: Apache-2.0
"""A node's side of the relay: a connection to every manager for its reports, the inventory from one of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import aiohttp
import msgspec
import structlog

from mesh import __version__
from mesh.cluster import wire
from mesh.cluster.credentials import CredentialsError, CredentialsWatch, Identity, is_same, peer_identity
from mesh.cluster.heartbeat import Heartbeats
from mesh.cluster.relay_server import CLOSED
from mesh.cluster.translate import Incoming
from mesh.errors import MeshError, plain
from mesh.model import EngineKind, HealthView
from mesh.netaddr import join_host_port
from mesh.providers.base import ProviderStatus, Publish

_CONNECT_TIMEOUT: Final = 1.5
OPEN_TIMEOUT: Final = 10.0  # seconds until a manager has said hello, with TLS and all
_RETRY: Final = (0.1, 1.0)  # seconds until a lost link is tried again: first, most; doubled each time, less by chance
_CALM: Final = 3.0  # seconds for which a link was there, after which its retries begin with the first again
_CLOSE_TIMEOUT: Final = 0.2  # seconds for which the answer to the last word is waited for
SHOWN: Final = 3  # managers whose errors are told
_REFRESH: Final = 5.0  # seconds between looks at the list of managers

_REFUSALS: Final = {
    403: "it does not let this node in: by what it has read, the node is not in the swarm",
    404: "it tells nobody now: its own Engine is away, or it is no manager any more",
    503: "it has not read the swarm yet",
}

Managers = Callable[[], Awaitable[Sequence[tuple[str, int]]]]
OnVerdicts = Callable[[HealthView], None]
OnLink = Callable[[str, bool], None]
OnContent = Callable[[wire.Content], None]
IsManager = Callable[[str], bool]

log = structlog.get_logger("mesh.cluster")


class _Link:
    """The connection to one manager, made again whenever it is lost."""

    def __init__(self, relay: RelayProvider, host: str, port: int) -> None:
        self._relay = relay
        self.address = (host, port)
        self.said = ""  # why it failed last
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._own: Identity | None = None  # this node's, by which it was made
        self._version = wire.OLDEST  # the manager's
        self._told: dict[str, str] | None = None  # digests, on this connection
        self._told_drains: dict[str, wire.Drain] | None = None  # likewise
        self._hurry = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"relay {host}:{port}")

    @property
    def connected(self) -> bool:
        return self._socket is not None and not self._socket.closed

    @property
    def outdated(self) -> bool:
        """Whether this node is another one by now than the manager believes: it has left the swarm and joined one."""
        own = self._relay.own()
        return own is not None and self._own is not None and not is_same(own, self._own)

    async def send(self, message: wire.Message) -> None:
        """Send if connected; a lost connection is `_run`'s business."""
        if self._socket is not None and not self._socket.closed:
            try:
                await self._socket.send_bytes(wire.encode(message))
            except (ConnectionError, aiohttp.ClientError) as error:
                log.debug("relay send failed", manager=self.address, error=str(error))

    async def report(self, report: wire.Report) -> None:
        """Send a report; of its digests those that have changed, where the manager understands that."""
        told, self._told = self._told, report.digests
        drains, self._told_drains = self._told_drains, report.drains
        if drains is report.drains is not None:
            report = msgspec.structs.replace(report, drains={})
        if told is not None and self._version >= wire.CHANGES:
            changed = {frontend: digest for frontend, digest in report.digests.items() if told.get(frontend) != digest}
            changed |= dict.fromkeys(told.keys() - report.digests.keys(), "")
            report = msgspec.structs.replace(report, digests=changed, changes=True)
        await self.send(report)

    def hurry(self) -> None:
        """Try now, if it is lost: there may be somebody again."""
        self._hurry.set()

    async def _run(self) -> None:
        first, most = _RETRY
        pause, host_port = first / 2, join_host_port(*self.address)
        while True:
            begun = time.monotonic()
            try:
                await self._talk()
            except (OSError, aiohttp.ClientError, TimeoutError, MeshError) as error:
                self._relay.failed(self, error)
            except Exception as error:  # whatever it is: nobody else makes this link again
                log.exception("internal error; this link is made again", manager=host_port)
                self._relay.failed(self, error)
            finally:
                self._socket = None
                self._relay.lost(self)
            pause = first if time.monotonic() - begun > _CALM else min(2 * pause, most)
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):  # noqa: S311 -- jitter
                    await self._hurry.wait()

    async def _talk(self) -> None:
        host, _ = self.address
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as session, contextlib.AsyncExitStack() as stack:
            self._own = self._relay.own()
            async with asyncio.timeout(OPEN_TIMEOUT):
                socket = await stack.enter_async_context(self._call(session))
                hello = await self._greet(socket)
            self._version, self._told, self._told_drains = hello.version, None, None
            self._socket = socket
            await self._relay.connected(self)
            try:
                async with asyncio.timeout(None) as patience:
                    await self._listen(socket, patience)
            except TimeoutError:
                self._relay.on_link(host, False)
                raise TimeoutError("it says nothing any more") from None
            if socket.close_code not in CLOSED:
                self._relay.on_link(host, False)
            if isinstance(socket.exception(), Exception):
                raise ConnectionError(str(socket.exception()))

    def _call(self, session: aiohttp.ClientSession) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        return session.ws_connect(
            f"https://{join_host_port(*self.address)}/v1/relay",
            ssl=self._relay.credentials.current().client,
            server_hostname="swarm-manager",  # a DNS name in managers' certificates only
            autoping=False,
            max_msg_size=wire.MAX_MESSAGE,
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_TIMEOUT),
        )

    async def _greet(self, socket: aiohttp.ClientWebSocketResponse) -> wire.Hello:
        """Find out whether this is a manager and which version it speaks; raises MeshError where it is none."""
        where = join_host_port(*self.address)
        identity = peer_identity(socket.get_extra_info("peercert") or {})
        if not identity.is_manager or identity.cluster != self._relay.credentials.current().identity.cluster:
            raise CredentialsError("not a manager of this swarm", where=where)
        if not self._relay.is_manager(identity.node):
            said = f"node {identity.node} is no manager any more, whatever its certificate says"
            raise CredentialsError(said, where=where)
        await socket.send_bytes(wire.encode(wire.Hello(wire.VERSION, wire.OLDEST, __version__, self._relay.engine)))
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise wire.WireError("it ended before its hello", where=where)
        hello = wire.decode(message.data)
        if not isinstance(hello, wire.Hello):
            raise wire.WireError("the first message is not a hello", where=where)
        wire.check_version(hello)
        return hello

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse, patience: asyncio.Timeout) -> None:
        """Take what the manager says until one side ends it; `patience` ends when it is silent."""
        loop = asyncio.get_running_loop()
        pulse = self._relay.pulses.watch(
            socket.get_extra_info("socket"), socket.ping, lambda: patience.reschedule(loop.time())
        )
        try:
            async for message in socket:
                pulse.heard()
                if message.type is aiohttp.WSMsgType.BINARY:
                    await self._relay.received(self, message.data)
                elif message.type is aiohttp.WSMsgType.PING:
                    await socket.pong(message.data)
        finally:
            pulse.end()


class RelayProvider:
    """The inventory as a manager's agent knows it (a Provider), and this node's verdicts to all managers.

    Args:
        managers: the managers' addresses now, asked for every few seconds.
        inventory: whether it is wanted, at first; see `listen`.
        on_verdicts: all nodes' verdicts, whenever they change.
        on_content: all that a manager tells, before the inventory of it is published.
        is_manager: whether a node is a manager now; its certificate says so for months after that.
        on_link: a manager's host, and whether it is here (True) or went silent without closing its connection.
    """

    def __init__(
        self,
        credentials: CredentialsWatch,
        managers: Managers,
        *,
        engine: EngineKind = EngineKind.UNKNOWN,
        inventory: bool = True,
        on_verdicts: OnVerdicts = lambda view: None,
        on_link: OnLink = lambda host, here: None,
        on_content: OnContent = lambda content: None,
        is_manager: IsManager = lambda node: True,
    ) -> None:
        self.credentials = credentials
        self.engine = engine
        self.on_link = on_link
        self.is_manager = is_manager
        self._managers = managers
        self._inventory = inventory
        self._on_verdicts = on_verdicts
        self._on_content = on_content
        self._links: dict[tuple[str, int], _Link] = {}
        self._source: _Link | None = None
        self._incoming = Incoming()
        self._snapshot: wire.Snapshot | None = None
        self._publish: Publish | None = None
        self._published: object = None
        self._report = wire.Report({})
        self._reporter: Identity | None = None  # who made it
        self._heard = 0.0
        self._error = "no manager has answered yet"
        self._look = asyncio.Event()
        self.pulses = Heartbeats()

    async def run(self, publish: Publish) -> None:
        """Keep a link to every manager until cancelled."""
        self._publish = publish
        looking = asyncio.create_task(self.pulses.run())
        try:
            while True:
                self._look.clear()
                try:
                    self._follow(await self._managers())
                except (OSError, MeshError) as error:
                    self._error = str(error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REFRESH if self._links else 0.5):
                        await self._look.wait()
        finally:
            looking.cancel()
            for link in self._links.values():
                link.task.cancel()
            await asyncio.gather(*(link.task for link in self._links.values()), return_exceptions=True)

    def _follow(self, managers: Sequence[tuple[str, int]]) -> None:
        """Have a link to each of them, made by who this node is now; to others none, unless it is not known which."""
        for address, link in list(self._links.items()):
            if link.outdated or (managers and address not in managers):
                del self._links[address]
                link.task.cancel()
                self.lost(link)
        for address in managers:
            if address not in self._links:
                self._links[address] = _Link(self, *address)

    def own(self) -> Identity | None:
        """Who this node is; None: it has no certificate yet."""
        with contextlib.suppress(CredentialsError):
            return self.credentials.current().identity
        return None

    def listen(self, wanted: bool) -> None:
        """Whether to take the inventory from a manager, from the beginning, or from none. On the event loop."""
        if wanted is not self._inventory:
            self._inventory, self._source = wanted, None
            self._snapshot, self._published = None, None
            if wanted and (link := self._preferred()) is not None:
                asyncio.get_running_loop().create_task(self._subscribe(link))

    def look_again(self) -> None:
        """There may be other managers than before."""
        self._look.set()

    def hurry(self) -> None:
        """Call lost managers now: one may be back."""
        for link in self._links.values():
            link.hurry()

    def reload(self) -> None:
        """Nothing to read again: managers push."""

    def status(self) -> ProviderStatus:
        age = time.monotonic() - self._heard if self._heard else None
        connected = self._source is not None and self._source.connected
        return ProviderStatus("relay", connected, 0.0 if connected else age, "" if connected else self._why(), "relay")

    def _why(self) -> str:
        """Why there is no inventory, by what each manager's link has met."""
        said = sorted(link.said for link in self._links.values() if link.said)
        more = [f"and {len(said) - SHOWN} more managers"] if len(said) > SHOWN else []
        return "; ".join([*said[:SHOWN], *more]) or self._error

    async def report(self, report: wire.Report) -> None:
        """Send this node's verdicts to every manager, now and whenever a link is made."""
        self._report, self._reporter = report, self.own()
        await asyncio.gather(*(link.report(report) for link in self._links.values()))

    async def connected(self, link: _Link) -> None:
        link.said = ""
        self.on_link(link.address[0], True)
        await link.report(self._report if self._is_reporter() else msgspec.structs.replace(self._report, verdicts={}))
        if self._inventory and self._source is None:
            await self._subscribe(self._preferred())

    def _is_reporter(self) -> bool:
        """Whether this node is still who it was when it made its last report, of whose tasks that tells."""
        own = self.own()
        return own is None or self._reporter is None or is_same(own, self._reporter)

    async def _subscribe(self, link: _Link | None) -> None:
        if not self._inventory:
            return
        self._source = link
        if link is not None:
            log.info("inventory comes from", manager=link.address[0])
            await link.send(wire.Subscribe())

    def _preferred(self) -> _Link | None:
        """Of the connected managers the one that this node's hash prefers, so that nodes spread over them."""
        node = self.credentials.current().identity.node

        def score(link: _Link) -> bytes:
            return hashlib.blake2b(f"{node} {link.address}".encode(), digest_size=8).digest()

        return max((link for link in self._links.values() if link.connected), key=score, default=None)

    def lost(self, link: _Link) -> None:
        if link is self._source:
            self._source = None
            self._heard = time.monotonic()
            other = self._preferred() if self._inventory else None
            if other is not None:
                asyncio.get_running_loop().create_task(self._subscribe(other))

    def failed(self, link: _Link, error: Exception) -> None:
        if isinstance(error, aiohttp.WSServerHandshakeError) and error.status in _REFUSALS:
            error = MeshError(_REFUSALS[error.status])
        said = str(error) if isinstance(error, MeshError) else plain(error)
        if isinstance(error, aiohttp.ClientSSLError):
            said += " (`mesh check --cluster` shows the certificates; are both nodes' clocks right?)"
        if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == errno.ECONNREFUSED:
            said += ": no agent runs there (start mesh on the managers)"
        text = f"manager {link.address[0]}:{link.address[1]}: {said}"
        if text != link.said:
            log.warning("relay link failed", error=text)
        self._error = link.said = text

    async def received(self, link: _Link, data: bytes) -> None:
        """Take a manager's message; those of others than the source go on after `listen` and are not looked at."""
        if link is not self._source:
            return
        message = wire.decode(data)
        self._heard = time.monotonic()
        if isinstance(message, wire.Snapshot):
            self._take(message)
        elif isinstance(message, wire.Delta):
            try:
                if self._snapshot is None:
                    raise wire.WireError("a delta before any snapshot", where="relay")
                self._take(wire.patch(self._snapshot, message))
            except wire.WireError as error:
                log.info("asks for a snapshot", reason=str(error))
                await link.send(wire.Subscribe())

    def _take(self, snapshot: wire.Snapshot) -> None:
        inventory = self._incoming.inventory(snapshot.content)
        old, self._snapshot = self._snapshot, snapshot
        self._on_content(snapshot.content)
        if self._publish is not None and inventory != self._published:
            self._publish(inventory)
            self._published = inventory  # where that fails, the link is made anew
        if old is None or old.content.verdicts != snapshot.content.verdicts:
            self._on_verdicts(view_of(snapshot.content.verdicts))


def view_of(verdicts: dict[str, wire.HealthReport]) -> HealthView:
    """Verdicts off the wire as the reconciler takes them; a health that is not known yet is UNKNOWN."""
    return HealthView(
        {key: wire.health_of(verdict) for key, verdict in verdicts.items()},
        {key: verdict.reason for key, verdict in verdicts.items() if verdict.reason},
    )
