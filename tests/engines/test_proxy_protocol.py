# SPDX-License-Identifier: Apache-2.0
"""A service that asks for the PROXY protocol has it before every flow, whatever engine, client and way, and a LOCAL
command before every probe; nothing is lost when it begins or ceases to ask."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.engines.topology import Spec, Topology
from tests.engines.tunnel_pair import A, B, Pair
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PUBLISHED, TARGET = 8021, 8086
# Answers NAME SOURCE PORT DESTINATION PORT, or NAME "none" to a flow without a header, and counts what it was told
# at LOG: "proxy", "local", "none" or "broken", a word a line.
SERVER = """
import ipaddress, socket, sys, threading
name, port, log = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "a", buffering=1)
SIGNATURE = b"\\r\\n\\r\\n\\x00\\r\\nQUIT\\n"
def read(c, n):
    data = b""
    while len(data) < n:
        more = c.recv(n - len(data))
        if not more:
            raise EOFError
        data += more
    return data
def served(c):
    try:
        if c.recv(1, socket.MSG_PEEK) != b"\\r":
            log.write("none\\n")
            c.sendall(f"{name} none\\n".encode())
            return
        head = read(c, 16)
        assert head[:12] == SIGNATURE
        body = read(c, int.from_bytes(head[14:], "big"))
        if head[12] == 0x20:
            log.write("local\\n")
            return
        size = {0x11: 4, 0x21: 16}[head[13]]
        source, destination = (ipaddress.ip_address(body[i:i + size]) for i in (0, size))
        ports = [int.from_bytes(body[2 * size + i:2 * size + i + 2], "big") for i in (0, 2)]
        log.write("proxy\\n")
        c.sendall(f"{name} {source} {ports[0]} {destination} {ports[1]}\\n".encode())
        while data := c.recv(65536):
            c.sendall(data)
    except EOFError:
        log.write("broken\\n")
    except OSError:
        pass
    finally:
        c.close()
s = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
while True:
    threading.Thread(target=served, args=(s.accept()[0],), daemon=True).start()
"""
DEMANDS = {"proxy-protocol": "v2", "health": "tcp", "health-interval": "100ms"}


class Server:
    """The server in a namespace."""

    def __init__(self, lab: Lab, namespace: Namespace, name: str) -> None:
        self.log = lab.directory / f"{name}-proxy.log"
        command = (sys.executable, "-I", "-S", "-c", SERVER, name, str(TARGET), str(self.log))
        self.process: subprocess.Popen[Any] = namespace.popen(*command)
        lab.on_close(self.process.kill)
        wait_for(lambda: f":{TARGET} " in namespace.run("ss", "-Htln").stdout, f"server {name}")

    def heard(self) -> set[str]:
        return set(self.log.read_text().split())


def connect(namespace: Namespace, host: str) -> socket.socket:
    with namespace.entered():
        return socket.create_connection((host, PUBLISHED), timeout=PATIENCE)


def ask(sock: socket.socket) -> list[str]:
    """The server's name, and what it was told."""
    sock.sendall(b"x")
    text = b""
    while not text.endswith(b"\n"):
        if not (data := sock.recv(1)):
            raise ConnectionError("closed without an answer")
        text += data
    return text.decode().split()


def announced(namespace: Namespace, host: str) -> str:
    """Who answers a call, whose header is checked."""
    with connect(namespace, host) as sock:
        source, source_port = sock.getsockname()[:2]
        name, *told = ask(sock)
    assert told == [source, str(source_port), host, str(PUBLISHED)]
    return name


@pytest.fixture
def served(make_topology: Callable[..., Topology]) -> tuple[Topology, dict[str, Server]]:
    topology = make_topology(backends=2)
    servers = {name: Server(topology.lab, host.namespace, name) for name, host in topology.hosts.items()}
    return topology, servers


def spec(**options: str) -> Spec:
    return Spec("web", (f"{PUBLISHED}:{TARGET}/tcp",), ("b1", "b2"), options=options)


def test_every_flow_and_every_probe_has_it(served: tuple[Topology, dict[str, Server]]) -> None:
    topology, servers = served
    daemon = topology.serve(spec(**DEMANDS))
    node, other = topology.node, topology.lab.host("other")
    wait_for(lambda: all(s.heard() == {"local"} for s in servers.values()), "probed with LOCAL only")
    for client, hosts in (
        (topology.client, (node.address, node.address6)),
        (other, (node.address, node.address6)),
        (node, ("127.0.0.1", "::1", node.address, node.address6)),  # the node's own processes
        (topology.hosts["b1"].namespace, ("172.31.0.1", "2001:db8:1::1", node.address)),  # containers on it
    ):
        for host in hosts:
            assert {announced(client, host) for _ in range(20)} == {"b1", "b2"}, (client.short, host)
    assert all(server.heard() == {"local", "proxy"} for server in servers.values())
    with connect(topology.client, node.address) as sock:
        source, port = sock.getsockname()
        asked = f"/explain?source={source}:{port}&destination={node.address}:{PUBLISHED}&protocol=tcp"
        assert json.loads(daemon.get(asked)[1])["backend"]["name"] == ask(sock)[0]
    state = daemon.state()
    assert state["problems"] == []
    (front,) = state["services"][0]["frontends"]
    assert all(target["slots"] and target["health"] == "up" for target in front["targets"])


def test_nothing_is_lost_when_a_service_begins_and_ceases_to_ask(served: tuple[Topology, dict[str, Server]]) -> None:
    topology, servers = served
    topology.serve(spec(health="off"))
    kept: list[tuple[socket.socket, str]] = []
    failed: list[str] = []
    words: list[str] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            try:
                with connect(topology.client, topology.node.address) as sock:
                    words.append("none" if ask(sock)[1:] == ["none"] else "proxy")
            except OSError as error:
                failed.append(repr(error))

    callers = [threading.Thread(target=load) for _ in range(4)]
    for thread in callers:
        thread.start()
    try:
        wanted = "none"
        for options in ({"proxy-protocol": "v2"}, {}, {"proxy-protocol": "v2"}, {}):
            kept.append((connect(topology.client, topology.node.address), wanted))
            topology.change(spec(health="off", **options))
            before, wanted = len(words), "proxy" if options else "none"
            wait_for(lambda b=before, w=wanted: w in words[b:], f"calls with {wanted}")
            before = len(words)
            wait_for(lambda b=before: len(words) > b + 100, "more calls")
            assert set(words[before + 8 :]) == {wanted}  # after those that were under way
    finally:
        ended.set()
        for thread in callers:
            thread.join()
    assert failed == []
    for sock, then in kept:  # established connections stay as they are
        assert (ask(sock)[1:] == ["none"]) is (then == "none")
        sock.close()
    assert set().union(*(server.heard() for server in servers.values())) == {"proxy", "none"}


def test_a_task_on_another_node_is_told_as_well(lab: Lab) -> None:
    """From kernel engine to kernel engine: not through the tunnel, which has no place for a header."""
    pair = Pair(lab)
    servers = {name: Server(lab, task, name) for name, (task, _) in pair.tasks.items()}
    pair.ensure()
    for node, driver in pair.drivers.items():
        backends = {}
        for name, (task, at) in pair.tasks.items():
            where = task.address if at is node else A if at is pair.a else B
            backends[name] = [where, TARGET, 1]
        service = {"name": "web", "published": PUBLISHED, "backends": backends, "options": {"proxy_protocol": "v2"}}
        driver.serve(services=[service], nodes=[A, B])
    for client, host in ((pair.client, pair.a.address), (pair.client, pair.b.address), (pair.a, "127.0.0.1")):
        assert {announced(client, host) for _ in range(20)} == {"here", "there"}
    assert all(server.heard() == {"proxy"} for server in servers.values())
    pair.close()
