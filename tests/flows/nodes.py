# SPDX-License-Identifier: Apache-2.0
"""Three nodes with an engine each, places for tasks on them, and who calls.

client 192.0.2.N, also 10.0.1.77, 172.31.0.200, ... --- switch --- n1, n2, n3: docker_gwbridge 172.31.0.1/24
                                                          |              |--- places: 172.31.0.11 ...
inner1, inner2 10.88.N.2 --- router (few ports) ----------               also in 10.0.1.0/24, as in an overlay

A place is a namespace; the task in it is a process that knows its own name. Tasks of any service come to any place, so
that an address belongs to one service after the other.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from tests.engines.kernel_driver import Driver
from tests.support import peers
from tests.support.lab.nat import Router
from tests.support.lab.netns import Lab, Namespace, run, veth
from tests.support.polling import wait_for

PLACES, RESERVED, TARGET = 3, 2, 8080
GATEWAYS = ("172.31.0.1", "2001:db8:1::1")
OVERLAY = "10.0.1.0/24"
DENIED = "203.0.113.0/24"
FOREIGN = ("10.0.1.77", "172.31.0.200", "10.0.2.77", "203.0.113.66")
"""IPv4 addresses of the client that lie in networks of tasks, or are nobody's; the last is denied."""
FOREIGN6 = ("2001:db8:1::77", "2001:db8:2::77")
PORTS = (40000, 40)  # of clients: first, count
FEW = "40000-41999"  # of the router
MASQUERADE = """
table ip docker {
  chain postrouting {
    type nat hook postrouting priority srcnat;
    ip saddr 172.31.0.0/24 oifname != "docker_gwbridge" masquerade;
  }
}
"""
PROGRAM = "flows.c"


@dataclass(frozen=True)
class Service:
    """`family`: IP version of the tasks. `home`: the only node that has any, and serves it."""

    ports: tuple[tuple[int, str], ...]
    family: int = 4
    home: str = ""


SERVICES = {
    "web": Service(((8000, "tcp"), (8000, "udp"))),
    "api": Service(((8001, "tcp"), (8004, "tcp"))),  # two published ports of one target
    "dns": Service(((8003, "udp"),)),
    "six": Service(((8002, "tcp"), (8002, "udp")), family=6, home="n1"),  # other nodes' tasks have IPv4, as in a swarm
}


@dataclass
class Place:
    """Where a task can be."""

    node: Namespace
    namespace: Namespace
    networks: tuple[Any, ...]
    reserved: bool = False  # for tasks that must be on this node
    process: subprocess.Popen[Any] | None = None

    def address(self, family: int) -> str:
        return self.namespace.address if family == 4 else self.namespace.address6

    def start(self, name: str) -> None:
        """A task of this name, from when on it listens."""
        self.process = self.namespace.popen(program(), "serve", name, str(TARGET))
        wait_for(lambda: f":{TARGET} " in self.namespace.run("ss", "-Hltn").stdout, f"task {name}")

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        self.process = None


def program() -> str:
    return str(peers.program(peers.HERE / PROGRAM))


class Nodes:
    """The picture above; each node serves what `serve` was given last."""

    def __init__(self, lab: Lab, engine: str, return_path: str) -> None:
        self.lab, self.engine, self.return_path = lab, engine, return_path
        self.nodes = [lab.host(name) for name in ("n1", "n2", "n3")]
        self.client = lab.host("client")
        self.router = Router(lab, "router", f'meta l4proto {{ tcp, udp }} oifname "eth0" masquerade to :{FEW}')
        for key in ("udp_timeout", "udp_timeout_stream", "tcp_timeout_time_wait"):  # or it has no port for the next
            self.router.namespace.run("sysctl", "-qw", f"net.netfilter.nf_conntrack_{key}=3")
        self.callers = [self.client, self.router.client("inner1"), self.router.client("inner2")]
        self.places: list[Place] = []
        for node in self.nodes:
            node.bridge("docker_gwbridge", *(f"{g}/{64 if ':' in g else 24}" for g in GATEWAYS))
            for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
                node.run("sysctl", "-qw", f"{key}=1")
            node.run("nft", "-f", "-", input=MASQUERADE)
            homes = any(said.home == node.short for said in SERVICES.values())
            self.places += [self._place(node, number) for number in range(1, PLACES + RESERVED * homes + 1)]
        self._strange_addresses()
        self.bpffs = lab.directory / "bpf"
        self.bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(self.bpffs))
        lab.on_close(lambda: run("umount", "-l", str(self.bpffs), check=False))
        self.drivers = {node: self._driver(node) for node in self.nodes}
        self.served: list[dict[str, Any]] = []

    def _place(self, node: Namespace, number: int) -> Place:
        made = self.lab.namespace(f"{node.short}-{number}")
        veth(node, f"veth{number}", made, "eth0")
        node.ip("link", "set", f"veth{number}", "master", "docker_gwbridge")
        made.add_address("eth0", f"172.31.0.{10 + number}/24", f"2001:db8:1::{10 + number}/64")
        networks = ["172.31.0.0/24", "2001:db8:1::/64"]
        for option, gateway in zip(("-4", "-6"), GATEWAYS, strict=True):
            made.ip(option, "route", "add", "default", "via", gateway)
        if number == 1:
            made.ip("link", "add", "ov0", "type", "bridge")
            made.ip("addr", "add", f"10.0.1.{len(self.places) + 1}/24", "dev", "ov0")
            made.ip("link", "set", "ov0", "up")
            networks.append(OVERLAY)
        return Place(node, made, tuple(map(ip_network, networks)), number > PLACES)

    def _strange_addresses(self) -> None:
        for number in (1, 2):
            self.client.add_address("eth0", f"192.0.2.{200 + number}/24", f"2001:db8::{200 + number}/64")
        for address in (*FOREIGN, *FOREIGN6):
            whole = f"{address}/{128 if ':' in address else 32}"
            self.client.add_address("eth0", whole)
            gateway = self.client.address6 if ":" in address else self.client.address
            for node in self.nodes:
                node.ip("route", "add", whole, "via", gateway)
        for caller in self.callers:
            caller.run("sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")

    def _driver(self, node: Namespace) -> Driver:
        state = self.lab.directory / f"state-{node.short}"
        options = {"bpf_fs": self.bpffs, "state_dir": state, "drain_timeout": 1.0, "return_path": self.return_path}
        driver = Driver(node, (), provider="static", engine=self.engine, **options)
        self.lab.on_close(lambda: driver.process.poll() is None and driver.kill())
        driver.open()
        return driver

    def restart(self, node: Namespace) -> None:
        """The node's agent ends, and another one restores what it has left."""
        self.drivers[node].close(release=False)
        self.drivers[node].end()
        self.drivers[node] = self._driver(node)
        self.serve(node, self.served)

    def serve(self, node: Namespace, tasks: list[dict[str, Any]]) -> None:
        """Have a node serve these tasks: name, service, place, weight."""
        services: list[dict[str, Any]] = []
        for service, said in SERVICES.items():
            for port, protocol in said.ports if said.home in ("", node.short) else ():
                backends = {}
                for task in tasks:
                    if task["service"] == service:
                        place: Place = task["place"]
                        where = place.address(said.family) if place.node is node else place.node.address
                        backends[task["name"]] = [where, TARGET, task["weight"]]
                services.append(
                    {
                        "name": f"{service}-{port}-{protocol}",
                        "published": port,
                        "protocol": protocol,
                        "backends": backends,
                        "engine": self.engine,
                        "options": {"deny": [DENIED]},
                    }
                )
        known = [address for each in self.nodes for address in (each.address, each.address6)]
        self.drivers[node].serve(services=services, nodes=known)

    def what(self, caller: Namespace, datagram: int) -> str:
        """What a caller is told of sources and targets; `datagram`: the largest, bytes."""
        lines = [f"ports {PORTS[0]} {PORTS[1]}"]
        for address in caller.addresses:
            lines.append(f"source {address} {0.5 if ip_address(address) in ip_network(DENIED) else 0}")
        for node in self.nodes:
            for address in (node.address, node.address6):
                if ":" in address and caller is not self.client:
                    continue
                for service, said in SERVICES.items():
                    for port, protocol in said.ports if said.home in ("", node.short) else ():
                        largest = datagram if protocol == "udp" else 65536
                        lines.append(f"target {service} {protocol} {address} {port} {largest}")
        return "\n".join(lines) + "\n"

    def failures(self) -> dict[str, int]:
        """What the nodes have counted so far of flows that failed: by "SERVICE CAUSE"."""
        found: dict[str, int] = {}
        for driver in self.drivers.values():
            for service, causes in driver.failures().items():
                for cause, count in causes.items():
                    key = f"{service.partition('-')[0]} {cause}"
                    found[key] = found.get(key, 0) + count
        return found

    def verdicts(self) -> dict[str, int]:
        """Packets by what became of them, on all nodes; none with the proxy engine."""
        found: dict[str, int] = {}
        for driver in self.drivers.values():
            for name, count in driver.stats()["verdicts"].items():
                found[name] = found.get(name, 0) + count
        return found

    def close(self) -> None:
        for place in self.places:
            if place.process:
                place.kill()
        for driver in self.drivers.values():
            if driver.process.poll() is None:
                driver.close(release=True)
                driver.end()
