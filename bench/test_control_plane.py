# SPDX-License-Identifier: Apache-2.0
"""What the control plane's functions cost at scale, by pytest-benchmark. Part of `make bench`, not of `make test`.

Scale: a table of 1,000 backends; a cluster of 1,000 services with 10 backends each.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mesh._maglev import OWNER_FIRST, SlotTable, backend_seed
from mesh.config import Config
from mesh.datapath.base import Applied, Table
from mesh.datapath.proxy import ProxyDatapath
from mesh.metrics.collector import Exposition, Snapshot, render
from mesh.model import Backend, HealthView, Intent, Inventory, Node, Protocol, PublishedPort, Service
from mesh.reconcile.compose import ComposeCache, Drained, compose
from mesh.reconcile.guard import guard
from mesh.reconcile.plan import key_of, plan
from mesh.swarm.decode import Answers, decode
from tests.unit.metrics_samples import snapshot

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
    before, after = (compose(each, HealthView(), Drained(), Config()) for each in (whole, fewer))
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
    return Answers(**{name: json.dumps(body).encode() for name, body in bodies.items()})


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
    tables = Table.of(shown.stats.frontends), Table.of(shown.stats.backends)
    return dataclasses.replace(shown, stats=dataclasses.replace(shown.stats, frontends=tables[0], backends=tables[1]))


@pytest.mark.parametrize("kept", [False, True], ids=["first", "next"])
def test_scrape_10000_backends(benchmark: BenchmarkFixture, kept: bool):
    """The text of a scrape: the daemon's first one, and those that follow while nothing comes or goes."""
    shown, exposition = by_column(SERVICES, REPLICAS), Exposition()
    body, _ = benchmark(exposition.render if kept else render, shown)
    assert body.count(b"\n") > SERVICES * REPLICAS


def test_read_10000_backends(benchmark: BenchmarkFixture, tmp_path: Path):
    """The proxy engine's counters, for a scrape."""
    engine = ProxyDatapath(Config(threads=1, intercept="bind", state_dir=str(tmp_path)))
    books, held = engine._books, plan(Applied(), compose(inventory(), HealthView(), Drained(), Config())).result
    engine.open()
    try:
        for frontend, entry in held.frontends.items():
            record = books.record(frontend, engine._engine)
            for target in entry.state.targets:
                books.pair(record, key_of(entry.state, target), engine._engine)
        assert len(benchmark(engine.stats).backends) == SERVICES * REPLICAS
    finally:
        engine.close(release=True)
