# SPDX-License-Identifier: Apache-2.0
"""The measured network: client - node - backends, each in a network namespace of its own, joined by veth pairs.

    client 10.90.0.2-17 --veth-- 10.90.0.1 node 172.30.0.1 --bridge docker_gwbridge-- 172.30.0.10-13 backends

The node forwards between the two sides; backends answer clients through it. All namespaces use the same congestion
control. Nothing outside the namespaces is changed, and everything is gone when the `with` block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Final, Self

OUT: Final = Path(__file__).parent / "out"

CLIENTS: Final = tuple(f"10.90.0.{2 + i}" for i in range(16))
NODE: Final = "10.90.0.1"  # where the balanced ports are published
BACKENDS: Final = tuple(f"172.30.0.{10 + i}" for i in range(4))
FLOOD_NETWORK: Final = "10.91.0.0"  # /16, behind the client: where answers to a flood go, and end
GATEWAY: Final = "172.30.0.1"
BRIDGE: Final = "docker_gwbridge"
ECHO_PORT: Final = 8080  # TCP and UDP
SOURCE_PORT: Final = 8081
SINK_PORT: Final = 8082
PORTS: Final = (ECHO_PORT, SOURCE_PORT, SINK_PORT)

CONGESTION_CONTROL: Final = "reno"  # what every kernel permits in a namespace; no losses here, so it paces nothing
SYSCTLS: Final = {
    "net.ipv4.tcp_congestion_control": CONGESTION_CONTROL,
    "net.ipv4.ip_local_port_range": "10000 65535",  # clear of the published ports
    "net.ipv4.tcp_tw_reuse": "1",  # else the run is bounded by ports, for clients and for proxies
    "net.ipv4.tcp_max_tw_buckets": "262144",
    "net.ipv4.tcp_no_metrics_save": "1",  # no run inherits what another learned
    "net.ipv4.tcp_max_syn_backlog": "65535",
    "net.core.somaxconn": "65535",
    "net.ipv4.ip_forward": "0",
    "net.ipv6.conf.all.disable_ipv6": "1",  # no neighbour discovery in the middle of a run
}

PREFIX: Final = "meshbench"
PR_SET_PDEATHSIG: Final = 1
START_TIMEOUT: Final = 60.0  # seconds; much, for emulated machines


class LabError(RuntimeError):
    """The lab, or something that should run in it, could not be set up."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(*argv: str, check: bool = True, stdin: str | None = None) -> str:
    """Run a short command, return its output.

    Raises:
        LabError: it failed; the message has what it printed.
    """
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Bound what happens inside, waits of any kind too. In the main thread.

    Raises:
        LabError: it takes longer.
    """

    def late(signum: int, frame: object) -> None:
        raise LabError("it did not end within the time for the whole run")

    if seconds <= 0:
        raise LabError("the time for the whole run is over")
    before = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def remove_stale() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    for line in run("ip", "netns", "list").splitlines():
        found = re.match(rf"{PREFIX}(\d+)-", line)
        if found and not Path(f"/proc/{found[1]}").exists():
            run("ip", "netns", "delete", line.split()[0], check=False)


class Lab:
    """Namespaces, backends and the processes started in them. Use as a context manager."""

    kind: ClassVar[str] = ""

    def __init__(self, name: str = "") -> None:
        """`name`: tells the labs apart that one process has at once."""
        self.prefix = f"{PREFIX}{os.getpid()}{self.kind}{name and '-'}{name}"
        self.directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-"))
        self.backends: list[subprocess.Popen[Any]] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._namespaces: list[str] = []

    def __enter__(self) -> Self:
        try:
            remove_stale()
            self._build()
            self._start_backends()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what was started, remove what was made; safe to call twice, and not stopped by a second ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for process in reversed(self._processes):
                self.stop(process)
            for name in self._namespaces:
                run("ip", "netns", "delete", name, check=False)
            self._namespaces.clear()
            shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def namespace(self, name: str) -> str:
        """The full name of `client`, `node` or `backend0`..."""
        return f"{self.prefix}-{name}"

    def inside(self, name: str, *argv: str) -> list[str]:
        """The command line that runs `argv` in a namespace of the lab. (`ip netns exec` would hide /sys/fs/bpf.)"""
        return ["nsenter", f"--net=/run/netns/{self.namespace(name)}", *argv]

    def run(self, name: str, *argv: str, check: bool = True, stdin: str | None = None) -> str:
        """Run a short command in a namespace, return its output."""
        return run(*self.inside(name, *argv), check=check, stdin=stdin)

    def start(self, name: str, *argv: str, log: str = "", **options: Any) -> subprocess.Popen[Any]:
        """Start a process in a namespace. It ends with the lab at the latest. `log`: a file name under `directory`."""
        sink: IO[bytes] | int = (self.directory / log).open("ab") if log else subprocess.DEVNULL
        try:
            settings: dict[str, Any] = {"stdout": sink, "stderr": sink, "stdin": subprocess.DEVNULL} | options
            process = subprocess.Popen(
                self.inside(name, *argv),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 -- no threads here
                **settings,
            )
        finally:
            if not isinstance(sink, int):
                sink.close()
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[Any], *, patience: float = 5.0) -> None:
        """End a process and its group: asked first, killed after `patience` seconds."""
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            if process.poll() is not None:
                break
            try:
                os.killpg(process.pid, number)
                process.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
        if process in self._processes:
            self._processes.remove(process)

    def wait_listening(self, process: subprocess.Popen[Any], *, log: str = "", ports: Sequence[int] = PORTS) -> None:
        """Wait until every TCP port in `ports` has a listener in the node's namespace.

        Raises:
            LabError: the process ended, or START_TIMEOUT passed; the message has the end of its log.
        """

        def listening() -> bool:
            sockets = self.run("node", "ss", "-Hltn")
            return all(re.search(rf":{port}\s", sockets) for port in ports)

        self.wait_until(process, listening, log)

    def wait_serving(self, process: subprocess.Popen[Any], target: str, *, log: str = "") -> None:
        """Wait until a connection from the client to `target` is echoed; for what serves without a listener.

        Raises:
            LabError: the process ended, or START_TIMEOUT passed; the message has the end of its log.
        """
        argv = (str(OUT / "load"), "hold", "--target", target)
        self.wait_until(process, lambda: json.loads(self.run("client", *argv, stdin=""))["operations"] == 1, log)

    def wait_until(self, process: subprocess.Popen[Any], done: Callable[[], bool], log: str) -> None:
        """Wait until `done`.

        Raises:
            LabError: the process ended, or START_TIMEOUT passed; the message has the end of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            if done():
                return
            time.sleep(0.01)
        said = self.tail(log)
        raise LabError(f"does not serve: {said.rpartition(chr(10))[2]}\n{' '.join(process.args)}\n{said}")  # type: ignore[arg-type]

    def tail(self, log: str) -> str:
        """The last lines of a process's log."""
        path = self.directory / log
        return "\n".join(path.read_text(errors="replace").splitlines()[-15:]) if log and path.exists() else ""

    def add(self, name: str) -> None:
        """Add a namespace. It goes with the lab, or by `remove`."""
        run("ip", "netns", "add", self.namespace(name))
        self._namespaces.append(self.namespace(name))
        self.run(name, "sysctl", "-qw", *(f"{key}={value}" for key, value in SYSCTLS.items()))
        self.run(name, "ip", "link", "set", "lo", "up")

    def remove(self, name: str) -> None:
        """Remove a namespace; the veth pairs that end in it go with it."""
        if self.namespace(name) in self._namespaces:
            run("ip", "netns", "delete", self.namespace(name))
            self._namespaces.remove(self.namespace(name))

    def link(self, name: str, inner: str, far: str, outer: str) -> None:
        """Join `inner` in one namespace with `outer` in another, both up."""
        there = f"/run/netns/{self.namespace(name)}"
        self.run(far, "ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", there)
        self.run(far, "ip", "link", "set", outer, "up")
        self.run(name, "ip", "link", "set", inner, "up")

    def _build(self) -> None:
        for name in ("client", "node", *(f"backend{i}" for i in range(len(BACKENDS)))):
            self.add(name)
        self.run("node", "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.link("client", "eth0", "node", "client")
        self.run("node", "ip", "address", "add", f"{NODE}/24", "dev", "client")
        addresses = "".join(f"address add {address}/24 dev eth0\n" for address in CLIENTS)
        self.run("client", "ip", "-batch", "-", stdin=addresses)
        self.run("client", "ip", "route", "add", "default", "via", NODE)
        self.run("node", "ip", "route", "add", f"{FLOOD_NETWORK}/16", "via", CLIENTS[0])
        self.attach_backends("node")

    def attach_backends(self, name: str) -> None:
        """The bridge with the backends behind it, on a node."""
        self.run(name, "ip", "link", "add", BRIDGE, "type", "bridge")
        self.run(name, "ip", "link", "set", BRIDGE, "up")
        self.run(name, "ip", "address", "add", f"{GATEWAY}/16", "dev", BRIDGE)
        for i, address in enumerate(BACKENDS):
            self.link(f"backend{i}", "eth0", name, f"veth{i}")
            self.run(name, "ip", "link", "set", f"veth{i}", "master", BRIDGE)
            self.run(f"backend{i}", "ip", "address", "add", f"{address}/16", "dev", "eth0")
            self.run(f"backend{i}", "ip", "route", "add", "default", "via", GATEWAY)

    def _start_backends(self) -> None:
        for i in range(len(BACKENDS)):
            self.backends.append(self.start_backend(i))

    def start_backend(self, number: int) -> subprocess.Popen[Any]:
        """One more process that serves as this backend, beside those that do already.

        Raises:
            LabError: it does not start.
        """
        process = self.start(f"backend{number}", str(OUT / "backend"), *map(str, PORTS), stdout=subprocess.PIPE)
        if not process.stdout or not process.stdout.readline().startswith(b"ready"):
            raise LabError("a backend does not start")
        return process
