# SPDX-License-Identifier: Apache-2.0
"""What a node tells the others of its own tasks, and when it reads the swarm itself."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from mesh.cluster import roles
from mesh.cluster.provider import of_this_node
from mesh.cluster.wire import HealthReport, Key, Report
from mesh.config.keys import Config
from mesh.errors import ConfigError, MeshError
from mesh.model import PORT_MARK, Backend, EngineKind, Health, HealthView, Inventory, Node, ProofLevel
from mesh.providers.base import ProviderStatus
from mesh.providers.swarm.decode import decode
from mesh.providers.swarm.local_node import LocalView
from tests.support.cluster_provider import Server, make_provider
from tests.support.engine_answers import answers, event, task
from tests.support.polling import until


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


class KeyServer(Server):
    """One that is told keys."""

    def __init__(self, *nodes: str) -> None:
        super().__init__(*nodes)
        self.shared: Mapping[str, Key] = {}

    def share_keys(self, keys: Mapping[str, Key]) -> None:
        self.shared = keys


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


async def test_a_node_says_where_others_reach_it() -> None:
    """By its setting `node_address`; what it says wins over what Swarm says, unless it cannot be used."""
    published: list[Inventory] = []
    provider = make_provider(Config(state_dir="/nonexistent", node_address="192.168.9.1"))
    provider._roles.server, provider._roles.reads = Server("b"), True
    provider._local.look = replace(provider._local.look, node="a")
    provider._publish = published.append
    nodes = tuple(Node(name, name, ip_address(f"10.0.0.{i}")) for i, name in enumerate("abc", 1))
    provider._take(Inventory((), (), nodes, source="swarm"))

    def addresses() -> list[str]:
        return [str(node.address) for node in published[-1].nodes]

    assert addresses() == ["192.168.9.1", "10.0.0.2", "10.0.0.3"]
    provider._on_report("b", Report({}, address="192.168.9.2"))
    await until(lambda: addresses() == ["192.168.9.1", "192.168.9.2", "10.0.0.3"])
    for unusable in ("127.0.0.1", "nonsense", ""):
        provider._on_report("b", Report({}, address=unusable))
        await until(lambda: addresses() == ["192.168.9.1", "10.0.0.2", "10.0.0.3"])


@pytest.mark.parametrize("wrong", ["127.0.0.1", "::", "n1", "10.0.0.1:80"])
def test_a_node_address_that_cannot_be_one_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="node_address"):
        _ = Config(node_address=wrong).own_address


async def test_a_manager_makes_another_key_when_it_is_told_to(tmp_path: Path) -> None:
    """And no second one before all have that; a worker says whom to ask."""
    provider = make_provider(Config(state_dir=str(tmp_path)))
    provider._local.look = LocalView("a", managers={"a": "10.0.0.1", "b": "10.0.0.2"})
    with pytest.raises(MeshError, match="no manager") as refused:
        provider.rotate_keys()
    assert "10.0.0.2" in refused.value.remedy
    server = provider._roles.server = KeyServer("b")
    provider._roles.reads = True
    first = provider.rotate_keys()["keys"]
    assert [row["state"] for row in first] == ["waiting"] and list(server.shared) == [first[0]["id"]]
    provider._verdicts.reports.take("b", Report({}, proof=3))
    assert provider.keys()["keys"][0]["missing"] == ["a", "b"]
    with pytest.raises(MeshError, match="not in use yet: agents have still to get it, of 2 nodes"):
        provider.rotate_keys()
    provider._keys.activate(first[0]["id"])
    second = provider.rotate_keys()
    assert [row["state"] for row in second["keys"]] == ["waiting", "in use"] and second["manager"]


async def test_a_key_is_renewed_early_only_if_all_agents_get_it(tmp_path: Path) -> None:
    """A node was removed: two new keys in a row end all flows of a node whose agent is away."""
    provider = make_provider(Config(state_dir=str(tmp_path)))
    provider._local.look = LocalView("a", managers={"a": "10.0.0.1"})
    server = provider._roles.server = KeyServer("b")
    provider._roles.reads = True
    proving = tuple(replace(node, proof=ProofLevel.TUNNEL) for node in NODES)
    provider._published = Inventory((), (), proving, source="swarm")
    provider._keys.make()
    name = provider._keys.waiting()
    provider._keys.activate(name)
    provider._keys.node_removed()
    provider._tend_keys()
    assert list(provider._keys.entries) == [name]  # c is up, has the keys, and does not call
    server.nodes["c"] = ""
    provider._tend_keys()
    assert len(provider._keys.entries) == 2


def test_tasks_of_a_former_id_are_not_reported_by_the_new_one() -> None:
    said = {name: HealthReport("up", "") for name in ("mine", "former", f"former{PORT_MARK}80", "unknown")}
    nodes = {"mine": "n2", "former": "n1"}
    assert of_this_node(said, nodes, "n2").keys() == {"mine", "unknown"}
    assert of_this_node(said, nodes, "").keys() == said.keys()
