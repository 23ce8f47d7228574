# SPDX-License-Identifier: Apache-2.0
"""What befalls the nodes of a real swarm, under steady load at every node: traffic is unharmed, the end is right."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster, failures
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Node, Swarm
from tests.support.lab.netns import run
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]


def tasks_on(cluster: Cluster, node: Node) -> set[str]:
    identity = cluster.swarm.manager.inspect("node", node.hostname)["ID"]
    return {task["ID"] for task in cluster.swarm.tasks("web") if task["NodeID"] == identity}


def leader(swarm: Swarm) -> int:
    """The number of the node that leads."""
    statuses = {n["Description"]["Hostname"]: n.get("ManagerStatus", {}) for n in swarm.api("GET", "/nodes")}
    return next(i for i, node in enumerate(swarm.nodes) if statuses[node.hostname].get("Leader"))


@contextmanager
def parted(one: list[Node], other: list[Node]) -> Iterator[None]:
    """No packet passes between the nodes of two groups."""
    for group, foreign in ((one, other), (other, one)):
        addresses = ", ".join(node.address for node in foreign)
        rules = f"""table inet parted {{
            chain in {{ type filter hook input priority -300; ip saddr {{ {addresses} }} drop; }}
            chain out {{ type filter hook output priority -300; ip daddr {{ {addresses} }} drop; }}
        }}"""
        for node in group:
            run(*node.namespace.command("nft", "-f", "-"), input=rules)
    try:
        yield
    finally:
        for node in (*one, *other):
            node.namespace.run("nft", "delete", "table", "inet", "parted")


def test_engines_restart(cluster5: Cluster) -> None:
    """dockerd ends, and its tasks with it, announced to nobody; it starts again, and the next one ends."""
    swarm = cluster5.swarm
    swarm.create("web", "--stop-grace-period=10s", replicas=10, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 10)
    with cluster5.load() as loads:
        last = leader(swarm)
        others = [number for number in (4, 3, 2, 1, 0) if number != last]
        for number in (4, last) if cluster5.engine == "proxy" else (*others, last):
            swarm.asked = next(manager for manager in range(swarm.managers) if manager != number)
            swarm.nodes[number].stop()
            swarm.nodes[number].start()
            cluster5.agree("web", 10, timeout=120)
        swarm.asked = 0
        reports = loads.stop()
    assert failures(reports) == {}


def test_agents_restart_on_each_node(cluster5: Cluster) -> None:
    """One process takes over from the other, everywhere; then changes arrive as before."""
    swarm = cluster5.swarm
    swarm.create("web", "--stop-grace-period=10s", replicas=5, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 5)
    with cluster5.load() as loads:
        for daemon in cluster5.daemons:
            old = daemon.process
            daemon.start("--take-over")
            assert old.wait(60) == 0
        swarm.docker("service", "scale", "--detach", "web=8")
        cluster5.agree("web", 8)
        reports = loads.stop()
    assert failures(reports) == {}


def test_an_agent_that_dies_takes_only_what_it_carried(cluster5: Cluster) -> None:
    """Its node's tasks serve through the others as soon as it is back; the others try other tasks meanwhile."""
    swarm = cluster5.swarm
    swarm.create("web", replicas=10, publish=[f"{WEB}:8080"])
    tasks = cluster5.agree("web", 10)
    lost, victim = tasks_on(cluster5, swarm.nodes[4]), cluster5.daemons[4]
    with cluster5.load(nodes=swarm.nodes[:4]) as loads:
        time.sleep(1)
        victim.kill()
        time.sleep(2)
        victim.start()
        cluster5.agree("web", 10)
        reports = loads.stop()
    for report in reports.values():
        assert report.failures_but_of(*lost, "") == []
        assert report.failed <= 16
    report = peers.load(cluster5.client, swarm.nodes[0].address, WEB, "-n", "300", "-c", "16")
    assert (report.ok, set(report.identities)) == (300, tasks)


def test_partition_and_heal(cluster5: Cluster) -> None:
    """A manager and a worker on one side, two managers and a worker on the other; clients reach all."""
    swarm = cluster5.swarm
    swarm.create("web", replicas=10, publish=[f"{WEB}:8080"])
    tasks = cluster5.agree("web", 10)
    few, many = [swarm.nodes[0], swarm.nodes[3]], [swarm.nodes[i] for i in (1, 2, 4)]
    sides = {node.hostname: {t for other in side for t in tasks_on(cluster5, other)}
             for side in (few, many) for node in side}  # fmt: skip
    assert all(sides.values())
    with cluster5.load() as loads:
        time.sleep(1)
        with parted(few, many):

            def alone() -> bool:
                return all(cluster5.sees(d, "web") == sides[d.namespace.short] for d in cluster5.daemons)

            wait_for(alone, "each side uses its own tasks")
            for node in swarm.nodes:
                report = peers.load(cluster5.client, node.address, WEB, "-n", "50", "-c", "8")
                assert (report.ok, report.failures) == (50, ())
        cluster5.agree("web", 10)
        reports = loads.stop()
    for name, report in reports.items():
        assert report.failures_but_of(*(tasks - sides[name]), "") == []
        assert report.failed <= 16
    cluster5.agree("web", 10)


def source_of(daemon: Daemon) -> str:
    """The manager by which a worker is told."""
    return re.findall(r'event="inventory comes from" manager=(\S+)', daemon.log.read_text())[-1]


def test_a_manager_loses_power(cluster5: Cluster, record_property: Callable[[str, object], None]) -> None:
    """Its links go down, its processes are killed: only what was under way there fails. A worker that was told by it
    is told by another. It comes back."""
    swarm, worker = cluster5.swarm, cluster5.daemons[4]
    swarm.create("web", replicas=10, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 10)
    number = [node.address for node in swarm.nodes].index(source_of(worker))
    gone, left = swarm.nodes[number], [node for node in swarm.nodes if node.address != source_of(worker)]
    daemons = [daemon for daemon in cluster5.daemons if daemon is not cluster5.daemons[number]]
    lost = tasks_on(cluster5, gone)
    assert lost
    with cluster5.load(nodes=left) as loads:
        time.sleep(1)
        port = f"p{gone.address.rpartition('.')[2]}"  # of the switch
        swarm.lab.switch.ip("link", "set", port, "down")
        begun = time.monotonic()
        cluster5.daemons[number].kill()
        gone.kill()
        swarm.asked = 1 if number != 1 else 2
        try:
            wait_for(lambda: source_of(worker) != gone.address, "another manager tells")
            record_property("seconds until another manager tells", round(time.monotonic() - begun, 2))
            wait_for(lambda: not any(cluster5.sees(d, "web") & lost for d in daemons), "it is out")
            record_property("seconds until a dead manager is out", round(time.monotonic() - begun, 2))
            for node in left:
                report = peers.load(cluster5.client, node.address, WEB, "-n", "100", "-c", "8")
                assert (report.ok, report.failures, set(report.identities) & lost) == (100, (), set())
            reports = loads.stop()
        finally:
            swarm.lab.switch.ip("link", "set", port, "up")
            swarm.revive()
            cluster5.daemons[number].start()
    for report in reports.values():
        assert report.failures_but_of(*lost, "") == []
        assert report.failed <= 16
    cluster5.agree("web", 10, timeout=120)
    report = peers.load(cluster5.client, gone.address, WEB, "-n", "300", "-c", "16")
    assert (report.ok, report.failures) == (300, ())
