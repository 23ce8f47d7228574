# SPDX-License-Identifier: Apache-2.0
"""`mesh check --cluster` on three nodes of a real swarm: well, with ports blocked, with a smaller MTU on the way."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Node
from tests.support.lab.netns import Lab, run
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]

Findings = dict[str, dict[str, str]]


@pytest.fixture
def cluster(cluster: Cluster) -> Cluster:
    """Whose nodes know and reach each other."""
    for daemon in cluster.daemons:
        wait_for(lambda d=daemon: len(json.loads(d.get("/nodes")[1])["nodes"]) == 3, "all nodes are known")  # type: ignore[misc]
    wait_for(lambda: check(cluster.daemons[0])[0] == 0, "all ports are open", interval=0.5)
    return cluster


def check(daemon: Daemon, *flags: str, cluster: bool = True) -> tuple[int, Findings]:
    """Exit code and findings by what they are about."""
    config = [f"--{key.replace('_', '-')}={value}" for key, value in daemon.config.items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MESH_")}
    mesh = str(Path(sys.executable).with_name("mesh"))
    command = [mesh, "check", "--json", *(["--cluster"] if cluster else []), *config, *flags]
    done = daemon.namespace.run(*command, check=False, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {finding["what"]: finding for finding in json.loads(done.stdout)}


def bad(findings: Findings) -> dict[str, str]:
    return {what: finding["found"] for what, finding in findings.items() if finding["level"] != "ok"}


def check_until(
    daemon: Daemon, fits: Callable[[set[str]], object], *flags: str, cluster: bool = True
) -> tuple[int, Findings]:
    """The same, once what is not well fits: a busy machine may answer later than a check waits."""
    found: list[tuple[int, Findings]] = []

    def fit() -> object:
        found[:] = [check(daemon, *flags, cluster=cluster)]
        return fits(set(bad(found[0][1])))

    try:
        wait_for(fit, "a check that finds what it should")
    except TimeoutError as error:
        raise AssertionError(f"{error}, but: {bad(found[0][1])}") from None
    return found[0]


@contextlib.contextmanager
def rules(node: Node, rule: str) -> Iterator[None]:
    """A rule in the node's input chain."""
    table = f"table inet blocked {{\nchain in {{ type filter hook input priority -300; {rule} }}\n}}"
    run(*node.namespace.command("nft", "-f", "-"), input=table)
    try:
        yield
    finally:
        node.namespace.run("nft", "delete", "table", "inet", "blocked")


def test_all_is_well_from_every_node(cluster: Cluster) -> None:
    """Also from and to workers, which serve no inventory."""
    names = [node.hostname for node in cluster.swarm.nodes]
    facts = ["control port", "certificate", "mesh", "peer port tcp", "peer port udp", "path MTU"]
    if cluster.engine == "kernel":
        facts.append("tunnel")
    for daemon, name in zip(cluster.daemons, names, strict=True):
        code, findings = check_until(daemon, lambda bad: not bad)
        assert code == 0
        others = {f"{other} {fact}" for other in names if other != name for fact in facts}
        assert set(findings) == {"configuration", "nodes", "own certificate", "clock"} | others
        assert {findings[f"{other} path MTU"]["found"] for other in names if other != name} == {"1500 bytes"}
        role = "swarm-manager" if name == names[0] else "swarm-worker"
        assert role in findings["own certificate"]["found"]
        assert "may be 30 s off that of other nodes" in findings["clock"]["found"]
        assert all(cluster.engine in findings[f"{other} mesh"]["found"] for other in names if other != name)


def test_before_the_first_start_the_ports_of_other_nodes_are_tried(cluster: Cluster) -> None:
    """On a manager those of all nodes, on a worker those of the manager, whether an agent runs there or not."""
    nodes, victim = cluster.swarm.nodes, cluster.daemons[2]
    ports = ["control port tcp", "peer port tcp", "peer port udp"] + ["tunnel udp"] * (cluster.engine == "kernel")
    manager, third = cluster.daemons[0], nodes[2].hostname

    def answer(findings: Findings) -> bool:
        tried = [findings[f"{node.hostname} {port}"] for node in nodes[1:] for port in ports]
        return all(each["found"].endswith("open, mesh answers") for each in tried)

    wait_for(lambda: answer(check(manager, cluster=False)[1]), "every port answers")
    _, findings = check(cluster.daemons[1], cluster=False)
    where = f"manager {nodes[0].address}:2377"
    assert all(findings[f"{where} {port}"]["found"].endswith("open, mesh answers") for port in ports)
    if cluster.engine == "kernel":
        victim.release()
    else:
        victim.kill()
    try:
        shown: set[str] = set()

        def closed(findings: Findings) -> bool:
            shown.update(p for p in ports if "open, nobody listens there yet" in findings[f"{third} {p}"]["found"])
            return shown == set(ports)

        # A kernel sends few ICMP errors, and the trials of the agents that run get most of them: not all in one check.
        wait_for(lambda: closed(check(manager, cluster=False)[1]), "every port is found closed")
        with rules(nodes[2], "tcp dport 9552 drop; udp dport { 6084, 9552 } drop;"):
            code, findings = check(manager, cluster=False)
        assert code == 1
        found = {port: findings[f"{third} {port}"] for port in ports}
        assert "blocked, no answer" in found["peer port tcp"]["found"]
        assert "TCP 9552" in found["peer port tcp"]["remedy"]
        assert all("unknown" in found[port]["found"] for port in ports if port.endswith("udp"))
    finally:
        victim.start()  # whoever ends it next finds its control socket


@pytest.mark.later("kernel")  # the ports and the questions are the same
def test_what_is_blocked_is_named_with_the_remedy(cluster: Cluster) -> None:
    node = cluster.swarm.nodes[1]
    blocked = {f"{node.hostname} {what}" for what in ("control port", "peer port udp", "path MTU")}
    with rules(node, "tcp dport 9551 drop; udp dport 9552 drop;"):
        code, findings = check_until(cluster.daemons[0], lambda bad: bad == blocked)
    assert code == 1
    control, port = findings[f"{node.hostname} control port"], findings[f"{node.hostname} peer port udp"]
    assert "tcp 9551: no answer" in control["found"] and "TCP 9551" in control["remedy"]
    assert "udp 9552: no answer" in port["found"] and "UDP 9552" in port["remedy"]
    with rules(node, "tcp dport 9552 reject with tcp reset;"):
        code, findings = check_until(cluster.daemons[2], lambda bad: bad == {f"{node.hostname} peer port tcp"})
    assert code == 1
    assert "nobody listens" in findings[f"{node.hostname} peer port tcp"]["found"]


@pytest.mark.only("kernel")
def test_a_tunnel_that_is_blocked_is_named_with_the_remedy(cluster: Cluster) -> None:
    """Whichever way it is, also where the other ports are open; and a service that the tunnel hides."""
    node, lab = cluster.swarm.nodes[1], cluster.swarm.lab
    what = f"{node.hostname} tunnel"
    for match in ("ip daddr", "ip saddr"):
        rule = f"type filter hook forward priority 0; {match} {node.address} udp dport 6084 drop;"
        run(*lab.switch.command("nft", "-f", "-"), input=f"table bridge blocked {{\nchain f {{ {rule}\n}}\n}}")
        try:
            code, findings = check_until(cluster.daemons[0], lambda bad: bad == {what})
        finally:
            lab.switch.run("nft", "delete", "table", "bridge", "blocked")
        assert code == 1
        assert "udp 6084: no answer" in findings[what]["found"] and "UDP 6084" in findings[what]["remedy"]
    cluster.swarm.create("hidden", publish=["6084:8082/udp"])
    try:
        code, findings = check_until(cluster.daemons[0], lambda bad: "published ports" in bad, cluster=False)
        assert code == 1
        assert "UDP 6084 of service hidden is not served" in bad(findings)["published ports"]
    finally:
        cluster.swarm.remove("hidden")


@pytest.mark.later("kernel")
def test_a_black_hole_is_told_from_a_smaller_mtu(cluster: Cluster) -> None:
    """A switch drops what is too large and tells nobody; a router tells."""
    node, switch = cluster.swarm.nodes[2], cluster.swarm.lab.switch
    port = f"p{node.address.rpartition('.')[2]}"
    what = f"{node.hostname} path MTU"
    most = {what, f"{node.hostname} control port"}  # certificates may fill a packet
    switch.ip("link", "set", port, "mtu", "1400")
    try:
        code, findings = check_until(cluster.daemons[0], lambda bad: {what} <= bad <= most)
    finally:
        switch.ip("link", "set", port, "mtu", "1500")
    assert code == 1
    assert "1400 bytes; larger packets vanish" in findings[what]["found"] and "1400" in findings[what]["remedy"]


@pytest.mark.later("kernel")
def test_a_node_without_an_agent_and_a_command_without_a_daemon(cluster: Cluster, tmp_path: Path) -> None:
    victim, node = cluster.daemons[2], cluster.swarm.nodes[2]
    victim.kill()
    try:
        code, findings = check(cluster.daemons[1])
        assert code == 1
        assert "nobody listens" in findings[f"{node.hostname} control port"]["found"]
        assert "nobody listens" in findings[f"{node.hostname} peer port tcp"]["found"]
        assert "nobody listens" in findings[f"{node.hostname} peer port udp"]["found"]
    finally:
        victim.start()
    code, findings = check_until(cluster.daemons[0], lambda bad: bad == {"nodes"}, f"--state-dir={tmp_path}")
    assert code == 1
    assert "mesh run" in findings["nodes"]["remedy"]


def test_a_node_that_knows_no_other_yet_looks_at_its_own_certificate(tmp_path: Path) -> None:
    with Lab() as lab:
        engine = f"unix://{tmp_path}/none.sock"
        alone = {"provider": "swarm", "engine": "proxy", "docker_host": engine, "docker_data_root": tmp_path}
        daemon = Daemon(lab.host("alone"), tmp_path / "mesh", wait=False, **alone)
        try:
            wait_for((tmp_path / "mesh" / "state" / "mesh.sock").exists, "the daemon")
            code, findings = check(daemon)
        finally:
            daemon.kill()
    assert code == 1
    assert findings["nodes"]["found"] == "it has not been told of any node yet"
    assert "swarm-node.crt: cannot be read" in findings["own certificate"]["found"]
