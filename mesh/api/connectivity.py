# SPDX-License-Identifier: Apache-2.0
"""`mesh connectivity-test`: every node calls every task through every node's published ports.

The tables are equal on all nodes and a function of the 5-tuple, so the caller chooses its source port such that the
called node gives the connection to the task that is meant. A node's calls of its own ports are drawn by the socket
hook; of those there are as many as tasks, and it is not known which answers which.

A proxy accepts a connection before a task has. So the calls stay open for a moment, and then their node is asked how
those stand that its proxy has (`standing`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import random
import socket
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mesh import netaddr
from mesh._abi import OWNER_FIRST
from mesh._maglev import SlotTable, hash_client, hash_flow, slot_of
from mesh.api.explain import is_denied
from mesh.api.services import built, numbered
from mesh.api.standing import MOST as STANDING_MOST
from mesh.api.standing import WAIT as STANDING_WAIT
from mesh.api.standing import Standing
from mesh.api.view import Json
from mesh.datapath.base import Accepted, Caller
from mesh.errors import MeshError
from mesh.model import ANY_ADDRESS, Address, Affinity, Flow, FrontendState, Node, Protocol
from mesh.providers.base import ClusterView, EarlierBuildError
from mesh.reconcile.loop import Reconciler

QUESTION: Final = "calls"
MOST: Final = 600  # calls that one node makes; tasks beyond are drawn by lot
AT_ONCE: Final = 32
CONNECT: Final = 3.0  # seconds for a call: the kernel sends its first packet again after one
ROUND: Final = STANDING_MOST  # calls that are open at the same time
SETTLE: Final = 1.0  # seconds that a task has to take what a proxy has accepted for it
SECONDS: Final = 25.0  # for all calls of a node
WAIT: Final = SECONDS + SETTLE + STANDING_WAIT + 1.0  # for another node's answer
PORTS: Final = (20000, 60999)  # source ports
DRAWS: Final = 60  # source ports that are tried for each task

ASKED: Final = "asked"
EARLIER: Final = "its build does not know the test"
NO_AGENT: Final = "no agent"
AWAY: Final = "down or silent"


@dataclass(frozen=True, slots=True)
class _Call:
    """One connection to be made. `backend`: who is meant to get it; empty: not known."""

    source: Address
    port: int  # 0: the kernel chooses
    address: Address
    to: int
    backend: str


@dataclass(frozen=True, slots=True)
class _Made:
    """A call that was made."""

    call: _Call
    sock: socket.socket
    is_open: bool = False
    said: str = ""  # how it failed; empty and not open: nothing was shown

    @property
    def caller(self) -> Caller:
        name = self.sock.getsockname()
        return Caller(ipaddress.ip_address(name[0]), name[1], self.call.to)


@dataclass(slots=True)
class _Row:
    """What became of the calls through one node for one frontend."""

    through: str
    service: str
    frontend: str
    asked: int = 0
    answered: int = 0
    failed: dict[tuple[str, str], int] = field(default_factory=dict)  # by backend and what was said
    left_out: int = 0  # tasks that were not called
    denied: bool = False  # mesh.allow or mesh.deny keep this node out

    def count(self, backend: str, said: str) -> None:
        """A call has ended; `said`: how it failed, empty: it was answered."""
        self.asked += 1
        self.answered += not said
        if said:
            self.failed[backend, said] = self.failed.get((backend, said), 0) + 1

    def leave_out(self, tasks: int, *, denied: bool = False) -> None:
        self.left_out, self.denied = tasks, denied

    def shown(self, names: Mapping[str, str]) -> dict[str, Any]:
        failed = [
            {"backend": backend, "name": names.get(backend, ""), "said": said, "calls": calls}
            for (backend, said), calls in sorted(self.failed.items())
        ]
        return {
            "through": self.through,
            "service": self.service,
            "frontend": self.frontend,
            "asked": self.asked,
            "answered": self.answered,
            "failed": failed,
            "left_out": self.left_out,
            "denied": self.denied,
        }


class Connectivity:
    """Makes this node's calls for whoever asks, and asks all nodes for theirs."""

    def __init__(self, reconciler: Reconciler, standing: Standing | None = None) -> None:
        self._reconciler = reconciler
        self._standing = standing or Standing(reconciler)
        self._free = asyncio.Semaphore(AT_ONCE)
        self._busy = False

    async def answer(self, query: Mapping[str, str]) -> Json:
        """Call every task of the services through every node with an agent, by TCP.

        Args:
            query: `services`, ids separated by commas, empty: all; `own`: this node's id.

        Returns:
            rows [{through (node id), service, frontend, asked, answered, failed [{backend, name, said, calls}],
            left_out, denied}], masked [{service, backend, name, why}]: tasks that get nothing from this node.

        Raises:
            MeshError: it is at it already.
        """
        if self._busy:
            raise MeshError("another connectivity test is under way", remedy="wait until it has ended")
        self._busy = True
        try:
            return await self._calls(query.get("own", ""), set(filter(None, query.get("services", "").split(","))))
        finally:
            self._busy = False

    async def _calls(self, own: str, services: set[str]) -> Json:
        picture = self._reconciler.picture
        states = [
            state
            for frontend, state in sorted(picture.agreed.frontends.items())
            if frontend.protocol is Protocol.TCP and frontend.address == ANY_ADDRESS
            if (not services or state.service in services) and any(target.weight for target in state.targets)
        ]
        nodes = [node for node in picture.inventory.nodes if node.up and node.engine and node.address is not None]
        most = max(1, MOST // max(1, len(states) * len(nodes)))
        rows, planned = list[_Row](), list[tuple[_Call, _Row]]()
        for state in states:
            table = await asyncio.to_thread(_table, state)
            for node in nodes:
                row = _Row(node.id, state.service_name, str(state.frontend))
                rows.append(row)
                calls = _planned(state, table, node, own=node.id == own, most=most, row=row)
                planned += [(call, row) for call in calls]
        ends = asyncio.get_running_loop().time() + SECONDS
        for first in range(0, len(planned), ROUND):
            await self._round(planned[first : first + ROUND], ends, own)
        names = {backend.id: backend.name for backend in picture.inventory.backends}
        here = (picture.desired.frontends.get(state.frontend, state) for state in states)
        masked = {
            (state.service_name, target.backend): target.masked
            for state in here
            if not state.passing
            for target in state.targets
            if target.masked
        }
        return {
            "rows": [row.shown(names) for row in rows],
            "masked": [
                {"service": service, "backend": backend, "name": names.get(backend, ""), "why": why}
                for (service, backend), why in sorted(masked.items())
            ],
        }

    async def _round(self, planned: Sequence[tuple[_Call, _Row]], ends: float, own: str) -> None:
        """Make some calls, and count what became of those that are made in time."""
        with contextlib.ExitStack() as stack:
            tasks = {asyncio.create_task(self._make(call, stack)): row for call, row in planned}
            timeout = max(0.0, ends - asyncio.get_running_loop().time())
            made, late = await asyncio.wait(tasks, timeout=timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            if any(task.result().is_open for task in made):
                await asyncio.sleep(SETTLE)
            nodes = {tasks[task].through for task in made}
            through = {node: [(t.result(), tasks[t]) for t in made if tasks[t].through == node] for node in nodes}
            await asyncio.gather(*(self._settle(node, calls, own=node == own) for node, calls in through.items()))

    async def _make(self, call: _Call, stack: contextlib.ExitStack) -> _Made:
        async with self._free:
            return await _connect(call, stack.enter_context(_socket(call.address)))

    async def _settle(self, node: str, calls: Sequence[tuple[_Made, _Row]], *, own: bool) -> None:
        """Count calls through a node, which are still open, once it has said how they stand."""
        opened = [made for made, _ in calls if made.is_open]
        found = await self._standing.of(node, [made.caller for made in opened], own=own)
        stands = {id(made): how for made, how in zip(opened, found, strict=True)}
        for made, row in calls:
            row.count(*_outcome(made, stands.get(id(made))))

    async def test(self, own: str, services: Sequence[str], cluster: ClusterView) -> Json:
        """See AgentView.connectivity."""
        inventory = self._reconciler.picture.inventory
        wanted = [_service(name, {s.id: s.name for s in inventory.services}) for name in services]
        query = {"services": ",".join(wanted)}

        async def of(node: Node) -> dict[str, Any]:
            shown = {"id": node.id, "name": node.name or node.id, "rows": [], "masked": [], "remedy": ""}
            if not node.up or not node.engine:
                return {**shown, "state": NO_AGENT if node.up else AWAY}
            asking: Awaitable[Json] = (
                self.answer({**query, "own": own})
                if node.id == own
                else cluster.ask(node.id, QUESTION, {**query, "own": node.id}, WAIT)
            )
            try:
                said = await asking
                return {**shown, "state": ASKED, "rows": said["rows"], "masked": said.get("masked", [])}
            except EarlierBuildError:
                return {**shown, "state": EARLIER}
            except MeshError as error:
                return {**shown, "state": f"cannot be asked: {error.message}", "remedy": error.remedy}

        found = await asyncio.gather(*(of(node) for node in sorted(inventory.nodes, key=lambda n: (n.name, n.id))))
        bad = any(row["failed"] for node in found for row in node["rows"]) or any(node["masked"] for node in found)
        silent = any(node["state"] not in (ASKED, EARLIER, NO_AGENT, AWAY) for node in found)
        return {"ok": not bad and not silent, "nodes": found}


def _service(name: str, things: Mapping[str, str]) -> str:
    found = [identity for identity, known in things.items() if name in (identity, known)]
    if not found:
        raise MeshError(f"there is no service {name!r}", remedy="`mesh services` lists them")
    return found[0]


def _table(state: FrontendState) -> SlotTable:
    """The table that all nodes have agreed upon; owners are numbers of targets."""
    return built(state, {number: target.weight for number, target in numbered(state).items()})[0]


def _planned(state: FrontendState, table: SlotTable, node: Node, *, own: bool, most: int, row: _Row) -> Sequence[_Call]:
    """The calls through a node; what is left out is noted in `row`."""
    assert node.address is not None
    source, to = netaddr.source_towards(node.address), state.frontend.port
    if source is None:
        row.count("", "no route to it")
        return ()
    if not own and is_denied(Flow(source, 1024, node.address, to, Protocol.TCP), state.options):
        row.leave_out(0, denied=True)
        return ()
    targets = [target.backend for target in state.targets if target.weight]
    if own:
        return [_Call(source, 0, node.address, to, "")] * min(len(targets), most)
    found = dict(_drawn(state, table, source, node.address))
    chosen = random.sample(sorted(found), min(most, len(found)))
    row.leave_out(len(targets) - len(chosen))
    return [_Call(source, found[backend], node.address, to, backend) for backend in chosen]


def _drawn(state: FrontendState, table: SlotTable, source: Address, address: Address) -> Iterator[tuple[str, int]]:
    """Tasks, each with a source port of which a connection is its."""
    packed, called, port = netaddr.pack(source), netaddr.pack(address), state.frontend.port
    if state.options.affinity is Affinity.CLIENT_IP:  # all connections of a client are of one task
        owner = table.slot(slot_of(hash_client(packed), table.size))[0]
        yield state.targets[owner - OWNER_FIRST].backend, 0
        return
    missing = {OWNER_FIRST + i for i, target in enumerate(state.targets) if target.weight}
    for _ in range(DRAWS * len(missing)):
        if not missing:
            return
        own_port = random.randint(*PORTS)  # noqa: S311 -- spreads, guards nothing
        owner = table.slot(slot_of(hash_flow(packed, own_port, called, port, int(Protocol.TCP)), table.size))[0]
        if owner in missing and _is_free(source, own_port):
            missing.discard(owner)
            yield state.targets[owner - OWNER_FIRST].backend, own_port


def _socket(address: Address) -> socket.socket:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _is_free(source: Address, port: int) -> bool:
    with _socket(source) as trial, contextlib.suppress(OSError):
        trial.bind((str(source), port))
        return True
    return False


async def _connect(call: _Call, sock: socket.socket) -> _Made:
    """Make a call."""
    try:
        if call.port:
            sock.bind((str(call.source), call.port))
        async with asyncio.timeout(CONNECT):
            await asyncio.get_running_loop().sock_connect(sock, (str(call.address), call.to))
    except TimeoutError:
        return _Made(call, sock, said="timed out")
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE  # its port, since it was chosen
        return _Made(call, sock, said="" if taken else _words(error))
    return _Made(call, sock, is_open=True)


def _outcome(made: _Made, stands: Accepted | None) -> tuple[str, str]:
    """The backend that a call failed at, and how, in words; empty: it was answered.

    Args:
        stands: what the called node's proxy has made of it; None: it has none, or cannot be asked.
    """
    meant = made.call.backend
    if not made.is_open:
        return meant, made.said
    if stands is None:  # a task has taken it, or a proxy that has given it up since
        return meant, _reset(made.sock)
    first, *others = stands.tried or (meant,)
    if not stands.is_taken:
        return first, f"not taken within {SETTLE:g} s"
    if others:
        return first, "not taken; " + ("another task took it" if others[-1] else "Docker's own mesh took it")
    return meant, ""


def _reset(sock: socket.socket) -> str:
    """How a connection has failed since it was made; empty: it has not."""
    try:
        sock.recv(1)
    except BlockingIOError:
        pass
    except OSError as error:
        return _words(error)
    return ""


def _words(error: OSError) -> str:
    """What a caller sees of an error."""
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    return "reset" if isinstance(error, ConnectionError) else os.strerror(error.errno or 0).lower()
