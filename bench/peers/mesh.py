# SPDX-License-Identifier: Apache-2.0
"""This project: the daemon as users run it, with the static provider, one engine at a time."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import ClassVar

from bench.lab import BACKENDS, BRIDGE, ECHO_PORT, SINK_PORT, SOURCE_PORT, LabError
from bench.peers.base import Side
from mesh.datapath.kernel_attach import cgroup_root

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


class Mesh(Side):
    """The daemon with one engine."""

    engine: ClassVar[str]
    calm: ClassVar[float] = CALM  # seconds
    idle_services: ClassVar[int] = 0
    cgroup: Path | None = None

    @classmethod
    def missing(cls) -> str:
        return "" if MESH.exists() else f"{MESH} is not installed"

    @classmethod
    def version(cls) -> str:
        return f"mesh {importlib.metadata.version('mesh')}"

    def start(self) -> None:
        self.write(static_file(self.idle_services))
        self.state.mkdir(exist_ok=True)
        log = f"{self.name}.log"
        source = ("--provider", "static", "--static-file", str(self.file))
        place = ("--state-dir", str(self.state), "--http-listen", "", "--drain-timeout", "0")
        # Ports are bound, as those of the other proxies are. The calm is short: what is measured is the steady state
        # that follows it, not the time after a take-over, when flows are still looked up.
        how = ("--engine", self.engine, "--intercept", "bind", "--transition-calm", str(self.calm))
        argv = (str(MESH), "run", *how, *source, *place, *self.own_places())
        process = self.lab.start("node", *ISOLATE, str(self.pins), *argv, log=log)
        self.processes.append(process)
        self.lab.wait_serving(process, self.targets(ECHO_PORT)[0], log=log)

    def settle(self) -> None:
        """Wait until no slot is in transition any more: the first apply took the ports, the second settled them."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while time.monotonic() < deadline:
            time.sleep(CALM)
            answer = self.lab.run("node", str(MESH), "status", "--json", "--state-dir", str(self.state), check=False)
            if answer and json.loads(answer)["apply"]["count"] >= 2:
                return
        raise LabError(f"does not settle: {answer.strip()}")

    def stop(self) -> None:
        """Stop and release: the kernel engine's data plane would outlive the daemon. What then is left is taken off."""
        if self.processes:
            how = ("--release", "--timeout", "5", "--state-dir", str(self.state))
            self.lab.run("node", str(MESH), "stop", *how, check=False)
        super().stop()
        for device in ("client", BRIDGE, *(f"veth{i}" for i in range(len(BACKENDS)))):
            self.lab.run("node", "tc", "qdisc", "delete", "dev", device, "clsact", check=False)
        if self.cgroup and self.cgroup.exists():
            self.cgroup.rmdir()

    @property
    def state(self) -> Path:
        return self.lab.directory / f"{self.name}.state"

    @property
    def pins(self) -> Path:
        return self.lab.directory / "bpf"

    def own_places(self) -> tuple[str, ...]:
        """What keeps the daemon away from the host's pins and processes: a file system and a cgroup of its own."""
        self.pins.mkdir(exist_ok=True)
        root = cgroup_root() if self.engine == "kernel" else None
        if root is None:
            return ("--bpf-fs", str(self.pins))
        self.cgroup = root / self.lab.prefix
        self.cgroup.mkdir(exist_ok=True)
        return ("--bpf-fs", str(self.pins), "--cgroup", str(self.cgroup))

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


class MeshProxy(Mesh):
    name = "mesh-proxy"
    label = "mesh, proxy engine"
    engine = "proxy"


class MeshKernelFresh(MeshKernel):
    """The same with all slots in transition, as it is for hours after a take-over; and what changes then do."""

    name = "mesh-kernel-fresh"
    label = "mesh, kernel engine, slots in transition"
    only = ("connections", "requests", "changes", "changes-new")
    quick = False
    changeable = True
    calm = LONG_CALM

    def settle(self) -> None:
        """Never."""


class MeshProxyFresh(MeshProxy):
    """What changes do to the proxy engine; to it a slot in transition is nothing special."""

    name = "mesh-proxy-fresh"
    label = "mesh, proxy engine, slots in transition"
    only = MeshKernelFresh.only
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
