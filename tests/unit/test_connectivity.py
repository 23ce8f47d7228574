# SPDX-License-Identifier: Apache-2.0
"""The calls of `mesh connectivity-test`, who is asked for them, and `mesh probe`: on loopback, without a cluster."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from mesh._maglev import SlotTable, backend_seed
from mesh.api.connectivity import ASKED, EARLIER, Connectivity, _Call, _connect, _outcome, _planned, _Row, _table
from mesh.api.probing import Probing
from mesh.api.standing import Standing
from mesh.config.keys import Config
from mesh.datapath.base import Accepted, Applied, BackendEntry, Caller, FrontendEntry, key_of
from mesh.datapath.lookup import lookup
from mesh.errors import MeshError
from mesh.model import (
    ANY_ADDRESS,
    Affinity,
    Backend,
    DesiredState,
    EngineKind,
    Flow,
    Frontend,
    FrontendState,
    HealthCheck,
    Inventory,
    Node,
    ProbeKind,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
    Target,
)
from mesh.providers.base import ClusterView, EarlierBuildError
from mesh.reconcile.loop import Picture, Reconciler
from tests.support.memory import MemoryDatapath
from tests.support.ports import free_port

HOME = ipaddress.ip_address("127.0.0.1")
OTHER = Node("n2", "two", ipaddress.ip_address("127.0.0.2"), engine=EngineKind.KERNEL)


def state(count: int, **options: Any) -> FrontendState:
    targets = tuple(Target(f"task-{i:02}", HOME, 80, 1, node="n1") for i in range(count))
    frontend = Frontend(ANY_ADDRESS, 8080, Protocol.TCP)
    return FrontendState(frontend, "s", "web", ServiceOptions(table_size=1021, **options), targets)


def row() -> _Row:
    return _Row("n2", "web", "*:8080/tcp")


def test_each_task_gets_the_call_that_is_meant_for_it() -> None:
    """By the look-up that the engines use, over a table with other ids."""
    asked = state(20)
    calls = _planned(asked, _table(asked), OTHER, own=False, most=100, row=row())
    assert sorted(call.backend for call in calls) == [target.backend for target in asked.targets]
    entries = {key_of(asked, t): BackendEntry(100 + i, key_of(asked, t), t) for i, t in enumerate(asked.targets)}
    rows = [(backend_seed(entry.key.backend), entry.id, 1) for entry in entries.values()]
    table = SlotTable.build(1021, rows)
    applied = Applied(1, {asked.frontend: FrontendEntry(asked, table, tuple(e.id for e in entries.values()))}, entries)
    for call in calls:
        choice = lookup(applied, Flow(call.source, call.port, call.address, call.to, Protocol.TCP))
        assert choice is not None and choice.backend is not None
        assert choice.backend.key.backend == call.backend


def test_calls_are_bounded_and_what_is_left_out_is_counted() -> None:
    asked, through = state(20), row()
    assert len(_planned(asked, _table(asked), OTHER, own=False, most=5, row=through)) == 5
    assert through.left_out == 15
    assert [call.backend for call in _planned(asked, _table(asked), OTHER, own=True, most=5, row=row())] == [""] * 5
    sticky, through = state(20, affinity=Affinity.CLIENT_IP), row()
    (call,) = _planned(sticky, _table(sticky), OTHER, own=False, most=100, row=through)
    assert call.backend and through.left_out == 19


def test_nodes_that_source_rules_keep_out_are_not_let_fail() -> None:
    asked, through = state(2, allow=(ipaddress.ip_network("10.0.0.0/8"),)), row()
    assert _planned(asked, _table(asked), OTHER, own=False, most=9, row=through) == () and through.denied
    assert len(_planned(asked, _table(asked), OTHER, own=True, most=9, row=row())) == 2  # own calls are let in


async def called(port: int, source: int = 0, stands: Accepted | None = None, backend: str = "meant") -> tuple[str, str]:
    """What is counted of a call, once its node has said how it stands."""
    with socket.socket() as sock:
        sock.setblocking(False)
        return _outcome(await _connect(_Call(HOME, source, HOME, port, backend), sock), stands)


async def test_what_becomes_of_a_call() -> None:
    with socket.create_server((str(HOME), 0)) as server:
        port = server.getsockname()[1]
        assert await called(port) == ("meant", "")
        assert await called(port, free_port()) == ("meant", "")
        assert await called(port, port) == ("meant", "")  # taken: nothing was shown
    assert await called(port) == ("meant", "refused")


async def test_what_a_proxy_has_made_of_a_call() -> None:
    with socket.create_server((str(HOME), 0)) as server:
        port = server.getsockname()[1]
        assert await called(port, stands=Accepted(("meant",), True)) == ("meant", "")
        assert await called(port, stands=Accepted(("a",), True), backend="") == ("", "")
        assert await called(port, stands=Accepted(("meant",), False)) == ("meant", "not taken within 1 s")
        assert await called(port, stands=Accepted(("a",), False), backend="") == ("a", "not taken within 1 s")
        assert await called(port, stands=Accepted(("a", "b"), False)) == ("a", "not taken within 1 s")
        assert await called(port, stands=Accepted(("a", "b"), True)) == ("a", "not taken; another task took it")
        assert await called(port, stands=Accepted(("a", ""), True)) == ("a", "not taken; Docker's own mesh took it")


async def test_a_proxy_that_reaches_no_task_resets_what_it_has_accepted() -> None:
    with socket.create_server((str(HOME), 0)) as server, socket.socket() as sock:
        sock.setblocking(False)
        made = await _connect(_Call(HOME, 0, HOME, server.getsockname()[1], ""), sock)
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        assert _outcome(made, None) == ("", "reset")


async def test_who_asks_how_connections_stand_is_answered_or_told_what_is_wrong() -> None:
    standing = Standing(Reconciler(MemoryDatapath(), Config()))
    assert await standing.answer({"address": "192.0.2.1", "calls": "40000:80,40001:80"}) == {"calls": [None, None]}
    for query in (
        {},
        {"address": "here", "calls": "1:2"},
        {"address": "192.0.2.1", "calls": "1:2:3"},
        {"address": "192.0.2.1", "calls": "1:65536"},
        {"address": "192.0.2.1", "calls": ",".join(["1:2"] * 201)},
    ):
        with pytest.raises(MeshError):
            await standing.answer(query)


@pytest.mark.parametrize(
    "told", [{}, {"calls": [None]}, {"calls": [["a", True], None]}, {"calls": 1}, EarlierBuildError("")]
)
async def test_a_node_that_does_not_say_it_is_not_believed_to(told: Any) -> None:
    standing = Standing(Reconciler(MemoryDatapath(), Config()), Others({"n2": told}).ask)
    assert await standing.of("n2", [Caller(HOME, 1, 80), Caller(HOME, 2, 80)], own=False) == [None, None]


class Others:
    """A cluster whose nodes answer what they are told to."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers

    async def ask(self, node: str, question: str, query: Mapping[str, str], seconds: float) -> Mapping[str, Any]:
        answer = self.answers[node]
        if isinstance(answer, Exception):
            raise answer
        return cast(Mapping[str, Any], answer)


async def test_who_cannot_be_asked_is_named_and_an_old_build_is_no_failure() -> None:
    nodes = tuple(replace(OTHER, id=f"n{i}", name=f"node{i}") for i in range(1, 6))
    nodes = (*nodes[:3], replace(nodes[3], engine=EngineKind.UNKNOWN), replace(nodes[4], up=False))
    reconciler = Reconciler(MemoryDatapath(), Config())
    reconciler.publish(Inventory((), (), nodes))
    reconciler.picture = Picture(Inventory((), (), nodes))
    answers: dict[str, Any] = {"n2": {"rows": []}, "n3": EarlierBuildError("its build does not know the question")}
    found = await Connectivity(reconciler).test("n1", [], cast(ClusterView, Others(answers)))
    states = {node["name"]: node["state"] for node in found["nodes"]}
    assert states == {
        "node1": ASKED,
        "node2": ASKED,
        "node3": EARLIER,
        "node4": "no agent",
        "node5": "down or silent",
    }
    assert found["ok"]
    answers["n2"] = MeshError("192.0.2.2:9551: refused", remedy="start mesh there")
    found = await Connectivity(reconciler).test("n1", [], cast(ClusterView, Others(answers)))
    assert not found["ok"]
    (refused,) = [node for node in found["nodes"] if node["name"] == "node2"]
    assert (refused["state"], refused["remedy"]) == ("cannot be asked: 192.0.2.2:9551: refused", "start mesh there")
    row = {"through": "n1", "service": "web", "frontend": "*:80/tcp", "asked": 2, "answered": 1}
    answers["n2"] = {"rows": [row | {"failed": [{"backend": "a", "name": "web.1", "said": "timed out", "calls": 1}]}]}
    assert not (await Connectivity(reconciler).test("n1", [], cast(ClusterView, Others(answers))))["ok"]
    with pytest.raises(MeshError, match="there is no service 'nobody'"):
        await Connectivity(reconciler).test("n1", ["nobody"], cast(ClusterView, Others(answers)))


async def test_a_task_that_is_masked_on_a_node_is_named_and_is_a_failure() -> None:
    """The call that is meant for it is answered by another one, in which nobody would see it."""
    agreed = state(2)
    hidden = replace(agreed.targets[1], weight=0, agreed=1, masked="no proven path to three")
    here = replace(agreed, targets=(agreed.targets[0], hidden))
    service = Service("s", "web", (), ServiceOptions())
    backends = (Backend("task-01", "s", "n3", None, name="web.2", local=False),)
    reconciler = Reconciler(MemoryDatapath(), Config())
    frontend = agreed.frontend
    reconciler.picture = Picture(
        Inventory((service,), backends, (replace(OTHER, id="n1", name="one"), OTHER)),
        agreed=DesiredState(1, {frontend: agreed}),
        desired=DesiredState(1, {frontend: here}),
    )
    row = {"service": "web", "backend": "task-01", "name": "web.2", "why": "no proven path to three"}
    answers: dict[str, Any] = {"n2": {"rows": []}}  # as an earlier build tells it
    found = await Connectivity(reconciler).test("n1", [], cast(ClusterView, Others(answers)))
    assert [(node["name"], node["masked"]) for node in found["nodes"]] == [("one", [row]), ("two", [])]
    assert not found["ok"]
    reconciler.picture = replace(reconciler.picture, desired=reconciler.picture.agreed)
    found = await Connectivity(reconciler).test("n2", [], cast(ClusterView, Others({"n1": {"rows": [], "masked": []}})))
    assert not any(node["masked"] for node in found["nodes"])


async def test_a_backend_is_probed_by_its_own_node_only_and_once_for_each_port() -> None:
    closed = free_port()
    with socket.create_server((str(HOME), 0)) as server:
        opened = server.getsockname()[1]
        ports = (
            PublishedPort(80, opened, Protocol.TCP),
            PublishedPort(81, opened, Protocol.TCP),
            PublishedPort(82, closed, Protocol.TCP),
            PublishedPort(53, 53, Protocol.UDP),
        )
        service = Service("s", "web", ports, ServiceOptions(health=HealthCheck(ProbeKind.OFF)))
        here = Backend("b1", "s", "n1", HOME, name="web.1")
        away = Backend("b2", "s", "n2", None, name="web.2", local=False)
        reconciler = Reconciler(MemoryDatapath(), Config())
        reconciler.picture = Picture(Inventory((service,), (here, away), (OTHER,)))
        probing = Probing(reconciler, EngineKind.PROXY)
        answer = await probing.answer({"backend": "b1"})
        found = {row["port"]: (row["published"], row["ok"], row["said"]) for row in answer["ports"]}
        assert found == {
            opened: (["*:80/tcp", "*:81/tcp"], True, ""),
            closed: (["*:82/tcp"], False, f"127.0.0.1:{closed}: connection refused"),
        }
        for identity in ("b2", "nobody"):
            with pytest.raises(MeshError, match="does not know it as its own"):
                await probing.answer({"backend": identity})
        whole = await probing.probe("web.1", None, None)
        assert (whole["ok"], whole["error"], whole["path"]["by"], whole["path"]["proven"]) == (False, "", "here", True)
        others = cast(ClusterView, Others({"n2": EarlierBuildError("its build does not know the question")}))
        whole = await probing.probe("web.2", others, None)
        assert (whole["ok"], whole["error"]) == (False, "its build does not know the question")
        assert (whole["node_name"], whole["path"]["proven"]) == ("two", False)
