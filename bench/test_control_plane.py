# SPDX-License-Identifier: Apache-2.0
"""What the control plane's functions cost at scale, by pytest-benchmark. Part of `make bench`, not of `make test`.

Scale: a table of 1,000 backends; a cluster of 1,000 services with 10 backends each.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mesh import _abi
from mesh._abi import OWNER_FIRST
from mesh._bpf import map_work
from mesh._maglev import SlotTable, backend_seed
from mesh.api.services import Services
from mesh.config.keys import Config
from mesh.datapath.base import Applied, BackendEntry, BackendKey, Plan, key_of
from mesh.datapath.counters import CounterTable
from mesh.datapath.kernel import loader
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.tunnel import Ids
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.metrics.exposition import Exposition, Snapshot, render
from mesh.model import (
    Backend,
    EngineKind,
    HealthView,
    Intent,
    Inventory,
    Node,
    Protocol,
    PublishedPort,
    Service,
    Target,
)
from mesh.providers.swarm.decode import Answers, decode
from mesh.reconcile.compose import ComposeCache, compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.guard import guard
from mesh.reconcile.loop import Picture
from mesh.reconcile.plan import plan
from tests.support.metrics_samples import snapshot

BACKENDS = 1000
SERVICES, REPLICAS = 1000, 10


def members(count: int) -> list[tuple[bytes, int, int]]:
    """(seed, owner, weight) of backends, as SlotTable.build takes them."""
    return [(backend_seed(f"backend-{n}"), OWNER_FIRST + n, 1) for n in range(count)]


def inventory(services: int = SERVICES, replicas: int = REPLICAS) -> Inventory:
    """A cluster of one node."""
    base = int(IPv4Address("172.18.0.0"))
    found = [Service(f"s{n:05}", f"service{n}", (PublishedPort(10000 + n, 80, Protocol.TCP),)) for n in range(services)]
    backends = [
        Backend(f"t{n:05}", f"s{n // replicas:05}", "node", IPv4Address(base + n)) for n in range(services * replicas)
    ]
    return Inventory(tuple(found), tuple(backends), (Node("node", "node"),), source="static")


@pytest.mark.parametrize("size", [16381, 65537])
def test_table_build(benchmark: BenchmarkFixture, size: int):
    """A table of 1,000 backends."""
    table = benchmark(SlotTable.build, size, members(BACKENDS))
    assert len(table.owners()) == BACKENDS


@pytest.mark.parametrize("size", [16381, 65537])
def test_table_transition(benchmark: BenchmarkFixture, size: int):
    """One of 1,000 backends leaves."""
    before, after = SlotTable.build(size, members(BACKENDS)), SlotTable.build(size, members(BACKENDS)[1:])
    assert benchmark(before.transition, after).tracked_slots() >= 0


def test_compose_10000_backends(benchmark: BenchmarkFixture):
    desired = benchmark(compose, inventory(), HealthView(), Drained(), Config())
    assert len(desired.frontends) == SERVICES


def test_guard_10000_backends(benchmark: BenchmarkFixture):
    """Nothing is held back."""
    desired = compose(inventory(), HealthView(), Drained(), Config())
    guarded = benchmark(guard, desired, desired, {}, health=HealthView(), now=0.0, config=Config())
    assert not guarded.held


def test_plan_one_of_10000_backends_left(benchmark: BenchmarkFixture):
    whole = inventory()
    fewer = dataclasses.replace(whole, backends=whole.backends[1:])
    cache = ComposeCache()
    before, after = (compose(each, HealthView(), Drained(), Config(), cache) for each in (whole, fewer))
    applied = plan(Applied(), before).result
    steps = benchmark(plan, applied, after)
    assert len(steps.put_frontends) == 1


def test_plan_nothing_changed_10000_backends(benchmark: BenchmarkFixture):
    desired = compose(inventory(), HealthView(), Drained(), Config())
    applied = plan(Applied(), desired).result
    assert benchmark(plan, applied, desired).empty


def answers(services: int, replicas: int) -> Answers:
    """Bodies as a manager's Engine gives them, with the fields that carry weight."""
    ports = [
        [{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 10000 + n, "PublishMode": "ingress"}]
        for n in range(services)
    ]
    listed = [
        {"ID": f"s{n:05}", "Spec": {"Name": f"web{n}", "Labels": {"a": "b"}}, "Endpoint": {"Ports": ports[n]}}
        for n in range(services)
    ]
    tasks = [
        {
            "ID": f"t{n:05}",
            "Version": {"Index": n},
            "CreatedAt": "2026-01-01T00:00:00.000000000Z",
            "Spec": {"ContainerSpec": {"Image": "example:1", "Env": ["A=1", "B=2"]}, "Networks": [{"Target": "n"}]},
            "ServiceID": f"s{n // replicas:05}",
            "Slot": n % replicas + 1,
            "NodeID": "node",
            "Status": {"State": "running", "ContainerStatus": {"ContainerID": f"c{n:05}", "PID": n}},
            "DesiredState": "running",
            "NetworksAttachments": [{"Network": {"ID": "n"}, "Addresses": ["10.0.0.3/24"]}],
        }
        for n in range(services * replicas)
    ]
    base = int(IPv4Address("172.18.0.0"))
    reached = {f"c{n:05}": {"IPv4Address": f"{IPv4Address(base + n)}/16"} for n in range(services * replicas)}
    bodies = {
        "info": {"Name": "node", "Swarm": {"NodeID": "node", "LocalNodeState": "active", "ControlAvailable": True}},
        "services": listed,
        "tasks": tasks,
        "nodes": [{"ID": "node", "Description": {"Hostname": "node"}, "Status": {"State": "ready"}}],
        "containers": [{"Id": container, "State": "running"} for container in reached],
        "unready": [],
        "gateway": {"Name": "docker_gwbridge", "Containers": reached},
    }
    encoded: dict[str, Any] = {name: json.dumps(body).encode() for name, body in bodies.items()}
    return Answers(**encoded)


def test_decode_10000_tasks(benchmark: BenchmarkFixture):
    read = benchmark(decode, answers(SERVICES, REPLICAS))
    assert len(read.inventory.backends) == SERVICES * REPLICAS


def test_compose_one_of_10000_backends_changed(benchmark: BenchmarkFixture):
    """With what the last compose remembered, as in the loop."""
    whole, cache = inventory(), ComposeCache()
    backends = (dataclasses.replace(whole.backends[0], intent=Intent.DRAINING), *whole.backends[1:])
    turns = itertools.cycle((whole, dataclasses.replace(whole, backends=backends)))
    benchmark(lambda: compose(next(turns), HealthView(), Drained(), Config(), cache))
    assert len(cache.parts) == SERVICES


def by_column(services: int, replicas: int) -> Snapshot:
    """A snapshot with counters as the engines give them."""
    shown = snapshot(services, replicas)
    tables = CounterTable.of(shown.stats.frontends), CounterTable.of(shown.stats.backends)
    return dataclasses.replace(shown, stats=dataclasses.replace(shown.stats, frontends=tables[0], backends=tables[1]))


@pytest.mark.parametrize("kept", [False, True], ids=["first", "next"])
def test_scrape_10000_backends(benchmark: BenchmarkFixture, kept: bool):
    """The text of a scrape: the daemon's first one, and those that follow while nothing comes or goes."""
    shown, exposition = by_column(SERVICES, REPLICAS), Exposition()
    body, _ = benchmark(exposition.render if kept else render, shown)
    assert body.count(b"\n") > SERVICES * REPLICAS


class Loop:
    """The control plane over a proxy engine on loopback, with 1,000 services of 10 backends."""

    def __init__(self, directory: Path) -> None:
        self.config = Config(threads=1, intercept="bind", state_dir=str(directory))
        self.engine = ProxyDatapath(self.config)
        self.engine.open()
        self.cache, self.applied = ComposeCache(), Applied()
        whole = inventory()
        here = IPv4Address("127.0.0.1")
        ports = (tuple(dataclasses.replace(port, address=here) for port in s.ports) for s in whole.services)
        services = tuple(dataclasses.replace(s, ports=own) for s, own in zip(whole.services, ports, strict=True))
        self.inventory = dataclasses.replace(whole, services=services)
        self.services, self.exposition = Services(EngineKind.PROXY), Exposition()
        self.turn = 0
        self.apply(self.plan())

    def change(self, services: int) -> None:
        """One backend each of so many services is replaced."""
        self.turn += 1
        members: dict[str, list[Backend]] = {}
        for backend in self.inventory.backends:
            members.setdefault(backend.service, []).append(backend)
        for service in sorted(members)[:services]:
            old = members[service].pop(0)
            members[service].append(dataclasses.replace(old, id=f"x{self.turn:05}{service}"))
        backends = sorted(itertools.chain.from_iterable(members.values()), key=lambda b: b.id)
        self.inventory = dataclasses.replace(self.inventory, backends=tuple(backends))

    def plan(self) -> Plan:
        self.desired = compose(self.inventory, HealthView(), Drained(), self.config, self.cache)
        return plan(self.applied, self.desired)

    def apply(self, step: Plan) -> None:
        self.applied = self.engine.apply(step)

    def scrape(self) -> bytes:
        """What the daemon does off its event loop for a scrape."""
        picture = Picture(self.inventory, HealthView(), Drained(), desired=self.desired)
        shown = snapshot(0, 0).state | {"services": self.services.shown(picture, self.applied)}  # type: ignore[operator]
        return self.exposition.render(Snapshot(self.engine.stats(), shown, ready=True))[0]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path)
    yield made
    made.engine.close(release=True)


def test_apply_one_of_10000_backends_replaced(benchmark: BenchmarkFixture, loop: Loop):
    """By the proxy engine."""

    def prepare() -> tuple[tuple[Plan], dict[str, object]]:
        loop.change(1)
        return (loop.plan(),), {}

    benchmark.pedantic(loop.apply, setup=prepare, rounds=50)
    assert len(loop.applied.backends) == SERVICES * REPLICAS


@pytest.mark.parametrize("services", [1, SERVICES], ids=["one", "a_tenth"])
def test_whole_scrape_after_a_change_of_10000_backends(benchmark: BenchmarkFixture, loop: Loop, services: int):
    """Reading included, right after one backend was replaced, or one of every service."""

    def prepare() -> None:
        loop.scrape()
        loop.change(services)
        loop.apply(loop.plan())

    body = benchmark.pedantic(loop.scrape, setup=prepare, rounds=6, warmup_rounds=1)
    assert body.count(b"\n") > SERVICES * REPLICAS


def test_read_10000_backends(benchmark: BenchmarkFixture, tmp_path: Path):
    """The proxy engine's counters, for a scrape."""
    engine = ProxyDatapath(Config(threads=1, intercept="bind", state_dir=str(tmp_path)))
    books, held = engine._accounting, plan(Applied(), compose(inventory(), HealthView(), Drained(), Config())).result
    engine.open()
    try:
        for frontend, entry in held.frontends.items():
            record = books.record(frontend, engine._engine)  # type: ignore[arg-type]
            for target in entry.state.targets:
                books.pair(record, key_of(entry.state, target), engine._engine)  # type: ignore[arg-type]
        assert len(benchmark(engine.stats).backends) == SERVICES * REPLICAS
    finally:
        engine.close(release=True)


@pytest.fixture
def maps(tmp_path: Path) -> Iterator[tuple[KernelMaps, Ids]]:
    """The kernel engine's maps with 1,000 services of 10 backends in them; needs root."""
    subprocess.run(["mount", "-t", "bpf", "bpf", str(tmp_path)], check=True)
    try:
        _, found = loader.load(tmp_path / "mesh", {})
        held = KernelMaps(found, tmp_path / "mesh")
        result = plan(Applied(), compose(inventory(), HealthView(), Drained(), Config())).result
        held.put_backends({entry.id: slot_of(entry) for entry in result.backends.values()})
        held.arenas.reserve(entry.table.size for entry in result.frontends.values())
        for frontend, entry in result.frontends.items():
            held.put_frontend(frontend, entry.table.to_bytes(), 0, ())
        yield held, Ids(found)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def slot_of(entry: BackendEntry) -> _abi.Backend:
    key = entry.key
    state = _abi.BACKEND_ACTIVE
    return _abi.Backend(address=entry.target.address, port=key.port, protocol=key.protocol, state=state)


def test_map_writes_of_a_change_10000_backends(benchmark: BenchmarkFixture, maps: tuple[KernelMaps, Ids]):
    """A backend is replaced by another: all that is written for it, a table of 16,381 slots among it."""
    held, ids = maps
    both = [dataclasses.replace(inventory().backends[n], id=f"new{n}") for n in range(2)]
    entries = [
        BackendEntry(20000 + n, BackendKey(b.id, 80, 6), Target(b.id, b.address, 80, 1))  # type: ignore[arg-type]
        for n, b in enumerate(both)
    ]
    tables = [
        SlotTable.build(16381, [*members(9), (backend_seed(b.id), 20000 + n, 1)]).to_bytes() for n, b in enumerate(both)
    ]
    frontend = next(iter(held.served))
    turns = itertools.cycle(((0, 1), (1, 0)))

    def change() -> None:
        new, old = next(turns)
        held.put_backends({entries[new].id: slot_of(entries[new])})
        ids.put([entries[new]])
        held.put_frontend(frontend, tables[new], 0, None)
        ids.drop([entries[old].id])
        held.free_backends([entries[old].id])

    before = map_work()
    benchmark.pedantic(change, rounds=200, warmup_rounds=2)
    calls, stores, _ = (now - was for now, was in zip(map_work(), before, strict=True))
    benchmark.extra_info.update(system_calls=calls / 202, stores=stores / 202)
