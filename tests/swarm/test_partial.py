# SPDX-License-Identifier: Apache-2.0
"""A swarm in which not every node has an agent, or not every path between nodes works: nothing is sent where it cannot
arrive, and whatever is not well is named."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import peers
from tests.support.cluster import ENGINES, WEB, Cluster, blocked, failures
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Node, Swarm
from tests.support.lab.netns import Lab, run
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]

CALLS = 5000
BUSY = ("-n", "0", "-c", "16", "-r", "250")  # so that hundreds of calls take no time
_number = itertools.count()


@pytest.fixture(scope="module")
def shared_bare_swarm() -> Iterator[Swarm]:
    """A manager and two workers, of this module alone: the agents of others would be in the way."""
    with Lab() as made:
        yield Swarm(made, 1, 2)


@pytest.fixture
def swarm(shared_bare_swarm: Swarm) -> Iterator[Swarm]:
    """The same for one test; services are removed after it."""
    yield shared_bare_swarm
    shared_bare_swarm.reset()


@pytest.fixture(params=ENGINES)
def alone(request: pytest.FixtureRequest, swarm: Swarm) -> Iterator[Cluster]:
    """Three nodes, with an agent on the manager only."""
    client = swarm.lab.host(f"client-alone-{next(_number)}")
    cluster = Cluster(swarm, client, engine=request.param, nodes=swarm.nodes[:1])
    cluster.wait_ready()
    yield cluster
    request.node.add_report_section("teardown", "daemons", cluster.tails())
    cluster.close()


def on(swarm: Swarm, *nodes: Node) -> set[str]:
    """Running tasks of `web` on these nodes."""
    ids = {node.hostname: node for node in nodes}
    names = {node["ID"]: node["Description"]["Hostname"] for node in swarm.api("GET", "/nodes")}
    return {task["ID"] for task in swarm.tasks("web") if names[task["NodeID"]] in ids}


def served_by(cluster: Cluster, daemon: Daemon, tasks: set[str]) -> None:
    """Until a node sends new connections to exactly these tasks."""
    wait_for(lambda: cluster.sees(daemon, "web") == tasks, f"new connections go to {sorted(tasks)}")


def called(cluster: Cluster, node: Node) -> set[str]:
    """Who answers to many new connections, of which none may fail."""
    report = peers.load(cluster.client, node.address, WEB, "-n", str(CALLS), "-c", "32")
    assert (report.ok, report.failures) == (CALLS, ())
    return set(report.identities)


def status(daemon: Daemon, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `mesh status`."""
    return told(daemon, "status", *arguments)


@pytest.fixture(params=ENGINES)
def workers(request: pytest.FixtureRequest, swarm: Swarm) -> Iterator[Cluster]:
    """Three nodes, with agents on the workers only; they are not ready."""
    client = swarm.lab.host(f"client-workers-{next(_number)}")
    cluster = Cluster(swarm, client, engine=request.param, nodes=swarm.nodes[1:])
    yield cluster
    request.node.add_report_section("teardown", "daemons", cluster.tails())
    cluster.close()


def told(daemon: Daemon, *words: str) -> tuple[int, str]:
    """Exit code and output of a command that asks a daemon."""
    command = [str(Path(sys.executable).with_name("mesh")), *words, f"--state-dir={daemon.config['state_dir']}"]
    done = run(*command, check=False)
    return done.returncode, done.stdout + done.stderr


def test_workers_whose_managers_have_no_agent_say_so(workers: Cluster) -> None:
    """What is not known is not called absent; the manager that is waited for is named, with what to do."""
    swarm, daemon = workers.swarm, workers.daemons[0]
    manager = f"manager {swarm.nodes[0].address}:9551"
    wait_for(lambda: manager in told(daemon, "status")[1], "it says whom it has called")
    waits = rf"nothing is known of services yet: {manager}: .*no agent runs there \(start mesh on the managers\)"
    code, text = told(daemon, "status")
    assert code == 1 and re.search(waits, text) and re.search(r"^traffic +not known yet$", text, re.MULTILINE)
    asked = ("explain", "192.0.2.9:4000", f"{swarm.nodes[1].address}:{WEB}")
    for words in (("services",), ("backends",), ("nodes",), ("connectivity-test",), ("drain", "node", "n1"), asked):
        code, text = told(daemon, *words)
        assert code and re.search(waits, text), (words, code, text)
    swarm.create("web", replicas=2, publish=[f"{WEB}:8080"])
    workers.daemons.insert(0, workers.daemon(swarm.nodes[0], workers.engine))
    workers.wait_ready()
    workers.agree("web", 2)
    for words in (("services",), ("nodes",)):
        assert told(daemon, *words)[0] == 0


def test_an_agent_alone_sends_nothing_where_no_agent_is(alone: Cluster) -> None:
    """README's five minutes: the agent runs on the manager only, and tasks run everywhere."""
    swarm, (daemon,) = alone.swarm, alone.daemons
    first, second, third = swarm.nodes
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    swarm.wait_running("web", 6)
    here = on(swarm, first)
    served_by(alone, daemon, here)
    assert called(alone, first) == here
    state = daemon.state()
    (reason,) = state["traffic"]["reasons"]
    assert state["traffic"]["verdict"] == "degraded" and reason.startswith("service web: 4 of its 6 tasks")
    for node in (second, third):
        assert node.hostname in reason
        (problem,) = (line for line in state["problems"] if f"node {node.hostname} " in line)
        assert "no path to it works" in problem and "is mesh running there" in problem
        assert daemon.total("mesh_path_up", node=node.hostname) == 0
        assert daemon.total("mesh_backends_masked", service="web", node=node.hostname) == 2
    code, text = status(daemon)
    assert code == 5 and "traffic    DEGRADED" in text and second.hostname in text
    answer, body = daemon.get("/readyz")
    assert answer == 200 and json.loads(body)["traffic"]["reasons"] == [reason]
    targets = [t for s in state["services"] for f in s["frontends"] for t in f["targets"] if t["weight"] == 0]
    assert {target["node_name"] for target in targets} == {second.hostname, third.hostname}
    assert all(target["taking"].startswith("no: masked here, no") for target in targets)


def test_agents_come_and_go_node_by_node_under_load(alone: Cluster) -> None:
    """Each takes its node's tasks into the tables of the others once the path to it is proven, and out again."""
    swarm, (first, second, third) = alone.swarm, alone.swarm.nodes
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    swarm.wait_running("web", 6)
    served_by(alone, alone.daemons[0], on(swarm, first))
    with alone.load(*BUSY, nodes=[first]) as loads:
        loads.wait_more(500)
        for count, node in ((2, second), (3, third)):
            alone.daemons.append(alone.daemon(node, alone.engine))
            alone.wait_ready()
            for daemon in alone.daemons:
                served_by(alone, daemon, on(swarm, *swarm.nodes[:count]))
            loads.wait_more(500)
        assert alone.agree("web", 6)
        wait_for(lambda: all(d.state()["traffic"]["verdict"] == "ok" for d in alone.daemons), "all is well")
        assert status(alone.daemons[0], "--wait", "60")[0] == 0
        swarm.docker("service", "scale", "--detach", "web=8")
        alone.agree("web", 8)
        loads.wait_more(500)
        assert failures(loads.stop()) == {}
    assert called(alone, first) == on(swarm, *swarm.nodes)


@pytest.mark.bpf
def test_where_the_tunnel_is_blocked_flows_go_by_the_peer_port_and_where_both_are_to_others(
    swarm: Swarm, request: pytest.FixtureRequest
) -> None:
    """A cloud's default firewall knows only Swarm's own ports."""
    client = swarm.lab.host(f"client-blocked-{next(_number)}")
    swarm.create("web", replicas=6, publish=[f"{WEB}:8080"])
    swarm.wait_running("web", 6)
    first = swarm.nodes[0]
    with contextlib.ExitStack() as stack:
        cluster: Cluster
        with blocked(swarm, "udp dport 6084"):
            cluster = stack.enter_context(contextlib.closing(Cluster(swarm, client, engine="kernel")))
            stack.callback(lambda: request.node.add_report_section("call", "daemons", cluster.tails()))
            cluster.wait_ready()
            tasks = cluster.agree("web", 6)
            assert called(cluster, first) == tasks
            assert paths(cluster.daemons[0]) == {"here", "peer"}

            def named() -> bool:
                down = [line for line in cluster.daemons[0].state()["problems"] if "tunnel UDP 6084" in line]
                return len(down) == 2 and all("let UDP 6084 through" in line for line in down)

            wait_for(named, "both tunnels are named")  # the peer port's datagrams too, until the agents share a key
            with cluster.load(*BUSY, nodes=[first]) as loads:
                loads.wait_more(300)
                with blocked(swarm, "tcp dport 9552", "udp dport 9552", table="more"):
                    served_by(cluster, cluster.daemons[0], on(swarm, first))
                    assert called(cluster, first) == on(swarm, first)
                    assert status(cluster.daemons[0])[0] == 5
                served_by(cluster, cluster.daemons[0], tasks)
                assert failures(loads.stop()) == {}
        wait_for(lambda: paths(cluster.daemons[0]) == {"here", "tunnel"}, "the tunnel is used again")
        cluster.agree("web", 6)
        assert called(cluster, first) == tasks
        assert len(cluster.digests("web")) == 1
        wait_for(lambda: status(cluster.daemons[0], "--cluster")[0] == 0, "each node says that it is well")
        second, third = (node.hostname for node in swarm.nodes[1:])
        with blocked(swarm, *between(*swarm.nodes[1:])):  # which nobody else notices

            def told() -> bool:
                code, text = status(cluster.daemons[0], "--cluster")
                halves = f"node {second}, traffic degraded: service web: 2 of its 6", f"node {third}, traffic degraded"
                return code == 5 and "All nodes agree on" in text and all(half in text for half in halves)

            wait_for(told, "a third node names both")
            assert status(cluster.daemons[0])[0] == 0


def between(one: Node, other: Node) -> list[str]:
    """All paths between two nodes, as `blocked` takes them."""
    ports = ("udp dport 6084", "tcp dport 9552", "udp dport 9552")
    ends = ((one.address, other.address), (other.address, one.address))
    return [f"ip saddr {source} ip daddr {target} {port}" for source, target in ends for port in ports]


def paths(daemon: Daemon) -> set[str]:
    """By which a node gets to the tasks of `web`."""
    services = [s for s in daemon.state()["services"] if s["name"] == "web"]
    return {t["path"] for s in services for f in s["frontends"] for t in f["targets"] if t["weight"]}
