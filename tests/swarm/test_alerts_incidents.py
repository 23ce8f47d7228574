# SPDX-License-Identifier: Apache-2.0
"""Real incidents on three nodes with the kernel engine, in a real Prometheus: each fires one alert, which names what is
wrong, and none of another; what was meant fires none that pages.

The rules are those of deploy/, with every duration in them divided by `FASTER`, and `instance` is the node's name.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support.callers import Callers
from tests.support.cluster import Cluster, blocked
from tests.support.daemon import HTTP_PORT
from tests.support.lab.dockerd import Swarm, unavailable
from tests.support.lab.netns import Lab
from tests.support.polling import wait_for
from tests.support.prometheus import ROOT, Prometheus

pytestmark = [
    pytest.mark.root,
    pytest.mark.swarm,
    pytest.mark.bpf,
    pytest.mark.later("kernel"),
]

FASTER = 15
PORTS = {"web": 8000, "guarded": 8001, "solo": 8002}
SETTLED = 8.0  # seconds in which nothing changes any more: twice a minute of the rules
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def faster(rules: str) -> str:
    """Alerting rules with every duration (`for: 5m`, `[5m]`) divided by FASTER."""

    def shorter(found: re.Match[str]) -> str:
        before, number, unit, after = found.groups()
        return f"{before}{int(number) * UNITS[unit] * 1000 // FASTER}ms{after}"

    return re.sub(r"(\bfor: |\[)(\d+)([smhd])(\]|$)", shorter, rules, flags=re.MULTILINE)


class Alert(NamedTuple):
    """One that is pending or fires."""

    name: str
    severity: str
    text: str  # summary and description
    runbook: str


class Scene:
    """Three nodes with agents, who calls them, and who watches."""

    def __init__(self, lab: Lab, stack: contextlib.ExitStack) -> None:
        self.swarm = Swarm(lab, 1, 2)
        client = lab.host("client")
        self.cluster = Cluster(self.swarm, client, engine="kernel", http_listen=f"0.0.0.0:{HTTP_PORT}")
        stack.callback(self.cluster.close)
        self.cluster.wait_ready()
        for name, port in PORTS.items():
            replicas = 1 if name == "solo" else 3
            self.swarm.create(name, "--stop-grace-period=1s", replicas=replicas, publish=[f"{port}:8080"])
        address = self.swarm.nodes[0].address  # of one node: see Cluster.load
        stack.callback(Callers(client, [(address, port) for port in PORTS.values()]).close)
        directory = lab.directory / "prometheus"
        directory.mkdir()
        rules = directory / "alerts.yml"
        rules.write_text(faster((ROOT / "deploy/alerts.yml").read_text()))
        targets = {node.hostname: f"{node.address}:{HTTP_PORT}" for node in self.swarm.nodes}
        self.prometheus = Prometheus(directory, targets, lab.switch, rules=rules)
        stack.callback(self.prometheus.close)
        self.prometheus.wait(lambda: len(self.prometheus.query("mesh_ready == 1")) == 3, "a scrape of each node")

    def active(self) -> list[Alert]:
        """Alerts that fire, or will in a while."""
        rows = self.prometheus.api("alerts")["alerts"]
        return sorted(
            Alert(
                row["labels"]["alertname"],
                row["labels"]["severity"] if row["state"] == "firing" else "pending",
                f"{row['annotations']['summary']}\n{row['annotations']['description']}",
                row["annotations"]["runbook_url"],
            )
            for row in rows
        )

    def told(self, *wanted: tuple[str, str]) -> list[str]:
        """Until exactly these alerts (name, severity) fire, none is about to, and it stays so. Returns their texts.

        Raises:
            TimeoutError: with what was active at last.
        """
        since, last, seen = time.monotonic(), list[Alert](), list[list[Alert]]()

        def stays() -> bool:
            nonlocal since, last
            now = self.active()
            if [row[:2] for row in now] != [row[:2] for row in last]:
                since, last = time.monotonic(), now
                seen.append(now)
            return [row[:2] for row in now] == sorted(wanted) and time.monotonic() - since > SETTLED

        try:
            wait_for(stays, f"exactly {wanted}", timeout=120, interval=0.3)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; {seen}") from None
        for row in last:
            file, _, anchor = row.runbook.partition("#")
            titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, row.runbook
        return [row.text for row in last]

    def ids(self) -> set[str]:
        """Of nodes, services and tasks: what nobody wants to read."""
        return {row["ID"] for kind in ("nodes", "services", "tasks") for row in self.swarm.api("GET", f"/{kind}")}

    def one(self, name: str, severity: str, *names: str) -> None:
        """Until this alert alone is told, and it has these names and no id."""
        (text,) = self.told((name, severity))
        assert all(re.search(rf"\b{word}\b", text) for word in names), text
        assert not [word for word in self.ids() if word in text], text


@pytest.fixture(scope="module", params=["kernel"])
def shared_scene() -> Iterator[Scene]:
    if reason := unavailable():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield Scene(stack.enter_context(Lab()), stack)


@pytest.fixture
def scene(shared_scene: Scene, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Before and after an incident no alert fires or is about to."""
    shared_scene.told()
    yield shared_scene
    request.node.add_report_section("teardown", "daemons", shared_scene.cluster.tails())


def test_an_agent_is_dead(scene: Scene) -> None:
    daemon, node = scene.cluster.daemons[1], scene.swarm.nodes[1]
    daemon.kill()
    try:
        scene.one("MeshDown", "critical", node.hostname)
    finally:
        daemon.start(wait=False)


@pytest.mark.parametrize("ports", [("udp 6084",), ("tcp 9552", "udp 9552"), ("udp 6084", "tcp 9552", "udp 9552")])
def test_a_path_is_down(scene: Scene, ports: tuple[str, ...]) -> None:
    node = scene.swarm.nodes[2]
    rules = [f"ip {way} {node.address} {port.replace(' ', ' dport ')}" for port in ports for way in ("saddr", "daddr")]
    with blocked(scene.swarm, *rules):
        scene.one("MeshPathDown", "critical", *(other.hostname for other in scene.swarm.nodes))


def test_a_wrong_rule_denies_all_clients(scene: Scene) -> None:
    scene.swarm.docker("service", "update", "--detach", "--label-add", "mesh.allow=10.9.0.0/16", "guarded")
    try:
        scene.one("MeshClientsDenied", "warning", "guarded")
    finally:
        scene.swarm.docker("service", "update", "--detach", "--label-rm", "mesh.allow", "guarded")


def test_a_service_without_backends(scene: Scene) -> None:
    """No node fits its constraint. Nor does another alert fire once that is over."""
    where, began = "node.hostname==nowhere", time.monotonic()
    scene.swarm.docker("service", "update", "--detach", "--constraint-add", where, "solo")
    try:
        scene.one("MeshNoBackend", "critical", "solo")
    finally:
        scene.swarm.docker("service", "update", "--detach", "--constraint-rm", where, "solo")
        scene.swarm.wait_running("solo", 1)
    scene.told()
    fired = f'max_over_time(ALERTS{{alertstate="firing"}}[{time.monotonic() - began:.0f}s])'
    assert {row["metric"]["alertname"] for row in scene.prometheus.query(fired)} == {"MeshNoBackend"}


def test_a_service_that_is_scaled_to_0_on_purpose_fires_none(scene: Scene) -> None:
    scene.swarm.docker("service", "scale", "--detach", "solo=0")
    try:
        daemon = scene.cluster.daemons[0]
        wait_for(lambda: daemon.total("mesh_frontend_backends_eligible", service="solo") == 0, "no backend")
        scene.told()
    finally:
        scene.swarm.docker("service", "scale", "--detach", "solo=1")
        scene.swarm.wait_running("solo", 1)


def test_a_node_that_left_the_swarm_pages_nobody(scene: Scene) -> None:
    """Until it is removed, a warning says that Swarm still expects it. Its agent, which still runs, says what it is."""
    swarm, node, daemon = scene.swarm, scene.swarm.nodes[2], scene.cluster.daemons[2]
    found = swarm.manager.inspect("node", node.hostname)["ID"]
    node.docker("swarm", "leave")
    wait_for(lambda: any("has left the swarm" in problem for problem in daemon.state()["problems"]), "it says so")
    scene.one("MeshNodeDown", "warning", node.hostname)
    swarm.docker("node", "rm", found)
    scene.told()
    assert daemon.total("mesh_node_left") == 1
