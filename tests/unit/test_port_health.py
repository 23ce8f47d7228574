# SPDX-License-Identifier: Apache-2.0
"""Health is a matter of each port: one that opens late, or dies alone, gets no flows, and the others keep theirs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from mesh.agent import changelog
from mesh.cluster.reports import Deaths
from mesh.cluster.wire import HealthReport, Report
from mesh.config.keys import Config
from mesh.datapath.base import Signal
from mesh.datapath.counters import Failure
from mesh.health import monitor as monitors
from mesh.health.monitor import Monitor
from mesh.health.probe import ProbeError
from mesh.model import (
    Backend,
    Health,
    HealthCheck,
    HealthView,
    Inventory,
    Node,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
    port_key,
)
from mesh.reconcile.compose import ComposeCache, compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Picture
from tests.support.cluster_provider import Server, make_provider
from tests.support.polling import until

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
FAST = HealthCheck(interval=0.02, timeout=5.0, rise=2, fall=3)
WEB, ADMIN = 80, 9090


def of(*names: str, ports: tuple[int, ...] = (WEB, ADMIN), check: HealthCheck = FAST) -> Inventory:
    published = tuple(PublishedPort(8000 + i, port, Protocol.TCP) for i, port in enumerate(ports))
    udp = PublishedPort(8053, 53, Protocol.UDP)
    backends = tuple(Backend(name, "web", "n", LOOPBACK) for name in names)
    return Inventory((Service("web", "web", (*published, udp), ServiceOptions(health=check)),), backends)


@contextlib.asynccontextmanager
async def watching(inventory: Inventory) -> AsyncIterator[Monitor]:
    monitor = Monitor(lambda view: None)
    monitor.watch(inventory)
    task = asyncio.create_task(monitor.run())
    try:
        yield monitor
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Ports:
    """What the probes of each port find; a port that is not named does not answer."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}
        self.probed: list[int] = []

    async def probe(self, address: object, port: int, *_: object) -> None:
        self.probed.append(port)
        found = self.found.get(port, "")
        if not found:
            await asyncio.sleep(3600)
        if found != "ok":
            raise ProbeError(found, refused=True)


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Ports:
    found = Ports()
    monkeypatch.setattr(monitors, "probe", found.probe)
    return found


# ---- the node's own probes ----


async def test_a_port_that_nobody_listens_on_is_down_alone(ports: Ports) -> None:
    ports.found = {WEB: "refused", ADMIN: "ok"}
    async with watching(of("a")) as monitor:
        await until(lambda: monitor.view.of("a", WEB) is Health.DOWN)
        await until(lambda: monitor.view.of("a") is Health.UP)
        assert monitor.view.of("a", ADMIN) is Health.UP
        assert monitor.view.of("a", 53) is Health.UP  # UDP is not probed: it goes with the backend
        assert "refused" in monitor.view.reason("a", WEB)
        assert monitor.view.reason("a") == monitor.view.reason("a", ADMIN) == ""
        ports.found[WEB] = "ok"
        await until(lambda: monitor.view == HealthView({"a": Health.UP}))
        ports.found = {WEB: "refused", ADMIN: "refused"}
        await until(lambda: monitor.view.verdicts == {"a": Health.DOWN})  # nothing stands otherwise than it
        assert monitor.view.of("a", WEB) is Health.DOWN


async def test_a_real_port_that_opens_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as early, socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        open_, closed = early.getsockname()[1], late.getsockname()[1]
        async with watching(of("a", ports=(open_, closed))) as monitor:
            await until(lambda: monitor.view.of("a", closed) is Health.DOWN)
            assert monitor.view.of("a", open_) is Health.UP
            late.listen()
            await until(lambda: monitor.view.of("a", closed) is Health.UP)


async def test_traffic_that_fails_at_one_port_has_that_one_probed(ports: Ports) -> None:
    ports.found = {WEB: "ok", ADMIN: "ok"}
    async with watching(of("a", check=replace(FAST, interval=3600.0))) as monitor:
        await until(lambda: monitor.counts["ok"] == 2)
        ports.probed.clear()
        ports.found[WEB] = "refused"
        monitor.signals([Signal("a", False, Failure.REFUSED, 9, WEB), Signal("a", False, Failure.REFUSED, 9, 53)])
        await until(lambda: monitor.view.of("a", WEB) is Health.DOWN)
        assert set(ports.probed) == {WEB}
        assert monitor.view.of("a") is Health.UP


async def test_a_new_backends_port_waits_for_its_first_probe(ports: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "PENDING", 0.2)
    ports.found = {ADMIN: "ok"}  # the other one does not answer yet
    async with watching(of("old")) as monitor:
        await until(lambda: monitor.view.of("old") is Health.UP)
        assert monitor.view.of("old", WEB) is Health.UP  # it may have served for long
        monitor.watch(of("new", "old"))
        await until(lambda: monitor.view.of("new", ADMIN) is Health.UP)
        assert monitor.view.of("new", WEB) is Health.PENDING
        await until(lambda: monitor.view.of("new", WEB) is Health.UP)  # but not for ever
        assert port_key("new", WEB) not in monitor.view.verdicts


# ---- what is served ----


def weights(inventory: Inventory, health: HealthView, cache: ComposeCache | None = None) -> dict[int, dict[str, int]]:
    desired = compose(inventory, health, Drained(), Config(), cache)
    return {f.port: {t.backend: t.weight for t in state.targets} for f, state in desired.frontends.items()}


def test_a_backend_gets_flows_at_the_ports_that_are_up() -> None:
    cache, inventory = ComposeCache(), of("a", "b")
    everybody = {8000: {"a": 1, "b": 1}, 8001: {"a": 1, "b": 1}, 8053: {"a": 1, "b": 1}}
    up = {"a": Health.UP, "b": Health.UP}
    assert weights(inventory, HealthView(up), cache) == everybody
    for verdict in (Health.DOWN, Health.PENDING):
        health = HealthView(up | {port_key("a", WEB): verdict})
        assert weights(inventory, health, cache) == everybody | {8000: {"a": 0, "b": 1}}
    assert weights(inventory, HealthView(up), cache) == everybody


def test_a_port_that_is_down_everywhere_is_used_everywhere_and_named() -> None:
    inventory = of("a", "b")
    verdicts = {"a": Health.UP, "b": Health.UP} | {port_key(name, WEB): Health.DOWN for name in ("a", "b")}
    desired = compose(inventory, HealthView(verdicts), Drained(), Config())
    panic = {frontend.port: state.panic for frontend, state in desired.frontends.items()}
    assert panic == {8000: True, 8001: False, 8053: False}
    assert [problem.where for problem in desired.problems] == ["service web, port 8000/tcp"]
    whole = compose(inventory, HealthView({"a": Health.DOWN, "b": Health.DOWN}), Drained(), Config())
    assert [problem.where for problem in whole.problems] == ["service web"]


def test_the_log_names_the_port() -> None:
    up = HealthView({"a": Health.UP})
    down = HealthView({"a": Health.UP, port_key("a", WEB): Health.DOWN}, {port_key("a", WEB): "refused"})
    before, after = (Picture(of("a"), health) for health in (up, down))
    with capture_logs() as lines:
        changelog.tell(before, after)
        changelog.tell(after, before)
    assert [(line["event"], line["log_level"], line["port"], line.get("reason")) for line in lines] == [
        ("backend port down", "warning", WEB, "refused"),
        ("backend port up", "info", WEB, None),
    ]


# ---- other nodes ----


def cluster(*names: str) -> tuple[Any, list[HealthView], Inventory]:
    """A manager that is told of backends of another node."""
    seen: list[HealthView] = []
    provider = make_provider(on_health=seen.append)
    provider._roles.server, provider._roles.reads = Server("m"), True
    service = of().services[0]
    backends = tuple(Backend(name, "web", "m", None, local=False) for name in names)
    nodes = (Node("m", "m", ipaddress.ip_address("10.0.0.2")),)
    return provider, seen, Inventory((service,), backends, nodes, source="swarm")


async def test_other_nodes_verdicts_over_ports_are_heard_and_told() -> None:
    provider, seen, inventory = cluster("a", "b")
    provider._take(inventory)
    word = {"a": HealthReport("up"), port_key("a", WEB): HealthReport("down", "refused")}
    strange = {port_key("stranger", WEB): HealthReport("down")}
    provider._on_report("m", Report(word | strange))
    await until(lambda: bool(seen) and seen[-1].of("a", WEB) is Health.DOWN)
    assert seen[-1].of("a") is seen[-1].of("a", ADMIN) is Health.UP
    assert seen[-1].reason("a", WEB) == "refused"
    assert provider._verdicts.all() == word
    provider._on_report("m", Report({"a": HealthReport("up")}))
    await until(lambda: seen[-1].of("a", WEB) is Health.UP)


def test_the_word_of_managers_over_own_ports_is_older_than_the_own_probes() -> None:
    seen: list[HealthView] = []
    provider = make_provider(on_health=seen.append)
    verdicts = provider._verdicts
    verdicts.told(HealthView({"a": Health.UP, port_key("a", WEB): Health.DOWN}))
    verdicts.probed(HealthView({"a": Health.UP}))
    verdicts.merge(reads=False)
    assert seen[-1].of("a", WEB) is Health.UP


def test_a_port_that_is_back_is_not_told_to_be_dead() -> None:
    deaths, inventory = Deaths(clock=lambda: 0.0), Inventory((), (Backend("a", "web", "n", None),))
    dead = {"a": HealthReport("up"), port_key("a", WEB): HealthReport("down", "refused")}
    assert deaths.keep(dead, inventory) == dead
    assert deaths.keep({"a": HealthReport("up")}, inventory) == {"a": HealthReport("up")}
