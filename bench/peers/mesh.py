# SPDX-License-Identifier: Apache-2.0
"""This project: the daemon as users run it, with the static provider, one engine at a time."""

from __future__ import annotations

import importlib.metadata
import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import ClassVar

from bench.lab import BACKENDS, ECHO_PORT, SINK_PORT, SOURCE_PORT, Lab, LabError
from bench.peers.base import Side
from mesh.datapath.kernel.attach import cgroup_root

PORTS = ((ECHO_PORT, "tcp"), (ECHO_PORT, "udp"), (SOURCE_PORT, "tcp"), (SINK_PORT, "tcp"))
CALM = 1.0  # seconds
LONG_CALM = 8100.0  # seconds, as by default
SETTLE_TIMEOUT = 60.0  # seconds; much, for emulated machines
WIDE_SERVICES = 999  # idle ones, beside the one that is measured
WIDE_BACKENDS = 10
MESH = Path(sys.executable).parent / "mesh"


def static_file(idle_services: int = 0, weights: tuple[int, ...] = (1,) * len(BACKENDS)) -> str:
    """The static provider's file: the measured service, and idle ones whose backends do not exist.

    Probes are off: backends of all sides are used without being probed.
    """
    lines = ["[[services]]", 'name = "bench"', "[services.options]", 'health = "off"']
    for port, protocol in PORTS:
        lines += ["[[services.ports]]", f"published = {port}", f"target = {port}", f'protocol = "{protocol}"']
    for i, (address, weight) in enumerate(zip(BACKENDS, weights, strict=True)):
        lines += ["[[services.backends]]", f'name = "backend{i}"', f'address = "{address}"', f"weight = {weight}"]
    for n in range(idle_services):
        lines += ["[[services]]", f'name = "idle{n}"', "[services.options]", 'health = "off"']
        lines += ["[[services.ports]]", f"published = {20000 + n}", "target = 80", 'protocol = "tcp"']
        for i in range(WIDE_BACKENDS):
            number = n * WIDE_BACKENDS + i
            address = f"172.30.{1 + number // 250}.{1 + number % 250}"
            lines += ["[[services.backends]]", f'name = "idle{n}-{i}"', f'address = "{address}"']
    return "\n".join(lines) + "\n"


# A bpf file system of its own, which goes with the process: the host's may hold another daemon's pins.
ISOLATE = ("unshare", "--mount", "sh", "-c", 'mount -t bpf bpf "$0" && exec "$@"')


VERDICT = re.compile(r'^mesh_verdicts_total\{verdict="(\w+)"\} (\S+)$', re.MULTILINE)


def scrape(path: Path) -> str:
    """A daemon's metrics by its control socket; empty if nobody answers."""
    try:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(5)
            control.connect(str(path))
            control.sendall(b"GET /metrics HTTP/1.0\r\nHost: mesh\r\n\r\n")
            return b"".join(iter(lambda: control.recv(65536), b"")).decode()
    except OSError:
        return ""


class Mesh(Side):
    """The daemon with one engine."""

    overhead = 4.0
    command: ClassVar[tuple[str, ...]] = (str(MESH),)
    engine: ClassVar[str]
    calm: ClassVar[float] = CALM  # seconds
    idle_services: ClassVar[int] = 0
    places: ClassVar[tuple[str, ...]] = ("node",)  # where it runs; the first is called
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.cgroups: list[Path] = []

    @classmethod
    def missing(cls) -> str:
        return "" if Path(cls.command[0]).exists() else f"{cls.command[0]} is not installed"

    @classmethod
    def version(cls) -> str:
        return f"mesh {importlib.metadata.version('mesh')}"

    def text(self) -> str:
        """The static file with which it starts."""
        return static_file(self.idle_services)

    def start(self) -> None:
        self.launch()
        self.wait()

    def wait(self) -> None:
        """Until it serves."""
        self.lab.wait_serving(self.processes[0], self.targets(ECHO_PORT)[0], log=self.log("node"))

    def launch(self) -> None:
        """Start it in all its places."""
        self.write(self.text())
        for place in self.places:
            self.state(place).mkdir(exist_ok=True)
            source = ("--provider", "static", "--static-file", str(self.file))
            how = ("--state-dir", str(self.state(place)), "--http-listen", "", "--drain-timeout", "0")
            # Ports are bound, as those of the other proxies are. The calm is short: what is measured is the steady
            # state that follows it, not the time after a take-over, when flows are still looked up.
            engine = ("--engine", self.engine, "--intercept", "bind", "--transition-calm", str(self.calm))
            argv = (*self.command, "run", *engine, *source, *how, *self.own_places(place), *self.options)
            isolated = (*ISOLATE, str(self.pins(place)), *argv)
            self.processes.append(self.lab.start(place, *isolated, log=self.log(place)))

    def settle(self) -> None:
        """Wait until no slot is in transition any more: the first apply took the ports, the second settled them."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        waiting = list(self.places)
        while time.monotonic() < deadline:
            time.sleep(CALM)
            for place in tuple(waiting):
                argv = (*self.command, "status", "--json", "--state-dir", str(self.state(place)))
                answer = self.lab.run(place, *argv, check=False)
                if answer and json.loads(answer)["apply"]["count"] >= 2:
                    waiting.remove(place)
            if not waiting:
                return
        raise LabError(f"does not settle: {answer.strip()}")

    def stop(self) -> None:
        """Stop and release: the kernel engine's data plane would outlive the daemon. What then is left is taken off."""
        for place in self.places if self.processes else ():
            how = ("--release", "--timeout", "5", "--state-dir", str(self.state(place)))
            self.lab.run(place, *self.command, "stop", *how, check=False)
        super().stop()
        for place in self.places:
            for line in self.lab.run(place, "ip", "-brief", "link").splitlines():
                device = line.split()[0].partition("@")[0]
                self.lab.run(place, "tc", "qdisc", "delete", "dev", device, "clsact", check=False)
        for cgroup in self.cgroups:
            if cgroup.exists():
                cgroup.rmdir()

    def counters(self) -> dict[str, int]:
        """The engine's verdicts of all its places."""
        found: dict[str, int] = {}
        for place in self.places:
            for name, number in VERDICT.findall(scrape(self.state(place) / "mesh.sock")):
                found[name] = found.get(name, 0) + int(float(number))
        return found

    def log(self, place: str) -> str:
        return f"{self.name}-{place}.log"

    def state(self, place: str) -> Path:
        return self.lab.directory / f"{self.name}-{place}.state"

    def pins(self, place: str) -> Path:
        return self.lab.directory / f"bpf-{place}"

    def own_places(self, place: str) -> tuple[str, ...]:
        """What keeps the daemon away from the host's pins and processes: a file system and a cgroup of its own."""
        pins = self.pins(place)
        pins.mkdir(exist_ok=True)
        root = cgroup_root() if self.engine == "kernel" else None
        if root is None:
            return ("--bpf-fs", str(pins))
        cgroup = root / f"{self.lab.prefix}-{place}"
        cgroup.mkdir(exist_ok=True)
        self.cgroups.append(cgroup)
        return ("--bpf-fs", str(pins), "--cgroup", str(cgroup))

    def change(self, step: int) -> None:
        """No new flows to one backend, in turn; every fifth step is all of them."""
        resting = step % (len(BACKENDS) + 1)
        self.write(static_file(self.idle_services, tuple(int(i != resting) for i in range(len(BACKENDS)))))

    @property
    def file(self) -> Path:
        return self.lab.directory / f"{self.name}.toml"

    def write(self, text: str) -> None:
        """Replace the static file, whole, as an editor would."""
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)


class MeshKernel(Mesh):
    name = "mesh-kernel"
    label = "mesh, kernel engine"
    engine = "kernel"
    sockets = False


class MeshProxy(Mesh):
    name = "mesh-proxy"
    label = "mesh, proxy engine"
    engine = "proxy"


class MeshKernelFresh(MeshKernel):
    """The same with all slots in transition, as it is for hours after a take-over; and what changes then do."""

    name = "mesh-kernel-fresh"
    label = "mesh, kernel engine, slots in transition"
    only = ("connections", "requests", "flood", "changes", "changes-new")
    quick = False
    changeable = True
    calm = LONG_CALM

    def settle(self) -> None:
        """Never."""


class MeshProxyFresh(MeshProxy):
    """What changes do to the proxy engine; to it a slot in transition is nothing special."""

    name = "mesh-proxy-fresh"
    label = "mesh, proxy engine, slots in transition"
    only = ("connections", "requests", "changes", "changes-new")
    quick = False
    changeable = True
    calm = LONG_CALM

    def settle(self) -> None:
        """Never."""


class MeshKernelWide(MeshKernel):
    """The same beside 999 idle services of 10 backends: is it flat in scale?"""

    name = "mesh-kernel-1000"
    label = "mesh, kernel engine, 1,000 services"
    idle_services = WIDE_SERVICES
    only = ("connections", "requests")


class MeshProxyWide(MeshProxy):
    """The same beside 999 idle services of 10 backends: is it flat in scale?"""

    name = "mesh-proxy-1000"
    label = "mesh, proxy engine, 1,000 services"
    idle_services = WIDE_SERVICES
    only = ("connections", "requests")
