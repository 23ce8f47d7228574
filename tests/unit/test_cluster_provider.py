# SPDX-License-Identifier: Apache-2.0
"""What a node tells the others of its own tasks, and when it reads the swarm itself."""

from __future__ import annotations

import ipaddress
import time

import pytest

from mesh.cluster import roles
from mesh.cluster.wire import HealthReport, Report
from mesh.model import Backend, EngineKind, Health, HealthView, Inventory, Node
from mesh.providers.base import ProviderStatus
from mesh.providers.swarm.decode import decode
from mesh.providers.swarm.local_node import LocalView
from tests.support.cluster_provider import Server, make_provider
from tests.support.engine_answers import answers, event, task


def test_a_manager_tells_the_others_what_its_own_engine_knows() -> None:
    """They read from swarm that the task runs, seconds longer than its node knows better."""
    provider = make_provider()
    provider._roles.reads = True  # a manager
    provider._swarm._read = decode(answers(tasks=[task("t1"), task("t2")], running=["c-t1", "c-t2"]))
    provider.own_health(HealthView({"t1": Health.UP, "t2": Health.UP}))
    assert provider._verdicts.own() == {"t1": HealthReport("up"), "t2": HealthReport("up")}
    provider._swarm._overlay.hear(event("die"), 1)
    assert provider._verdicts.own() == {"t1": HealthReport("down", "no container runs"), "t2": HealthReport("up")}


NODES = tuple(Node(n, n, ipaddress.ip_address(f"10.0.0.{i}"), engine=EngineKind.PROXY) for i, n in enumerate("abc", 1))
BACKENDS = tuple(Backend(f"t-{n}", "s", n, None, local=False) for n in "abc")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(roles, "time", clock)
    return clock


async def test_a_manager_whose_engine_is_back_reads_once_all_nodes_report_to_it(clock: Clock) -> None:
    """Else it would not hear of what ends on those that have not called it yet."""
    provider = make_provider()
    provider._local.look = LocalView("a", managers={"a": "10.0.0.1", "b": "10.0.0.2"})
    engine = ProviderStatus("swarm", connected=True)
    provider._swarm.status = lambda: engine
    server = provider._roles.server = Server("b")
    provider._roles.reads, provider._roles._since = True, clock.now
    read = Inventory((), BACKENDS, NODES, source="swarm")
    provider._roles.on_read(read)
    provider._verdicts.reports.take("b", Report({"t-b": HealthReport("down", "refused")}, reads=True))
    assert provider._roles.may_read()

    engine = ProviderStatus("swarm", connected=False, age_seconds=0.0)
    assert provider._roles.may_read()  # a moment's silence
    clock.now += roles.BLIND
    engine = ProviderStatus("swarm", connected=False, age_seconds=roles.BLIND)
    provider._verdicts.reports._heard["b"] = time.monotonic()
    assert not provider._roles.may_read()
    provider._roles.turn(False)
    assert server.tells == [False]
    assert provider._verdicts._told.of("t-b") is Health.DOWN  # until another manager says otherwise
    provider._roles.on_told(Inventory((), BACKENDS, NODES, source="relay"))
    told = len(server.told)

    assert not provider._roles.may_read()
    engine = ProviderStatus("swarm", connected=True)
    assert not provider._roles.may_read()  # c is up, has an agent, and has not called
    provider._roles.on_read(Inventory((), BACKENDS[:2], NODES, source="swarm"))
    assert (provider._inventory.source, len(server.told)) == ("relay", told)
    server.nodes["c"] = ""
    assert provider._roles.may_read()
    provider._roles.turn(True)
    assert (provider._inventory.backends, server.tells) == (BACKENDS[:2], [False, True])
    assert server.told[-1] == {"t-b": HealthReport("down", "refused")}


async def test_a_manager_does_not_wait_for_agents_that_are_not_there(clock: Clock) -> None:
    provider = make_provider()
    provider._local.look = LocalView("a", managers={"a": "10.0.0.1", "b": "10.0.0.2"})
    provider._swarm.status = lambda: ProviderStatus("swarm", connected=True)
    provider._roles.server = Server("b")
    provider._roles.on_told(Inventory((), BACKENDS, NODES, source="relay"))
    provider._roles.on_read(Inventory((), BACKENDS, NODES, source="swarm"))
    assert not provider._roles.may_read()
    clock.now += roles.GATHERING
    assert provider._roles.may_read()
