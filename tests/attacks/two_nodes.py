# SPDX-License-Identifier: Apache-2.0
"""Two nodes, a container without privileges on each, and what such a container can send to the other node.

attacker 172.31.0.11 --- a 10.99.0.1 ===== b 10.99.0.2 --- task 172.31.0.12, attacker 172.31.0.11
                         |
client 192.0.2.N --- switch

As with Docker, whatever leaves a container gets the address of its node (MASQUERADE).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from typing import Final

from mesh.datapath.base import BackendKey
from mesh.datapath.proxy.peers import tag_of
from tests.bpf.tunnel import identity, wrapped
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import TARGET, serve
from tests.support.frames import datagram as frame
from tests.support.frames import segment
from tests.support.lab.netns import Lab, Namespace, run, veth

TCP_PORT, UDP_PORT = 8000, 8002
TUNNEL, PEER = 6084, 9552
KEY, OTHER = (7, b"k" * 16), (7, b"x" * 16)  # number and secret: the swarm's key, and one that is not
NODES: Final = {"a": ("10.99.0.1", "2001:db8:99::1"), "b": ("10.99.0.2", "2001:db8:99::2")}
TASK: Final = "172.31.0.12"
ALLOWED: Final = "198.51.100.7"  # a client that the service admits
DENIED: Final = "203.0.113.66"
MASQUERADE: Final = """
table inet docker {
  chain postrouting { type nat hook postrouting priority srcnat; iifname "docker_gwbridge" oifname "wire" masquerade; }
}
"""


class TwoNodes:
    """The picture above, both nodes serving `task` at TCP_PORT and UDP_PORT to ALLOWED and nobody else."""

    def __init__(self, lab: Lab, engine: str) -> None:
        self.lab, self.engine = lab, engine
        self.client, self.a, self.b = (lab.host(name) for name in ("client", "a", "b"))
        veth(self.a, "wire", self.b, "wire")
        for node in (self.a, self.b):
            four, six = NODES[node.short]
            node.add_address("wire", f"{four}/24", f"{six}/64")
            node.bridge("docker_gwbridge", "172.31.0.1/24", "2001:db8:1::1/64")
            for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
                node.run("sysctl", "-qw", f"{key}=1")
            node.run("nft", "-f", "-", input=MASQUERADE)
        self.attackers = {node.short: self.container(f"evil-{node.short}", node, 11) for node in (self.a, self.b)}
        self.task = self.container("task", self.b, 12)
        serve(self.task, "task", TARGET)
        self.bpffs = lab.directory / "bpf"
        self.bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(self.bpffs))
        lab.on_close(lambda: run("umount", "-l", str(self.bpffs), check=False))
        self.drivers = {node.short: self.start(node) for node in (self.a, self.b)}
        self.rules()

    def container(self, name: str, node: Namespace, number: int) -> Namespace:
        """A container on docker_gwbridge."""
        made = self.lab.namespace(name)
        veth(node, f"veth{number}", made, "eth0")
        node.ip("link", "set", f"veth{number}", "master", "docker_gwbridge")
        made.add_address("eth0", f"172.31.0.{number}/24", f"2001:db8:1::{number}/64")
        made.ip("route", "add", "default", "via", "172.31.0.1")
        made.ip("-6", "route", "add", "default", "via", "2001:db8:1::1")
        return made

    def start(self, node: Namespace) -> Driver:
        state = self.lab.directory / node.short
        config = {"engine": self.engine, "bpf_fs": self.bpffs, "state_dir": state, "drain_timeout": 1.0}
        driver = Driver(node, (), provider="static", **config)
        self.lab.on_close(lambda: driver.process.poll() is None and driver.kill())
        driver.open()
        return driver

    def rules(self, **options: list[str]) -> None:
        """Serve with these source rules; without any, ALLOWED only."""
        options = options or {"allow": [f"{ALLOWED}/32"]}
        nodes = [address for addresses in NODES.values() for address in addresses]
        for name, driver in self.drivers.items():
            where = TASK if name == "b" else NODES["b"][0]
            services = [
                {
                    "name": f"s{port}",
                    "published": port,
                    "protocol": protocol,
                    "backends": {"task": [where, TARGET, 1]},
                    "options": options,
                    "engine": self.engine,
                }
                for port, protocol in ((TCP_PORT, "tcp"), (UDP_PORT, "udp"))
            ]
            driver.serve(services=services, nodes=nodes)

    def dropped(self, node: Namespace) -> int:
        """Packets of containers of a node that were kept from other nodes so far."""
        if self.engine == "kernel":
            return int(self.drivers[node.short].stats()["verdicts"].get("container", 0))
        found = json.loads(node.run("nft", "-j", "list", "counters").stdout)["nftables"]
        return sum(entry["counter"]["packets"] for entry in found if "counter" in entry)

    def verdict(self, node: Namespace, name: str) -> int:
        """Of the kernel engine."""
        return int(self.drivers[node.short].stats()["verdicts"].get(name, 0))

    def total(self, node: Namespace, name: str) -> int:
        """A counter of the proxy engine, or of the kernel engine's fallback proxy."""
        return int(self.drivers[node.short].stats()["totals"].get(name, 0))


def header(source: str = ALLOWED, target: str = "task") -> bytes:
    """What opens a connection at the peer port (docs/PROXY.md): PROXY protocol v2 with the task's name."""
    tag = tag_of(BackendKey(target, TARGET, 6))
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address("192.0.2.12").packed
    body = addresses + (40000).to_bytes(2, "big") + TCP_PORT.to_bytes(2, "big") + b"\xe0\0\x0b" + tag + b"\0"
    return b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11" + len(body).to_bytes(2, "big") + body


def head(source: str = ALLOWED) -> bytes:
    """What a datagram at the peer port begins with."""
    mapped = bytes(10) + b"\xff\xff"
    addresses = b"".join(mapped + ipaddress.ip_address(a).packed for a in (source, "192.0.2.12"))
    ports = (40000).to_bytes(2, "big") + UDP_PORT.to_bytes(2, "big")
    return b"MUD1" + tag_of(BackendKey("task", TARGET, 17)) + bytes(2) + addresses + ports


def through_tunnel(source: str = ALLOWED) -> bytes:
    """A client's datagram for the task as the tunnel carries it: Geneve with the task's name."""
    seed = tag_of(BackendKey("task", TARGET, 17))[:8]
    inner = frame(source, 40000, "192.0.2.12", UDP_PORT, b"attack")
    return wrapped(bytes(inner), "192.0.2.1", "192.0.2.2", identity(TARGET, 17, seed))[42:]


def syn_through_tunnel(source: str = ALLOWED) -> bytes:
    """Likewise the beginning of a connection."""
    seed = tag_of(BackendKey("task", TARGET, 6))[:8]
    inner = segment(source, 40000, "192.0.2.12", TCP_PORT)
    return wrapped(bytes(inner), "192.0.2.1", "192.0.2.2", identity(TARGET, 6, seed))[42:]


def ask_peer(caller: Namespace, node: str, data: bytes, *, patience: float = 1.5) -> bytes:
    """What the peer port of a node says to a connection that begins so; b"": nobody answered."""
    family = socket.AF_INET6 if ":" in node else socket.AF_INET
    with contextlib.suppress(OSError), caller.entered(), socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience)
        sock.connect((node, PEER))
        sock.sendall(data)
        return sock.recv(1)
    return b""


def send(caller: Namespace, node: str, port: int, data: bytes, *, patience: float = 0.0) -> bytes:
    """A datagram; what comes back within `patience` seconds."""
    family = socket.AF_INET6 if ":" in node else socket.AF_INET
    with caller.entered(), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, (node, port))
        if not patience:
            return b""
        sock.settimeout(patience)
        with contextlib.suppress(OSError):
            return sock.recv(1000)
    return b""
