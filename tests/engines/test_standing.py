# SPDX-License-Identifier: Apache-2.0
"""What `mesh connectivity-test` says of tasks behind a proxy, which accepts before they do."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mesh.api.connectivity import Connectivity
from mesh.api.standing import Standing
from mesh.config.keys import Config
from mesh.datapath.base import Caller
from mesh.model import ANY_ADDRESS, DesiredState, EngineKind, Frontend, Inventory, Node
from mesh.providers.base import EarlierBuildError
from mesh.reconcile.loop import Picture, Reconciler
from tests.support.fastpath_bench import Served, TcpServer, Where, call, engine, tcp
from tests.support.memory import MemoryDatapath
from tests.support.ports import free_port

HERE = ipaddress.ip_address("127.0.0.1")
PROXY = Node("n2", "two", HERE, engine=EngineKind.PROXY)


@pytest.fixture
def deaf() -> Iterator[Where]:
    """Where packets that begin a connection vanish: its queue of accepted connections is full."""
    with socket.create_server((str(HERE), 0), backlog=0) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()


@pytest.fixture
def good() -> Iterator[TcpServer]:
    server = TcpServer()
    yield server
    server.close()


def stands(mesh: Served, front: Frontend, *clients: socket.socket) -> Any:
    callers = [Caller(HERE, client.getsockname()[1], front.port) for client in clients]
    return [found and tuple(found) for found in mesh.datapath.accepted(callers)]


def test_the_engine_says_which_backends_a_connection_was_given_to(good: TcpServer, deaf: Where) -> None:
    fronts = [tcp() for _ in range(3)]
    refusing = (str(HERE), free_port())
    with engine(connect_timeout=60.0) as mesh, contextlib.ExitStack() as stack:
        mesh.serve(
            {fronts[0]: {"good": good.where}, fronts[1]: {"deaf": deaf}, fronts[2]: {"a": refusing, "b": good.where}}
        )
        first, waiting = (stack.enter_context(call(front)) for front in fronts[:2])
        others = [stack.enter_context(call(fronts[2])) for _ in range(40)]
        for client in (first, *others):
            client.sendall(b"x")
            assert client.recv(1) == b"x"  # by now a backend has taken it
        assert stands(mesh, fronts[0], first) == [(("good",), True)]
        assert stands(mesh, fronts[1], waiting, first) == [(("deaf",), False), None]
        assert set(stands(mesh, fronts[2], *others)) == {(("b",), True), (("a", "b"), True)}
        unknown = [Caller(ipaddress.ip_address("127.0.0.2"), first.getsockname()[1], fronts[0].port)]
        assert mesh.datapath.accepted(unknown) == [None]
        assert mesh.datapath.accepted([]) == []
        first.close()
        others.clear()
    assert mesh.datapath.accepted(unknown) == [None]  # its threads have ended


async def row_of(mesh: Served, front: Frontend, *, knows: bool = True) -> dict[str, Any]:
    """The row of a node that calls all tasks through `mesh`, another node. `knows`: that can be asked."""
    other = Standing(Reconciler(mesh.datapath, Config()))

    async def ask(node: str, question: str, query: Mapping[str, str], seconds: float) -> Mapping[str, Any]:
        assert (node, question) == ("n2", "accepted")
        if not knows:
            raise EarlierBuildError("its build does not know the question")
        found = (await other.answer(query))["calls"]
        return {"calls": [None if each is None else [list(each.tried), each.is_taken] for each in found]}

    reconciler = Reconciler(MemoryDatapath(), Config())
    state = mesh.applied.frontends[front].state
    reconciler.picture = Picture(Inventory((), (), (PROXY,)), agreed=DesiredState(1, {front: state}))
    answer = await Connectivity(reconciler, Standing(reconciler, ask)).answer({"own": "n1"})
    (row,) = answer["rows"]
    return dict(row)


async def test_a_task_that_lets_calls_vanish_has_not_answered(good: TcpServer, deaf: Where) -> None:
    front = tcp()
    assert front.address == ANY_ADDRESS
    with engine() as mesh:
        mesh.serve({front: {"good": good.where, "deaf": deaf}})
        row = await row_of(mesh, front)
        assert (row["asked"], row["answered"]) == (2, 1)
        (failed,) = row["failed"]
        assert (failed["backend"], failed["said"], failed["calls"]) == ("deaf", "not taken within 1 s", 1)
        row = await row_of(mesh, front, knows=False)
        assert (row["asked"], row["answered"]) == (2, 2)  # the proxy has accepted, and nobody says more


async def test_a_task_that_refuses_has_not_answered_though_another_one_does(good: TcpServer) -> None:
    front = tcp()
    with engine() as mesh:
        mesh.serve({front: {"good": good.where, "closed": (str(HERE), free_port())}})
        row = await row_of(mesh, front)
        assert (row["asked"], row["answered"]) == (2, 1)
        (failed,) = row["failed"]
        assert (failed["backend"], failed["said"]) == ("closed", "not taken; another task took it")
