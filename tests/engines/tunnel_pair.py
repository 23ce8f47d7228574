# SPDX-License-Identifier: Apache-2.0
"""Two nodes with the kernel engine: flows for the other's tasks go through the tunnel.

client 192.0.2.11 --- switch --- a 192.0.2.12 --- here 172.31.0.11
                             |    | 10.99.0.1
                             |    | 10.99.0.2: the link of this network has the MTU of the test
                             --- b 192.0.2.13 --- there 172.31.0.11, also 172.31.0.12
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, serve
from tests.support.lab.netns import Lab, Namespace, run, veth
from tests.support.peers import Stream, StreamServer
from tests.support.polling import wait_for

STREAM, STREAM_TARGET, UDP = 8001, 8081, 8002
MEGABYTE = 1_000_000
A, B = "10.99.0.1", "10.99.0.2"
NODES = (A, B)
_tags = (f"t{n}" for n in itertools.count())


def by_veth(a: Namespace, b: Namespace) -> None:
    """Join two nodes by devices `wire`."""
    veth(a, "wire", b, "wire")
    a.add_address("wire", f"{A}/24")
    b.add_address("wire", f"{B}/24")


class Pair:
    """The picture above; the engines are started by `start`."""

    def __init__(self, lab: Lab, join: Callable[[Namespace, Namespace], None] = by_veth, **config: object) -> None:
        self.lab, self.config = lab, config
        self.client, self.a, self.b = (lab.host(name) for name in ("client", "a", "b"))
        join(self.a, self.b)
        for node in (self.a, self.b):
            node.bridge("docker_gwbridge", "172.31.0.1/24")
            node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.streams: dict[str, StreamServer] = {}
        self.tasks = {"here": self.task("here", self.a, 1), "there": self.task("there", self.b, 1)}
        self.bpffs = lab.directory / "bpf"
        self.bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(self.bpffs))
        lab.on_close(lambda: run("umount", "-l", str(self.bpffs), check=False))
        self.drivers: dict[Namespace, Driver] = {}
        self.back: dict[Namespace, str] = {}

    def task(self, name: str, node: Namespace, number: int) -> tuple[Namespace, Namespace]:
        """A task and its node."""
        task = self.lab.namespace(name)
        veth(node, f"veth{number}", task, "eth0")
        node.ip("link", "set", f"veth{number}", "master", "docker_gwbridge")
        task.add_address("eth0", f"172.31.0.{10 + number}/24")
        task.ip("route", "add", "default", "via", "172.31.0.1")
        serve(task, name, TARGET)
        self.streams[name] = StreamServer(task, STREAM_TARGET, self.lab.directory / f"{name}-streams.log")
        wait_for(lambda: f":{STREAM_TARGET} " in task.run("ss", "-Hltn").stdout, f"streams of {name}")
        return task, node

    def start(self, node: Namespace, return_path: str = "tunnel") -> Driver:
        """An engine on a node; what an earlier one there has left is adopted."""
        options = {"bpf_fs": self.bpffs, "state_dir": self.lab.directory / node.short, "return_path": return_path}
        options |= self.config
        driver = Driver(node, engine="kernel", provider="static", drain_timeout=1.0, **options)  # type: ignore[arg-type]
        self.drivers[node], self.back[node] = driver, return_path
        self.lab.on_close(lambda: driver.process.poll() is None and driver.kill())
        driver.open()
        return driver

    def ensure(self, back: str = "tunnel") -> None:
        """Both engines run, with this `return_path`."""
        for node in (self.a, self.b):
            driver = self.drivers.get(node)
            if driver is not None and driver.process.poll() is None and self.back[node] == back:
                continue
            if driver is not None and driver.process.poll() is None:
                driver.close(release=False)
                driver.end()
            self.start(node, return_path=back)

    def set_mtu(self, mtu: int) -> None:
        for node in (self.a, self.b):
            node.ip("link", "set", "wire", "mtu", str(mtu))

    def wait_ways(self, mtu: int) -> None:
        """Until both engines know how large packets may be between the nodes."""
        ways = {self.a: {B: mtu}, self.b: {A: mtu}}
        for node, driver in self.drivers.items():
            wait_for(lambda node=node, driver=driver: driver.ways() == ways[node], f"MTU {mtu} seen")

    def serve(self, *names: str, drained: tuple[str, ...] = (), nodes: tuple[str, ...] = NODES) -> None:
        """These tasks, on both nodes."""
        for node, driver in self.drivers.items():
            services: list[dict[str, Any]] = []
            for port, target, protocol in ((PORT, TARGET, "tcp"), (STREAM, STREAM_TARGET, "tcp"), (UDP, TARGET, "udp")):
                backends = {}
                for name in names:
                    task, at = self.tasks[name]
                    where = task.address if at is node else A if at is self.a else B
                    backends[name] = [where, target, int(name not in drained)]
                services.append({"name": f"s{port}", "published": port, "protocol": protocol, "backends": backends})
            driver.serve(services=services, nodes=list(nodes))

    def stream(self, *options: str) -> tuple[Stream, str]:
        tag = next(_tags)
        return Stream(self.client, self.a.address, STREAM, tag, *options), tag

    def ends(self, stream: Stream, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The client's and the server's report."""
        client = stream.wait()

        def told() -> list[dict[str, Any]]:
            return [report for server in self.streams.values() for report in server.reports(tag)]

        return client, wait_for(told, f"server's report of {tag}")[0]

    def transfer(self, *options: str, up: int, down: int) -> None:
        """A checked transfer by way of node a."""
        stream, tag = self.stream(*options, "-u", str(up), "-d", str(down))
        client, server = self.ends(stream, tag)
        assert client == {"tag": tag, "end": "complete", "sent": up, "received": down, "corrupt_at": -1}
        assert server == {"tag": tag, "end": "complete", "sent": down, "received": up, "corrupt_at": -1}

    def verdicts(self, node: Namespace) -> dict[str, int]:
        found: dict[str, int] = self.drivers[node].stats()["verdicts"]
        return {name: n for name, n in found.items() if n and name.startswith("tunnel")}

    def close(self) -> None:
        for driver in self.drivers.values():
            if driver.process.poll() is None:
                driver.close(release=True)
                driver.end()
