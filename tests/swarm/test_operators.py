# SPDX-License-Identifier: Apache-2.0
"""What operators say to a real swarm: labels that are wrong, drains of all nodes, Docker that comes up late."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.cluster import ENGINES, WEB, Cluster, failures
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Node, bpf_fs
from tests.support.lab.netns import Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]


def mesh(daemon: Daemon, *arguments: str) -> tuple[int, str]:
    """`mesh ...` on the daemon's node: exit code, and what it said."""
    command = [sys.executable, "-m", "mesh", *arguments, "--state-dir", str(daemon.config["state_dir"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


_ports = itertools.count(10000, 12)  # below those that the kernel gives to other calls


def answers(cluster: Cluster) -> list[int]:
    """Of 12 calls of each node, how many are answered; all at once, because none may mean that each times out.

    From ports that nobody uses again: connection tracking remembers a refused call for ten seconds, with the listener
    that it was redirected to.
    """

    def of(node: Node, port: int) -> int:
        options = ("-n", "12", "-c", "12", "-T", "3", "-p", str(port))
        return peers.load(cluster.client, node.address, WEB, *options).ok

    with ThreadPoolExecutor(len(cluster.swarm.nodes)) as pool:
        return list(pool.map(of, cluster.swarm.nodes, _ports))


def all_say(cluster: Cluster, *texts: str, key: str = "critical") -> None:
    """Until every node shows a problem with these texts."""

    def said() -> bool:
        return all(any(all(t in p for t in texts) for p in d.state()[key]) for d in cluster.daemons)

    wait_for(said, f"every node says {texts}")


def test_a_wrong_rule_keeps_the_last_good_one_and_every_node_says_so(cluster: Cluster) -> None:
    swarm, client = cluster.swarm, cluster.client.address
    swarm.create("web", f"--label=mesh.allow={client}/24", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    with cluster.load() as loads:
        swarm.update("web", "--label-add", "mesh.allow=10.77.0.0/33")
        all_say(cluster, "label mesh.allow", "10.77.0.0/33", "stays in force")
        loads.wait_more(50)
        old = cluster.daemons[0].process  # the manager's; what was good survives it
        cluster.daemons[0].start("--take-over")
        assert old.wait(60) == 0
        all_say(cluster, "label mesh.allow", "stays in force")
        loads.wait_more(50)
        reports = loads.stop()
    assert failures(reports) == {}
    assert answers(cluster) == [12, 12, 12]
    wait_for(lambda: len(cluster.daemons[2].state()["traffic"]["reasons"]) == 1, "all paths are proven again")
    code, text = mesh(cluster.daemons[2], "status")  # a worker's
    assert code == 5 and "service web: a rule that was asked for is not in force: label mesh.allow" in text
    assert "Critical:\n  - service web, label mesh.allow: '10.77.0.0/33'" in text
    swarm.update("web", "--label-rm", "mesh.allow")
    wait_for(lambda: not any(d.state()["critical"] for d in cluster.daemons), "corrected")
    wait_for(lambda: mesh(cluster.daemons[2], "status")[0] == 0, "all is well")


@pytest.mark.parametrize("label", ["mesh.allow=10.77.0.0/33", "mesh.deny=10.77.0.0/33", "mesh.allow="])
def test_a_rule_that_was_never_good_lets_nobody_in_and_every_node_says_so(cluster: Cluster, label: str) -> None:
    swarm = cluster.swarm
    swarm.create("web", f"--label={label}", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    all_say(cluster, f"label {label.partition('=')[0]}", "nobody is let in")
    assert answers(cluster) == [0, 0, 0]
    assert all(daemon.state()["traffic"]["verdict"] == "failing" for daemon in cluster.daemons)
    swarm.update("web", "--label-rm", label.partition("=")[0])
    wait_for(lambda: answers(cluster) == [12, 12, 12], "let in again")


def test_workers_show_other_label_problems_too(cluster: Cluster) -> None:
    cluster.swarm.create("web", "--label=mesh.affinity=sticky", replicas=1, publish=[f"{WEB}:8080"])
    all_say(cluster, "label mesh.affinity", "'sticky'", key="problems")
    assert not any(daemon.state()["critical"] for daemon in cluster.daemons)


def weights_of(cluster: Cluster, on: str) -> list[bool]:
    """Of each node's agent, whether it gives new connections to any task on a node."""
    found = []
    for daemon in cluster.daemons:
        targets = [t for s in daemon.state()["services"] for f in s["frontends"] for t in f["targets"]]
        found.append(any(t["weight"] for t in targets if t["node"] == on))
    return found


def left(daemon: Daemon) -> dict[str, Any]:
    return dict(json.loads(daemon.get("/drains")[1]))


def test_a_drain_from_a_worker_holds_on_all_nodes_and_loses_nothing(cluster: Cluster) -> None:
    swarm = cluster.swarm
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 6)
    victim = swarm.nodes[1]
    identity = swarm.manager.inspect("node", victim.hostname)["ID"]
    there = {t["ID"] for t in swarm.tasks("web") if t["NodeID"] == identity}
    assert there and there != tasks
    names = [node.hostname for node in swarm.nodes]
    with cluster.load() as loads, cluster.load("-n", "0", "-c", "4", "-r", "1", "-u", "/slow?seconds=3") as long:
        loads.wait_more(100)
        code, text = mesh(cluster.daemons[2], "drain", "node", victim.hostname)
        assert code == 0 and f"{', '.join(sorted(names))}: follows" in text
        assert weights_of(cluster, identity) == [False, False, False]
        assert len(cluster.digests("web")) == 1
        reports = loads.stop(), long.stop()
    assert [failures(each) for each in reports] == [{}, {}]
    for node in swarm.nodes:
        report = peers.load(cluster.client, node.address, WEB, "-n", "100", "-c", "8")
        assert (report.ok, set(report.identities) & there) == (100, set())
    code, text = mesh(cluster.daemons[0], "drain", "node", victim.hostname, "--wait", "--timeout", "60")
    assert code == 0 and "0 connections left" in text, (text, left(cluster.daemons[0]))

    for daemon in cluster.daemons:  # all at once: nobody is left to tell it
        daemon.stop()
    for daemon in cluster.daemons:
        daemon.start(wait=False)
    cluster.wait_ready()
    assert weights_of(cluster, identity) == [False, False, False]
    assert "node drained" in mesh(cluster.daemons[0], "backends")[1]

    swarm.docker("node", "update", "--label-add", "mesh.weight=0", victim.hostname)
    wait_for(lambda: all(n["state"] == "follows" for n in left(cluster.daemons[2])["nodes"]), "all follow")
    wait_for(lambda: "node weight 0" in mesh(cluster.daemons[1], "undrain", "node", victim.hostname)[1], "weight 0")
    assert weights_of(cluster, identity) == [False, False, False]
    swarm.docker("node", "update", "--label-rm", "mesh.weight", victim.hostname)
    cluster.agree("web", 6)
    assert not any(daemon.state()["drained"]["nodes"] for daemon in cluster.daemons)


def test_who_was_away_does_not_bring_a_drain_back(cluster: Cluster) -> None:
    swarm = cluster.swarm
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    victim = swarm.nodes[1].hostname
    assert mesh(cluster.daemons[1], "drain", "node", victim)[0] == 0
    cluster.daemons[0].stop()  # the only manager's
    code, text = mesh(cluster.daemons[2], "undrain", "node", victim)
    assert code == 1 and "does not follow yet" in text
    cluster.daemons[0].start()
    cluster.agree("web", 3)
    assert not any(daemon.state()["drained"]["nodes"] for daemon in cluster.daemons)


def test_a_local_drain_holds_on_its_node_only_and_says_so(cluster: Cluster) -> None:
    swarm = cluster.swarm
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    victim = swarm.nodes[1]
    identity = swarm.manager.inspect("node", victim.hostname)["ID"]
    code, text = mesh(cluster.daemons[2], "drain", "node", victim.hostname, "--local")
    assert code == 0 and "on this node" in text
    wait_for(lambda: weights_of(cluster, identity) == [True, True, False], "this node only")
    assert f"node {victim.hostname} (on this node only)" in mesh(cluster.daemons[2], "status")[1]
    assert "node drained here" in mesh(cluster.daemons[2], "backends")[1]
    text = mesh(cluster.daemons[2], "undrain", "node", victim.hostname)[1]  # of all nodes, where it is not
    assert "node drained here" in text and "again" not in text
    assert mesh(cluster.daemons[2], "undrain", "node", victim.hostname, "--local")[0] == 0
    wait_for(lambda: weights_of(cluster, identity) == [True, True, True], "undrained")


def test_backends_are_shown_and_probed_where_they_run_from_any_node(cluster: Cluster) -> None:
    swarm, worker = cluster.swarm, cluster.daemons[2]
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    local = {t["backend"]: t["address"] for d in cluster.daemons for t in targets(d) if not t["via"]}

    def told() -> bool:
        return all({t["backend"]: t["own_address"] for t in targets(d)} == local for d in cluster.daemons)

    wait_for(told, "every node knows the own address of every task")
    away = next(t for t in targets(worker) if t["via"])
    (line,) = [line for line in mesh(worker, "backends", "web")[1].splitlines() if away["backend"][:12] in line]
    by = "tunnel" if cluster.engine == "kernel" else "peer port"
    assert f"{away['own_address']}:8080" in line and f"by {by} to {away['via']}" in line

    def probed() -> bool:
        return all(mesh(worker, "probe", task)[0] == 0 for task in local)

    wait_for(probed, "all answer, and the paths are proven")
    code, said = mesh(worker, "probe", away["name"])
    assert code == 0 and f"{away['own_address']}:8080 (tcp; published as *:{WEB}/tcp): answers" in said
    assert f"path from here: {'tunnel' if cluster.engine == 'kernel' else 'peer'}, proven" in said
    swarm.create("off", "--label=mesh.health=off", replicas=1, publish=[f"{WEB + 1}:9"])  # nobody listens at 9
    swarm.wait_running("off", 1)
    (task,) = swarm.tasks("off")
    wait_for(lambda: "connection refused" in mesh(worker, "probe", task["ID"])[1], "nobody listens there")
    assert mesh(worker, "probe", task["ID"])[0] == 1


def targets(daemon: Daemon) -> list[dict[str, Any]]:
    """Of the service `web`, as a node sees them."""
    return [t for s in daemon.state()["services"] if s["name"] == "web" for f in s["frontends"] for t in f["targets"]]


def test_every_node_calls_every_task_through_every_node(cluster: Cluster) -> None:
    swarm, worker = cluster.swarm, cluster.daemons[2]
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    cluster.agree("web", 3)
    wait_for(lambda: mesh(worker, "connectivity-test", "web")[0] == 0, "all calls are answered", interval=0.5)
    answer = json.loads(mesh(worker, "connectivity-test", "web", "--json")[1])
    rows = [(n["id"], row["through"], row["asked"], row["answered"]) for n in answer["nodes"] for row in n["rows"]]
    ids = [node["id"] for node in answer["nodes"]]
    assert sorted(rows) == sorted((one, other, 3, 3) for one in ids for other in ids)
    second, own = swarm.nodes[1], worker.namespace
    rule = f"type filter hook output priority 0; ip daddr {second.address} tcp dport {WEB} drop;"
    own.run("nft", "-f", "-", input=f"table inet shut {{\nchain out {{ {rule} }}\n}}")
    try:
        code, said = mesh(worker, "connectivity-test", "web")
    finally:
        own.run("nft", "delete", "table", "inet", "shut")
    assert code == 1
    assert f"{swarm.nodes[2].hostname} -> {second.hostname} *:{WEB}/tcp (web): timed out" in said
    (row,) = [line.split() for line in said.splitlines() if line.startswith(f"{swarm.nodes[2].hostname} ")][:1]
    assert sorted(row[1:]) == sorted(["3/3", "0/3", "FAILED", "3/3"])


@pytest.mark.parametrize("engine", ENGINES)
def test_docker_that_is_not_up_yet_is_waited_for(lab: Lab, engine: str) -> None:
    """Started before dockerd, as at boot: nothing is served until there is a swarm, and no demo ever."""
    node = Node(lab, lab.host("alone"))
    node.stop()
    node.socket.unlink(missing_ok=True)
    more = {"bpf_fs": bpf_fs(lab)} if engine == "kernel" else {}
    daemon = Daemon(
        node.namespace, Path(lab.directory) / "mesh", wait=False, engine=engine, docker_host=node.host,
        docker_data_root=node.data_root, docker_exec_root=node.exec_root, **more,
    )  # fmt: skip

    def reasons() -> str:
        try:
            return daemon.get("/readyz")[1]
        except OSError:
            return ""

    def fails() -> str:
        return "" if "demo" in reasons() else reasons()

    try:
        wait_for(lambda: "is dockerd running?" in fails(), "waits for the Engine")
        assert (daemon.state()["provider"]["kind"], daemon.state()["services"]) == ("swarm", [])
        assert "is dockerd running?" in mesh(daemon, "status")[1]
        node.start()
        wait_for(lambda: "docker swarm init" in fails(), "waits for a swarm")
        node.docker("swarm", "init", "--advertise-addr", node.address)
        daemon.wait_ready()
        assert daemon.state()["provider"]["connected"]
    finally:
        daemon.close()
