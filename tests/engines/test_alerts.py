# SPDX-License-Identifier: Apache-2.0
"""Incidents of clients, with both engines: a real Prometheus scrapes the daemon, and the expressions of our alerts hold
for the service that fails, and for no other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.topology import Spec, Topology
from tests.support.callers import Callers
from tests.support.daemon import HTTP_PORT as DAEMON_PORT
from tests.support.lab.images import HTTP_PORT
from tests.support.polling import wait_for
from tests.support.prometheus import Prometheus

pytestmark = [pytest.mark.root]

WELL, DENIED, CLOSED, EMPTY = 8100, 8101, 8102, 8103
OFF = {"health": "off"}
SERVICES = (
    Spec("well", (f"{WELL}:{HTTP_PORT}/tcp",), ("b1", "b2"), options=OFF),
    Spec("denied", (f"{DENIED}:{HTTP_PORT}/tcp",), ("b1", "b2"), options={**OFF, "allow": "10.9.0.0/16"}),
    Spec("closed", (f"{CLOSED}:9/tcp",), ("b1", "b2"), options=OFF),  # nobody listens
    Spec("empty", (f"{EMPTY}:{HTTP_PORT}/tcp",), (), options=OFF),
)
PORTS = {WELL: "well", DENIED: "denied", CLOSED: "closed", EMPTY: "empty"}


@pytest.fixture
def scene(make_topology: Callable[..., Topology]) -> Iterator[tuple[Topology, Prometheus]]:
    topology = make_topology(backends=2)
    topology.serve(*SERVICES)
    with contextlib.ExitStack() as stack:
        directory = topology.lab.directory / "prometheus"
        directory.mkdir()
        prometheus = Prometheus(directory, f"127.0.0.1:{DAEMON_PORT}", topology.node)
        stack.callback(prometheus.close)
        callers = Callers(topology.client, [(topology.node.address, port) for port in PORTS])
        stack.callback(callers.close)
        yield topology, prometheus


def firing(prometheus: Prometheus) -> dict[str, set[str]]:
    """Services for which the expressions of our alerts hold now, by alert."""
    groups = prometheus.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"] if rule["type"] == "alerting"]
    assert all(rule["health"] in ("ok", "unknown") for rule in rules), rules
    found = {
        rule["name"]: {row["metric"].get("service", "") for row in prometheus.query(rule["query"])} for rule in rules
    }
    return {name: services for name, services in found.items() if services}


def failing(topology: Topology) -> dict[tuple[str, str], float]:
    """Failures by service and cause, as the daemon tells them."""
    causes = {"denied": "denied", "closed": "refused", "empty": "no_backend"}
    total = topology.daemon.total
    return {row: total("mesh_connections_failed_total", service=row[0], cause=row[1]) for row in causes.items()}


def test_every_incident_is_told_by_its_alert(scene: tuple[Topology, Prometheus]) -> None:
    topology, prometheus = scene
    wanted = {"MeshClientsDenied": {"denied"}, "MeshServiceFailing": {"closed"}, "MeshNoBackend": {"empty"}}
    seen: list[Any] = []

    def told() -> bool:
        seen.append(firing(prometheus))
        return seen[-1] == wanted

    try:
        prometheus.wait(told, "alerts")
    except TimeoutError as error:
        raise AssertionError(f"{error}: {seen[-1:]}, {failing(topology)}") from None
    assert all(count > 0 for count in failing(topology).values()), failing(topology)
    assert topology.daemon.total("mesh_connections_failed_total", service="well") == 0


def test_calls_of_the_node_itself_are_counted(scene: tuple[Topology, Prometheus]) -> None:
    topology, _ = scene
    total = topology.daemon.total
    spec = Spec("own", (f"8104:{HTTP_PORT}/tcp",), ("b1", "b2"), options=OFF)
    topology.change(*SERVICES, spec, Spec("none", (f"8105:{HTTP_PORT}/tcp",), (), options=OFF))
    with topology.node.entered():
        for address in ("127.0.0.1", topology.node.address):
            for _ in range(10):
                with contextlib.closing(socket.create_connection((address, 8104), timeout=30)):
                    pass
        with (
            contextlib.suppress(OSError),
            contextlib.closing(socket.create_connection(("127.0.0.1", 8105), timeout=30)) as s,
        ):
            s.recv(1)
    wait_for(lambda: total("mesh_connections_opened_total", service="own") == 20, "20 opened")
    wait_for(lambda: total("mesh_connections_failed_total", service="none", cause="no_backend") >= 1, "1 failed")
    assert total("mesh_backend_connections_opened_total", service="own") == 20
    wait_for(lambda: total("mesh_connections_active", service="own") == 0, "none open")
