# SPDX-License-Identifier: Apache-2.0
"""Three nodes of a real swarm, called from networks as people have them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.callers import Sender
from tests.support.cluster import WEB, Cluster, failures
from tests.support.fragments import ORDERS, caller, queued
from tests.support.lab import images
from tests.support.lab.dockerd import Node, bpf_fs
from tests.support.lab.nat import Router
from tests.support.lab.netns import Namespace, run
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]

KEPT, DIRECT = 5000, 100  # connections by way of HAProxy; from the same ports to each node
NEVER = "10000000"  # milliseconds
PORTS = "40000 43999"  # of HAProxy: fewer than KEPT, so many are used for two nodes and three
HAPROXY = """
global
  nbthread 1
  maxconn 6000
defaults
  mode tcp
  balance roundrobin
  retries 0
  timeout connect 20s
  timeout client 300s
  timeout server 300s
listen nodes
  bind :8080
"""
DEMANDS = """
global
  maxconn 500
defaults
  mode http
  timeout client 30s
frontend web
  bind :8080 accept-proxy
  http-request return status 200 content-type application/json lf-string '{"task": "%[src] %[src_port]"}'
"""
UDP = 5353
PROMISED, SLACK = {"udp": 5.0, "losses": 2.0}, 8.0  # seconds; a busy machine takes longer


@contextlib.contextmanager
def haproxy(router: Router, cluster: Cluster, name: str) -> Iterator[Namespace]:
    """Behind the router, in front of all nodes."""
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed")
    host, config = router.client(name), Path(cluster.swarm.lab.directory) / f"{name}.cfg"
    servers = "".join(f"  server {node.hostname} {node.address}:{WEB}\n" for node in cluster.swarm.nodes)
    config.write_text(HAPROXY + servers)
    host.run("sysctl", "-qw", f"net.ipv4.ip_local_port_range={PORTS}")
    process = host.popen("haproxy", "-db", "-f", str(config))
    try:
        wait_for(lambda: ":8080 " in host.run("ss", "-Hltn").stdout, "haproxy")
        yield host
    finally:
        process.terminate()
        process.wait()


def counted(cluster: Cluster, verdict: str) -> float:
    return sum(daemon.total("mesh_verdicts_total", verdict=verdict) for daemon in cluster.daemons)


def failed(cluster: Cluster) -> float:
    return sum(daemon.total("mesh_connections_failed_total") for daemon in cluster.daemons)


def test_kept_connections_of_a_load_balancer_behind_nat(cluster: Cluster) -> None:
    """Its ports are the same for all nodes, and the router keeps them: to three tasks many flows look like another."""
    engine = cluster.engine
    cluster.swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 3)
    before, refused = counted(cluster, "translated"), failed(cluster)
    router = Router(cluster.swarm.lab, f"router-{engine}")
    inner = router.client(f"inner-{engine}")
    with contextlib.ExitStack() as stack:
        balancer = stack.enter_context(haproxy(router, cluster, f"balancer-{engine}"))
        options = ("-k", NEVER, "-e", "-r", "2500")
        loads = [stack.enter_context(peers.Load(inner, balancer.address, 8080, "-c", str(KEPT), *options))]
        for node in cluster.swarm.nodes:
            same = ("-c", str(DIRECT), "-p", "20000", *options)
            loads.append(stack.enter_context(peers.Load(inner, node.address, WEB, *same)))
        for load in loads:
            load.wait_ready()
        translated = counted(cluster, "translated") - before
        reports = [load.stop() for load in loads]
    for report, count in zip(reports, (KEPT, DIRECT, DIRECT, DIRECT), strict=True):
        assert (report.ok, report.requests, report.failures) == (count, 2 * count, ())
        assert set(report.identities) == tasks
    assert failed(cluster) == refused
    if engine == "kernel":
        assert translated > KEPT // 20
        assert counted(cluster, "collision") == 0


@contextlib.contextmanager
def client_at(cluster: Cluster, address: str) -> Iterator[None]:
    """The client has this address too, and the nodes know the way to it."""
    client, nodes = cluster.client, [node.namespace for node in cluster.swarm.nodes]
    client.ip("addr", "add", f"{address}/32", "dev", "eth0")
    for node in nodes:
        node.ip("route", "add", f"{address}/32", "via", client.address)
    try:
        yield
    finally:
        client.ip("addr", "del", f"{address}/32", "dev", "eth0")
        for node in nodes:
            node.ip("route", "del", f"{address}/32", "via", client.address)


def peer_of(client: Namespace, source: str, address: str) -> str:
    """Whom a task takes for its client, who calls from `source`."""
    with client.entered():
        connection = http.client.HTTPConnection(address, WEB, timeout=PATIENCE, source_address=(source, 0))
        connection.connect()
    connection.request("GET", "/")
    peer = str(json.loads(connection.getresponse().read())["peer"])
    connection.close()
    return peer.rpartition(":")[0]


def test_clients_with_addresses_of_the_swarms_own_networks(cluster: Cluster) -> None:
    """Behind a router, in a network that happens to have the addresses of ingress, or of docker_gwbridge."""
    swarm, client = cluster.swarm, cluster.client
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080", f"{UDP}:8082/udp"])
    tasks = cluster.agree("web", 3)
    networks = [swarm.manager.inspect("network", name) for name in ("ingress", "docker_gwbridge")]
    for network in networks:
        source = str(ip_network(network["IPAM"]["Config"][0]["Subnet"])[222])
        with client_at(cluster, source):
            for node in swarm.nodes:
                report = peers.load(client, node.address, WEB, "-n", "60", "-c", "8", "-b", source)
                assert (report.ok, report.failures, set(report.identities)) == (60, (), tasks)
                assert peer_of(client, source, node.address) != source
                with client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.settimeout(PATIENCE)
                    sock.bind((source, 0))
                    sock.sendto(b"hello", (node.address, UDP))
                    assert sock.recv(100).decode().split()[0] in tasks


def test_datagrams_in_fragments_that_come_in_any_order(cluster: Cluster) -> None:
    """For tasks of the node that is called and of others, over both IP versions; 400 of 400 are answered."""
    swarm, client = cluster.swarm, cluster.client
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080", f"{UDP}:8082/udp"])
    tasks = cluster.agree("web", 3)
    for order in ORDERS.values():
        for node in swarm.nodes:
            answered = set()
            for source, called in ((client.address, node.address), (client.address6, node.namespace.address6)):
                for port in range(24000, 24020):
                    with caller(client, source, (called, UDP), port) as sender:
                        for number in range(10):
                            data = os.urandom(3000 + number)
                            sender.send(data, order)
                            task, _, answer = sender.sock.recv(65536).partition(b" ")
                            assert answer == data
                            answered.add(task.decode())
            assert answered == tasks
            wait_for(lambda node=node: queued(node.namespace) == {"4": 0, "6": 0}, "nothing waits for fragments")


def states(cluster: Cluster, port: int) -> list[dict[str, tuple[int, str]]]:
    """Weight and health of each task at a published port, as each node sees them."""
    found = []
    for daemon in cluster.daemons:
        fronts = [f for s in daemon.state()["services"] for f in s["frontends"] if f["frontend"] == f"*:{port}/tcp"]
        found.append({t["backend"]: (t["weight"], t["health"]) for f in fronts for t in f["targets"]})
    return found


def test_a_server_that_demands_the_proxy_protocol(cluster: Cluster) -> None:
    """HAProxy refuses what has no header: every flow of every client has it, by every way, and so have probes."""
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed")
    swarm, client = cluster.swarm, cluster.client
    command = json.dumps([shutil.which("haproxy"), "-db", "-f", "/etc/web.cfg"])
    image = images.of_binaries("mesh-lab/haproxy:demands", ["haproxy"], command, {"/etc/web.cfg": DEMANDS})
    for node in swarm.nodes:
        node.load(image)
    labels = {"mesh.proxy-protocol": "v2", "mesh.health": "http:/", "mesh.health.interval": "300ms"}
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"], labels=labels, image=image.tag)
    tasks = cluster.agree("web", 3)
    wait_for(lambda: states(cluster, WEB) == [dict.fromkeys(tasks, (1, "up"))] * 3, "all tasks are up")
    for number, node in enumerate(swarm.nodes):
        for source, address in ((client.address, node.address), (client.address6, node.namespace.address6)):
            ports = ("-p", str(21000 + 100 * number), "-b", source, "-v")
            report = peers.load(client, address, WEB, "-n", "40", "-c", "8", *ports)
            assert (report.ok, report.failures) == (40, ())
            assert all(seen.split() == [source, str(port)] for port, seen in report.seen), report.seen
        own = peers.load(node.namespace, "127.0.0.1", WEB, "-n", "12", "-c", "4")
        assert (own.ok, own.failures) == (12, ())
    assert states(cluster, WEB) == [dict.fromkeys(tasks, (1, "up"))] * 3


def sabotage(cluster: Cluster, node: Node) -> None:
    """Somebody deletes or detaches what is ours in a node's kernel."""
    namespace = node.namespace
    if cluster.engine == "proxy":
        tables = json.loads(namespace.run("nft", "-j", "list", "tables").stdout)["nftables"]
        names = [entry["table"]["name"] for entry in tables if "table" in entry]
        (ours,) = (name for name in names if name.startswith("mesh_") and not name.endswith("_closed"))
        namespace.run("nft", "delete", "table", "inet", ours)
        return
    links = [pin for pin in bpf_fs(cluster.swarm.lab, node.hostname).rglob("*") if pin.parent.name == "links"]
    assert links
    for pin in links:
        run("bpftool", "link", "detach", "pinned", str(pin))


def losses(cluster: Cluster) -> list[float]:
    return [daemon.total("mesh_kernel_losses_total") for daemon in cluster.daemons]


def test_what_somebody_removes_from_the_kernel_is_back_on_every_node(cluster: Cluster) -> None:
    if cluster.engine == "kernel" and not shutil.which("bpftool"):
        pytest.skip("bpftool detaches links")
    swarm = cluster.swarm
    swarm.create("web", replicas=3, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 3)
    before, begun = losses(cluster), time.monotonic()
    for node in swarm.nodes:
        sabotage(cluster, node)
    wait_for(lambda: all(n > was for n, was in zip(losses(cluster), before, strict=True)), "noticed on every node")
    cluster.wait_ready()
    assert time.monotonic() - begun < PROMISED["losses"] + SLACK
    for number, node in enumerate(swarm.nodes):
        ports = ("-p", str(22000 + 100 * number))  # connection tracking remembers those that were refused
        report = peers.load(cluster.client, node.address, WEB, "-n", "60", "-c", "8", *ports)
        assert (report.ok, report.failures, set(report.identities)) == (60, (), tasks)


def answerers(senders: list[Sender]) -> set[str]:
    """Who has answered these last; "": nobody."""
    return {sender.last.decode().split(" ")[0] for sender in senders}


def test_senders_that_are_older_than_the_service(cluster: Cluster) -> None:
    """They never pause and keep their ports, which connection tracking remembers; twice."""
    swarm = cluster.swarm
    with contextlib.ExitStack() as stack:
        senders = [Sender(cluster.client, node.address, UDP, 23000 + n) for n, node in enumerate(swarm.nodes)]
        senders += [
            Sender(cluster.client, node.namespace.address6, UDP, 23010 + n) for n, node in enumerate(swarm.nodes)
        ]
        for sender in senders:
            stack.callback(sender.close)
        for turn in range(2):
            swarm.create("dns", replicas=2, publish=[f"{UDP}:8082/udp"])
            tasks = cluster.agree("dns", 2)
            begun = time.monotonic()
            for sender in senders:
                sender.last = b""
            wait_for(lambda tasks=tasks: answerers(senders) <= tasks, "answered through every node")
            assert time.monotonic() - begun < PROMISED["udp"] + SLACK
            if not turn:
                swarm.remove("dns")
                wait_for(lambda: not any(d.state()["services"] for d in cluster.daemons), "the port is released")


def test_a_port_that_opens_late_or_dies_gets_no_flows(cluster: Cluster) -> None:
    """The other port of the task is open all the time; a rolling update that starts new tasks first loses nothing."""
    swarm = cluster.swarm
    order = ("--update-order=start-first", "--update-delay=2500ms", "--update-monitor=100ms", "--update-parallelism=1")
    labels = {"mesh.health.interval": "200ms", "mesh.health.fall": "2"}
    ports = [f"{WEB}:8080", f"{WEB + 1}:8081"]
    swarm.create("web", *order, replicas=2, publish=ports, labels=labels)
    before = cluster.agree("web", 2)
    with cluster.load("-n", "0", "-c", "16", "-r", "50") as loads:
        loads.wait_more(50)
        swarm.update("web", "--env-add", "LATE=2")
        after = cluster.agree("web", 2)
        wait_for(lambda: states(cluster, WEB) == [dict.fromkeys(after, (1, "up"))] * 3, "the late ports are open")
        loads.wait_more(50)
        reports = loads.stop()
    assert not before & after
    assert failures(reports) == {}

    victim = close_port(cluster, after)
    left = after - {victim}
    wait_for(lambda: [takers(each) for each in states(cluster, WEB)] == [left] * 3, "the port is left out")
    assert [takers(each) for each in states(cluster, WEB + 1)] == [after] * 3
    for node in swarm.nodes:
        report = peers.load(cluster.client, node.address, WEB, "-n", "60", "-c", "8")
        assert (report.ok, report.failures, set(report.identities)) == (60, (), left)


def takers(states: dict[str, tuple[int, str]]) -> set[str]:
    return {task for task, (weight, _) in states.items() if weight}


def close_port(cluster: Cluster, tasks: set[str]) -> str:
    """A task's :8080 closes for good, and nothing else of it. Returns which."""
    for node in cluster.swarm.nodes:
        for container in cluster.swarm.containers("web", node):
            said: dict[str, Any] = node.inspect("container", container)
            task = str(said["Config"]["Labels"]["com.docker.swarm.task.id"])
            if task in tasks:
                inside = ("nsenter", f"--net=/proc/{said['State']['Pid']}/ns/net", "--")
                run(*inside, "ss", "-K", "-l", "-t", "sport = :8080")
                assert ":8080 " not in run(*inside, "ss", "-Hltn").stdout
                return task
    raise AssertionError(f"none of {tasks} has a container")
