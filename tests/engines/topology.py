# SPDX-License-Identifier: Apache-2.0
"""A node with its backends, a client, and the daemon on the node.

client 192.0.2.N, 2001:db8::N --- switch --- node --- docker_gwbridge 172.31.0.1/24, 2001:db8:1::1/64
                                               |--- b1 172.31.0.11, 2001:db8:1::11
                                               |--- b2 172.31.0.12, ...
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracle import selection
from tests.support import peers
from tests.support.daemon import Daemon, backends_of
from tests.support.lab.images import ECHO_PORT, HTTP_PORT, SOURCE, UDP_PORT
from tests.support.lab.netns import Lab, Namespace, run, veth
from tests.support.polling import wait_for

WEB, ECHO, UDP, STREAM = 8000, 8001, 8002, 8003  # published; STREAM leads to tests/support/peers/stream.c
STREAM_PORT = 8083
TABLE_SIZE = 1021


@dataclass
class Host:
    """One backend: a namespace with the stand-in server and a stream server, like a container on docker_gwbridge."""

    name: str
    namespace: Namespace
    streams: peers.StreamServer
    server: subprocess.Popen[Any]

    @property
    def address(self) -> str:
        return self.namespace.address


@dataclass
class Spec:
    """One service of the static file."""

    name: str
    ports: tuple[str, ...]
    backends: tuple[str, ...]
    weights: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    family: int = 4


class Topology:
    """Everything of the picture above; the daemon is started by `serve`."""

    def __init__(self, lab: Lab, engine: str, *, backends: int = 4, mtu: int = 1500, client_mtu: int = 1500) -> None:
        self.lab, self.engine, self.mtu = lab, engine, mtu
        self.program: Path | None = None  # the daemon's, where it is not this build's
        self.client = lab.host("client", mtu=client_mtu)
        self.node = lab.host("node")
        self.node.bridge("docker_gwbridge", "172.31.0.1/24", "2001:db8:1::1/64")
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            self.node.run("sysctl", "-qw", f"{key}=1")
        self.hosts = {f"b{i}": self.add_host(i) for i in range(1, backends + 1)}
        self.static_file = lab.directory / "mesh-static.toml"
        self.daemon: Daemon

    def add_host(self, number: int) -> Host:
        name = f"b{number}"
        namespace = self.lab.namespace(name)
        veth(self.node, f"veth{number}", namespace, "eth0", mtu=self.mtu)
        self.node.ip("link", "set", f"veth{number}", "master", "docker_gwbridge")
        namespace.add_address("eth0", f"172.31.0.{10 + number}/24", f"2001:db8:1::{10 + number}/64")
        namespace.ip("route", "add", "default", "via", "172.31.0.1")
        namespace.ip("-6", "route", "add", "default", "via", "2001:db8:1::1")
        streams = peers.StreamServer(namespace, STREAM_PORT, self.lab.directory / f"{name}-streams.log")
        host = Host(name, namespace, streams, self.run_server(name, namespace))
        wait_for(
            lambda: self.listens(namespace, STREAM_PORT) and self.listens(namespace, HTTP_PORT), f"servers of {name}"
        )
        return host

    def run_server(self, name: str, namespace: Namespace) -> subprocess.Popen[Any]:
        environment = os.environ | {"TASK_ID": name, "NODE": "node"}
        with (self.lab.directory / f"{name}.log").open("ab") as log:
            return namespace.popen(str(peers.program(*sorted(SOURCE.glob("*.c"))[::-1])), stdout=log, env=environment)

    @staticmethod
    def listens(namespace: Namespace, port: int) -> bool:
        return f":{port} " in namespace.run("ss", "-Hltn").stdout

    def default(self, *backends: str, weights: dict[str, int] | None = None) -> tuple[Spec, ...]:
        """The services that most tests use, over these backends (default: all)."""
        names = backends or tuple(self.hosts)
        ports = {
            "web": (f"{WEB}:{HTTP_PORT}/tcp",),
            "echo": (f"{ECHO}:{ECHO_PORT}/tcp",),
            "udp": (f"{UDP}:{UDP_PORT}/udp",),
            "stream": (f"{STREAM}:{STREAM_PORT}/tcp",),
        }
        return tuple(Spec(name, port, names, weights or {}, {"health": "off"}) for name, port in ports.items())

    def text(self, specs: tuple[Spec, ...]) -> str:
        """The static file."""
        lines: list[str] = []
        for spec in specs:
            lines += ["[[services]]", f'name = "{spec.name}"', "[services.options]", f'table-size = "{TABLE_SIZE}"']
            lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in spec.options.items()]
            for port in spec.ports:
                published, target, protocol = re.split("[:/]", port)
                lines += ["[[services.ports]]", f"published = {published}", f"target = {target}"]
                lines += [f'protocol = "{protocol}"']
            for name in spec.backends:
                namespace = self.hosts[name].namespace
                address = namespace.address if spec.family == 4 else namespace.address6
                lines += ["[[services.backends]]", f'name = "{name}"', f'address = "{address}"']
                lines += [f"weight = {spec.weights.get(name, 1)}"]
        return "\n".join(lines) + "\n"

    def write(self, specs: tuple[Spec, ...]) -> None:
        draft = self.static_file.with_suffix(".new")
        draft.write_text(self.text(specs))
        draft.replace(self.static_file)

    def serve(self, *specs: Spec, **config: object) -> Daemon:
        """Start the daemon with these services."""
        self.write(specs or self.default())
        if self.engine == "kernel":
            config.setdefault("bpf_fs", self.bpf_fs())
        self.daemon = Daemon(
            self.node,
            self.lab.directory / "mesh",
            provider="static",
            static_file=self.static_file,
            engine=self.engine,
            program=self.program,
            **config,  # type: ignore[arg-type]
        )
        self.lab.on_close(self.daemon.close)
        return self.daemon

    def bpf_fs(self) -> Path:
        """A bpf file system of this lab; what is pinned there goes with it."""
        path = self.lab.directory / "bpf"
        if not path.exists():
            path.mkdir()
            run("mount", "-t", "bpf", "bpf", str(path))
            self.lab.on_close(lambda: run("umount", "-l", str(path)))
        return path

    def change(self, *specs: Spec) -> None:
        """Write other services and wait until they are applied."""
        if self.static_file.read_text() == self.text(specs):
            return
        before = self.daemon.state()["generation"]["applied"]
        self.write(specs)
        self.daemon.process.send_signal(signal.SIGHUP)

        def applied() -> bool:
            state = self.daemon.state()
            wanted = {
                s.name: {f"{s.name}/{b}": s.weights.get(b, 1) for b in s.backends if s.weights.get(b, 1)} for s in specs
            }
            held = {s["name"]: active(backends_of(state, s["name"])) for s in state["services"]}
            generation = state["generation"]
            return held == wanted and generation["applied"] == generation["desired"] and generation["applied"] > before

        wait_for(applied, "change of the static file applied")

    def predict(
        self, spec: Spec, source: str, source_port: int, destination: str, port: int, protocol: int = 6
    ) -> list[str]:
        """The backends that the oracle gives to a flow, the first choice first."""
        numbers = {name: selection.FIRST + i for i, name in enumerate(spec.backends)}
        entries = [
            (selection.seed_of(f"{spec.name}/{name}"), numbers[name], spec.weights.get(name, 1))
            for name in spec.backends
        ]
        key = (spec.name, spec.backends, tuple(sorted(spec.weights.items())))
        if key not in self._tables:
            self._tables[key] = selection.maglev(TABLE_SIZE, entries)
        flow = (selection.address(source), source_port, selection.address(destination), port, protocol)
        value = (
            selection.client_hash(flow[0])
            if spec.options.get("affinity") == "client-ip"
            else selection.flow_hash(*flow)
        )
        names = {number: name for name, number in numbers.items()}
        return [names[owner] for owner in selection.choices(self._tables[key], value)]

    _tables: dict[Any, list[int]] = {}  # noqa: RUF012 -- a cache


def active(weights: dict[str, int]) -> dict[str, int]:
    return {name: weight for name, weight in weights.items() if weight}


def logs(directory: Path) -> str:
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-4000:]}" for path in directory.glob("mesh/*.log"))
