# SPDX-License-Identifier: Apache-2.0
"""A node with backends in namespaces, and who calls them: for tests of KernelDatapath by itself."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.engines.kernel_driver import Driver
from tests.support.lab.netns import Lab, Namespace, run, veth
from tests.support.polling import PATIENCE, wait_for

PORT, TARGET = 8000, 8080
SERVER = """
import socket, sys, threading
name, port = sys.argv[1], int(sys.argv[2])
def tcp(c, a):
    c.sendall(f"{name} {a[0]}\\n".encode())
    while data := c.recv(65536):
        c.sendall(data)
    c.close()
def udp(s):
    while True:
        data, a = s.recvfrom(65536)
        s.sendto(f"{name} {a[0]}".encode() if len(data) < 1000 else data, a)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.setsockopt(socket.IPPROTO_IP, 10, 5)  # no DF: IP_MTU_DISCOVER, IP_PMTUDISC_OMIT
u.bind(("0.0.0.0", port))
threading.Thread(target=udp, args=(u,), daemon=True).start()
s = socket.create_server(("0.0.0.0", port), backlog=1024)
while True:
    threading.Thread(target=tcp, args=s.accept(), daemon=True).start()
"""


class Connection:
    """A TCP connection that knows who answers it."""

    def __init__(self, namespace: Namespace, address: str, port: int = PORT, timeout: float = PATIENCE) -> None:
        with namespace.entered():
            self.socket = socket.create_connection((address, port), timeout=timeout)
        text = b""
        while not text.endswith(b"\n"):
            if not (byte := self.socket.recv(1)):
                raise ConnectionError(f"closed by {address} before it said who it is")
            text += byte
        self.backend, self.seen = text.decode().split()

    def echo(self, size: int = 1000) -> None:
        """Send and get back; raises when the connection is broken."""
        sent = os.urandom(size)
        self.socket.sendall(sent)
        got = b""
        while len(got) < size:
            data = self.socket.recv(65536)
            assert data, "closed by the other side"
            got += data
        assert got == sent

    def close(self) -> None:
        self.socket.close()


class Plane:
    """client --- node --- docker_gwbridge --- backends; drivers run on the node."""

    def __init__(self, lab: Lab, backends: int = 3) -> None:
        self.lab = lab
        self.client, self.node = lab.host("client"), lab.host("node")
        self.node.bridge("docker_gwbridge", "172.31.0.1/24")
        self.node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.namespaces: dict[str, Namespace] = {}
        for number in range(1, backends + 1):
            self.add(f"b{number}", number)
        self.bpffs, self.state = lab.directory / "bpf", lab.directory / "state"
        self.bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(self.bpffs))
        lab.on_close(lambda: run("umount", "-l", str(self.bpffs), check=False))

    def add(self, name: str, number: int) -> None:
        namespace = self.namespaces[name] = self.lab.namespace(name)
        veth(self.node, f"veth{number}", namespace, "eth0")
        self.node.ip("link", "set", f"veth{number}", "master", "docker_gwbridge")
        namespace.add_address("eth0", f"172.31.0.{10 + number}/24")
        namespace.ip("route", "add", "default", "via", "172.31.0.1")
        serve(namespace, name, TARGET)

    def driver(self, prefix: tuple[str, ...] = (), **config: object) -> Driver:
        options = {"bpf_fs": self.bpffs, "state_dir": self.state, "engine": "kernel", "drain_timeout": 1.0}
        driver = Driver(self.node, prefix, provider="static", **(options | config))
        self.lab.on_close(lambda: driver.process.poll() is None and driver.kill())
        return driver

    def web(self, *names: str, weights: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
        backends = {n: [self.namespaces[n].address, TARGET, (weights or {}).get(n, 1)] for n in names}
        return {"name": "web", "published": PORT, "backends": backends, **more}

    def calls(self, count: int, namespace: Namespace | None = None, address: str = "") -> Counter[str]:
        found: Counter[str] = Counter()
        for _ in range(count):
            connection = Connection(namespace or self.client, address or self.node.address)
            connection.echo()
            connection.close()
            found[connection.backend] += 1
        return found

    def pins(self) -> list[Path]:
        return [p for p in (self.bpffs / "mesh").rglob("*") if not p.is_dir()]


def serve(namespace: Namespace, name: str, port: int) -> subprocess.Popen[Any]:
    process: subprocess.Popen[Any] = namespace.popen(sys.executable, "-I", "-S", "-c", SERVER, name, str(port))
    wait_for(lambda: f":{port} " in namespace.run("ss", "-Htln").stdout, f"server {name}")
    return process


def datagram(namespace: Namespace, address: str, port: int = PORT) -> str:
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.sendto(b"hello", (address, port))
        data, peer = sock.recvfrom(1000)
        assert peer == (address, port)
        return data.decode()


def refused(namespace: Namespace, address: str) -> bool:
    """Whether nobody answers, within a second."""
    with contextlib.suppress(OSError):
        Connection(namespace, address, timeout=1).close()
        return False
    return True
