# SPDX-License-Identifier: Apache-2.0
"""What befalls the managers of a real swarm, under steady load at every node: traffic is unharmed, the end is right.

With the kernel engine these run in `make test-all` only: what agents tell each other is the same with either engine.
"""

from __future__ import annotations

from typing import Any

import pytest

from mesh.cluster.credentials import Files
from mesh.config.keys import Config
from tests.support import peers
from tests.support.cluster import WEB, Cluster, failures
from tests.support.lab.dockerd import Node, Swarm
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm, pytest.mark.later("kernel")]


def members(swarm: Swarm) -> dict[str, dict[str, Any]]:
    """The swarm's nodes by hostname, as the manager that is asked says."""
    return {node["Description"]["Hostname"]: node for node in swarm.api("GET", "/nodes")}


def leader(swarm: Swarm) -> str:
    """The hostname of the leader; empty while there is none."""
    try:
        found = [n for n, node in members(swarm).items() if node.get("ManagerStatus", {}).get("Leader")]
    except (OSError, RuntimeError):  # nobody answers, or says that there is none
        return ""
    return found[0] if found else ""


def kinds(cluster: Cluster) -> list[str]:
    """What the agent of each node is: `swarm` reads itself, `relay` is told."""
    return [daemon.state()["provider"]["kind"] for daemon in cluster.daemons]


def alike(cluster: Cluster) -> set[str]:
    """What all nodes see; empty where they differ."""
    seen = [cluster.sees(daemon, "web") for daemon in cluster.daemons]
    return seen[0] if all(one == seen[0] for one in seen) else set()


def task_of(node: Node, container: str) -> str:
    """The id of a container's task."""
    return str(node.inspect("container", container)["Config"]["Labels"]["com.docker.swarm.task.id"])


def test_managers_die_one_after_the_other(cluster5: Cluster) -> None:
    """The leader, then the quorum, then the last; their containers and agents live. A death is still acted on."""
    swarm = cluster5.swarm
    swarm.create("web", "--stop-grace-period=10s", replicas=10, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 10)
    with cluster5.load() as loads:
        swarm.nodes[0].kill()
        swarm.asked = 1
        wait_for(lambda: leader(swarm) not in ("", swarm.nodes[0].hostname), "another leader")
        wait_for(lambda: kinds(cluster5)[0] == "relay", "the node with the dead Engine is told by others")
        swarm.docker("service", "scale", "--detach", "web=8")
        cluster5.agree("web", 8)  # also where the Engine is dead
        swarm.nodes[1].kill()
        before = wait_for(lambda: alike(cluster5), "all nodes see the same")
        tasks = {task_of(node, c): (node, c) for node in swarm.nodes[3:] for c in swarm.containers("web", node)}
        label = next(iter(before & tasks.keys()))
        tasks[label][0].docker("kill", tasks[label][1])
        left = before - {label}
        wait_for(lambda: all(cluster5.sees(d, "web") == left for d in cluster5.daemons), "one less on every node")
        swarm.nodes[2].kill()
        wait_for(lambda: not cluster5.daemons[2].state()["provider"]["connected"], "the last is away")
        during = loads.stop()
    for node, failed in failures(during).items():  # requests under way with the task that was killed, if there were any
        assert {kind for kind, _, _ in failed} == {"read: ECONNRESET"}, node
        assert sum(count for _, _, count in failed) <= 16, node  # as many as a client has under way
    swarm.revive()  # Docker replaces all tasks then, at once
    agreed = cluster5.agree("web", 8)
    for host in swarm.nodes:
        report = peers.load(cluster5.client, host.address, WEB, "-n", "200", "-c", "16")
        assert (report.ok, set(report.identities)) == (200, agreed)


def test_managers_are_promoted_and_demoted(cluster5: Cluster) -> None:
    """A worker leads in the end, the first leader is a worker; then back. Nothing is restarted."""
    swarm = cluster5.swarm
    first, worker = swarm.nodes[0].hostname, swarm.nodes[3].hostname
    swarm.create("web", "--stop-grace-period=10s", replicas=5, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 5)
    assert kinds(cluster5) == ["swarm", "swarm", "swarm", "relay", "relay"]
    with cluster5.load() as loads:
        swarm.asked = 1
        for role, kind in (("promote", "swarm"), ("demote", "relay"), ("promote", "swarm")):
            swarm.docker("node", role, worker)
            wait_for(lambda kind=kind: kinds(cluster5)[3] == kind, f"{role}d")  # type: ignore[misc]
        cluster5.agree("web", 5)  # with what was known before
        swarm.docker("node", "demote", first)
        wait_for(lambda: kinds(cluster5)[0] == "relay", "the demoted node is told")
        swarm.docker("service", "scale", "--detach", "web=7")
        cluster5.agree("web", 7)
        reports = loads.stop()
    local = {t["backend"] for s in cluster5.daemons[3].state()["services"] for f in s["frontends"]
             for t in f["targets"] if t["local"]}  # fmt: skip
    identity = members(swarm)[worker]["ID"]
    assert local == {task["ID"] for task in swarm.tasks("web") if task["NodeID"] == identity}
    swarm.docker("node", "promote", first)
    swarm.docker("node", "demote", worker)
    wait_for(lambda: kinds(cluster5) == ["swarm", "swarm", "swarm", "relay", "relay"], "as before")
    assert failures(reports) == {}
    assert [node["Spec"]["Role"] for _, node in sorted(members(swarm).items())] == ["manager"] * 3 + ["worker"] * 2


def test_certificates_are_rotated(cluster5: Cluster) -> None:
    """A new root for the whole swarm; agents that start afterwards, and those that go on, understand each other."""
    swarm = cluster5.swarm
    swarm.create("web", replicas=5, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 5)
    files = [Files.of(Config(docker_data_root=str(node.data_root))) for node in swarm.nodes]
    roots = [file.ca.read_bytes() for file in files]
    with cluster5.load() as loads:
        swarm.docker("swarm", "ca", "--rotate", "--quiet")
        wait_for(lambda: all(f.ca.read_bytes() != old for f, old in zip(files, roots, strict=True)), "new roots")
        assert len({file.ca.read_bytes() for file in files}) == 1
        swarm.docker("service", "scale", "--detach", "web=7")
        cluster5.agree("web", 7)
        for number in (1, 4):
            old = cluster5.daemons[number].process
            cluster5.daemons[number].start("--take-over")
            assert old.wait(60) == 0
        swarm.docker("service", "scale", "--detach", "web=5")
        cluster5.agree("web", 5)
        reports = loads.stop()
    assert failures(reports) == {}
