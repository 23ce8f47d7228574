# SPDX-License-Identifier: Apache-2.0
"""How the proxy engine gets connections: its own sockets on the published ports, or redirection by nftables.

`bind` listens on the published port. `nft` listens on a port that the kernel chooses, and a table of its own redirects
new flows for local addresses there, ahead of Docker's rules. It changes the port and never the address, so that the
called address is kept. The table stops redirecting by itself when this process no longer refreshes it, so that Docker
has the connections once nobody listens for them. Connection tracking keeps established flows where they are, whichever
way the rules change.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from mesh.datapath.conntrack import Cleaner
from mesh.datapath.losses import Losses, Watch
from mesh.datapath.netlink import Monitor
from mesh.datapath.proxy.nft import LIFETIME, Guard, NftTable, monitor
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol
from mesh.supervisor import FAULTS

BACKLOG: Final = 4096
RECEIVE_BUFFER: Final = 4 << 20
KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
IPV6_RECVPKTINFO: Final = 49
IP_PKTINFO: Final = 8
IP_FREEBIND: Final = 15
IPV6_FREEBIND: Final = 78
LEAST: Final = 3.0  # seconds: a table that lives shorter might expire under a process that is well

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Opened:
    """Listening sockets of one frontend. `port`: where they listen. `redirected`: nftables redirects to it."""

    sockets: list[socket.socket]
    port: int
    redirected: bool


def listening_socket(frontend: Frontend, port: int, *, floating: bool = False) -> socket.socket:
    """A bound socket, listening for TCP, that shares its port with those of the other threads (SO_REUSEPORT).

    Args:
        floating: the node need not have the address now.

    Raises:
        OSError: as socket() and bind() say.
    """
    kind = socket.SOCK_STREAM if frontend.protocol is Protocol.TCP else socket.SOCK_DGRAM
    family = socket.AF_INET6 if frontend.address.version == 6 else socket.AF_INET
    host = str(frontend.address)
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        if frontend.address != ANY_ADDRESS or error.errno != errno.EAFNOSUPPORT:
            raise
        family, host = socket.AF_INET, str(ipaddress.IPv4Address(0))  # a host without IPv6
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, frontend.address != ANY_ADDRESS)
        if kind == socket.SOCK_STREAM:
            # Accepted sockets inherit these without a system call.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        if floating and family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        elif floating:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        sock.bind((host, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listening_sockets(frontend: Frontend, port: int, count: int, *, floating: bool = False) -> list[socket.socket]:
    """`count` sockets on one port. Port 0: the kernel chooses one, which all share."""
    made: list[socket.socket] = []
    try:
        for _ in range(count):
            made.append(listening_socket(frontend, port, floating=floating))
            port = made[0].getsockname()[1]
    except OSError:
        for sock in made:
            sock.close()
        raise
    return made


def closed(frontend: Frontend, descriptors: Sequence[int]) -> bool:
    """Whether somebody else (`ss -K`) has closed any of these listening sockets, which are bound."""
    if frontend.protocol is Protocol.TCP:
        poll = select.poll()
        for fd in descriptors:
            poll.register(fd, 0)
        return bool(poll.poll(0))
    for fd in descriptors:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, fileno=fd)
        try:
            if not sock.getsockname()[1]:
                return True
        finally:
            sock.detach()
    return False


def why(frontend: Frontend, error: OSError) -> DatapathError:
    """One sentence for a port that cannot be bound."""
    where = f"frontend {frontend}"
    if error.errno == errno.EADDRINUSE:
        return DatapathError(
            "another process listens on this port",
            where=where,
            remedy='stop it (ss -lntup names it), or set intercept = "nft"',
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return DatapathError(
            "no permission to listen on this port", where=where, remedy="run as root, or grant CAP_NET_BIND_SERVICE"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return DatapathError(
            "this node does not have the address",
            where=where,
            remedy="publish on an address of the node or on all, or name it in floating_addresses",
        )
    return DatapathError(f"cannot listen: {error.strerror}", where=where)


class Interceptor:
    """Opens and keeps the listening sockets of frontends.

    Args:
        mode: "bind", "nft", or "auto": nft on a Docker host where it works, else bind; a port that is taken is then
            had by nft.
        docker_host: dockerd runs here, so that its own rules and sockets may have the ports.
        threads: sockets per frontend at least.
        table: name of the nftables table.
        inherited: sockets of a process that is taken over from, maybe none; ownership passes to the interceptor.
        floating: addresses that the node may get later.
        orphan_timeout: seconds without `heartbeat` after which the table is not refreshed any more; 0: never.
        losses: is told when somebody else removes the table.
    """

    def __init__(
        self,
        mode: str,
        *,
        docker_host: bool,
        threads: int,
        table: str,
        inherited: Mapping[Frontend, Sequence[int]] | None = None,
        floating: frozenset[Address] = frozenset(),
        orphan_timeout: float = 0.0,
        losses: Losses | None = None,
    ) -> None:
        self._threads = threads
        self._floating = floating
        self._orphan_timeout = orphan_timeout
        self._lifetime = min(LIFETIME, max(orphan_timeout, LEAST)) if orphan_timeout else LIFETIME
        self._table = NftTable(table, self._lifetime)
        self._table_lock = threading.Lock()
        self._losses = losses or Losses()
        self._watch: Watch | None = None
        self._refresh_failed = False
        self._refresh_due = 0.0  # monotonic
        self._beat = time.monotonic()
        self._can_nft = mode != "bind" and NftTable.usable()
        if mode == "nft" and not self._can_nft:
            raise DatapathError(
                "nftables cannot be used", remedy='install nft and run with CAP_NET_ADMIN, or set intercept = "bind"'
            )
        self._prefer_nft = mode == "nft" or (mode == "auto" and docker_host and self._can_nft)
        self._inherited = {f: [socket.socket(fileno=fd) for fd in fds] for f, fds in (inherited or {}).items()}
        self._opened: dict[Frontend, Opened] = {}
        self._paused: set[Frontend] = set()  # of those: what is not redirected for a while
        self._redirected: dict[Frontend, int] = {}  # by the table
        self._led: dict[Frontend, int] = {}  # those, and what is paused: flows that were there stay
        self.cleaner = Cleaner()
        self._touched = False
        self._changed = False  # the opened frontends or the guard, since the last `commit`
        self._guard: Guard | None = None
        self._can_guard: bool | None = None  # None: not tried yet
        self._yielded = False
        self.notes: dict[Frontend, str] = {}
        if inherited is None:  # else the process that hands over still needs its table
            self._table.delete_stale()

    def listen(self, frontend: Frontend) -> Opened:
        """The sockets of a frontend, opened if they are not open yet. Redirection begins with `commit`.

        Raises:
            DatapathError: the port cannot be bound; the message says why.
        """
        if frontend not in self._opened:
            self._opened[frontend] = self._inherit(frontend) or self._open(frontend)
            self._changed = True
        if frontend in self._paused:
            self._paused.remove(frontend)
            self._changed = True
        return self._opened[frontend]

    def pause(self, frontend: Frontend) -> bool:
        """Leave connections that start to whoever else has the port, from the next `commit` until `listen`.

        Returns:
            Whether the sockets stay open: connections that are redirected already still arrive. False: the socket
            itself has the port, and the caller closes it.
        """
        opened = self._opened.get(frontend)
        if opened is None or not opened.redirected:
            self.forget(frontend)
            return False
        if frontend not in self._paused:
            self._paused.add(frontend)
            self._changed = True
        return True

    def forget(self, frontend: Frontend) -> None:
        """Stop redirecting with the next `commit`. The caller closes the sockets."""
        self._changed = self._opened.pop(frontend, None) is not None or self._changed
        self._paused.discard(frontend)
        self.notes.pop(frontend, None)

    def reopen(self, frontend: Frontend) -> Opened:
        """The sockets of a frontend, opened anew as somebody else has closed them; as `listen`, but stays paused."""
        paused = self._paused & {frontend}
        self.forget(frontend)
        try:
            return self.listen(frontend)
        finally:
            self._paused |= paused

    def guard(self, nodes: Sequence[Address], tunnel: int, peer: int) -> None:
        """Keep containers from these ports of these nodes, from the next `commit` on, where nftables can be used."""
        wanted = Guard(tuple(nodes), tunnel, peer) if len(nodes) > 1 else None
        if wanted is not None and self._can_guard is None:
            self._can_guard = NftTable.usable()
        if wanted != self._guard and (self._can_guard or wanted is None):
            self._guard, self._changed = wanted, True

    def commit(self) -> None:
        """Bring nftables in line.

        Raises:
            DatapathError: nft rejected the rules; the former ones stay.
        """
        if not self._changed:
            return
        ports = {f: o.port for f, o in self._opened.items() if o.redirected and f not in self._paused}
        if ports or self._touched or self._guard is not None:
            self._touched = True
            with self._table_lock:
                self._replace(ports)
                self._refresh_due = time.monotonic() + self._lifetime / 3
                self._clean(ports, {f: o.port for f, o in self._opened.items() if o.redirected})
            self._keep()
        self._changed = False

    def _replace(self, ports: Mapping[Frontend, int]) -> None:
        """A guard that nft rejects costs nobody a port."""
        try:
            self._table.replace(ports, self._guard)
        except DatapathError as error:
            if self._guard is None:
                raise
            self._guard, self._can_guard = None, False
            log.warning("containers are not kept from nodes' ports", error=str(error))
            self._table.replace(ports)

    def _clean(self, ports: Mapping[Frontend, int], led: Mapping[Frontend, int]) -> None:
        """Have the kernel forget flows that are older than the table, or led where nobody listens any more.

        Args:
            ports: what the table redirects now.
            led: that, and where flows that it has redirected are still served.
        """
        before, self._redirected = self._redirected, dict(ports)
        were, self._led = self._led, dict(led)
        self.cleaner.end({f: port for f, port in were.items() if led.get(f) != port})
        self.cleaner.begin({f: port for f, port in ports.items() if before.get(f) != port})

    def heartbeat(self) -> None:
        """See Datapath.heartbeat."""
        self._beat = time.monotonic()

    def _keep(self) -> None:
        """From now on keep the table as it is, and refreshed."""
        if self._watch is None:
            told: Monitor | None = None
            with contextlib.suppress(DatapathError):  # then it is looked at now and again
                told = monitor()
            self._watch = Watch("mesh-nft", self._look, told)

    def _look(self) -> None:
        """Refresh the table, and put back what is lost of it, unless the agent is wedged or another process has it."""
        now = time.monotonic()
        if self._orphan_timeout and now - self._beat > self._orphan_timeout:
            return
        with self._table_lock:
            if self._yielded or not self._touched:
                return
            self._losses.check("nftables", self._lost, self._table.restore)
            if now >= self._refresh_due:
                self._refresh(now)
            self.cleaner.look(now)

    def _lost(self) -> list[str]:
        return [f"nftables table inet {self._table.name}"] if self._table.lost() else []

    def _refresh(self, now: float) -> None:
        self._refresh_due = now + self._lifetime / 3
        try:
            self._table.refresh()
            self._refresh_failed = False
        except DatapathError as error:
            FAULTS.failed("refresh of the nftables table", error)
            if not self._refresh_failed:
                log.warning("cannot refresh the nftables table; it stops redirecting", error=str(error))
            self._refresh_failed = True

    def drop_inherited(self) -> None:
        """Close the inherited sockets that no frontend uses."""
        for sockets in self._inherited.values():
            for sock in sockets:
                sock.close()
        self._inherited.clear()

    def hand_back(self) -> None:
        """Redirect nothing any more, but keep the chains that established flows need."""
        with self._table_lock:
            if self._touched and not self._yielded:
                self._table.replace({}, self._guard)

    def yield_table(self) -> None:
        """Another process has taken over the table."""
        with self._table_lock:
            self._yielded = True

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self.drop_inherited()
        self._opened.clear()
        with self._table_lock:
            if self._touched and not self._yielded:
                with contextlib.suppress(DatapathError):
                    self._table.delete()
                self._clean({}, {})

    def _inherit(self, frontend: Frontend) -> Opened | None:
        sockets = self._inherited.pop(frontend, None)
        if not sockets:
            return None
        port: int = sockets[0].getsockname()[1]
        missing = self._threads - len(sockets)
        if missing > 0:
            with contextlib.suppress(OSError):  # fewer threads then accept connections
                sockets.extend(self._listen(frontend, port, missing))
        return Opened(sockets, port, port != frontend.port)

    def _listen(self, frontend: Frontend, port: int, count: int) -> list[socket.socket]:
        return listening_sockets(frontend, port, count, floating=frontend.address in self._floating)

    def _open(self, frontend: Frontend) -> Opened:
        try:
            if not self._prefer_nft:
                try:
                    return Opened(self._listen(frontend, frontend.port, self._threads), frontend.port, False)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or not self._can_nft:
                        raise
                    self.notes[frontend] = (
                        f"frontend {frontend}: another process listens on this port; its new connections are "
                        "redirected to the mesh by nftables"
                    )
            sockets = self._listen(frontend, 0, self._threads)
            return Opened(sockets, sockets[0].getsockname()[1], True)
        except OSError as error:
            raise why(frontend, error) from None
