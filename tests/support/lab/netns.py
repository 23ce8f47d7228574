# SPDX-License-Identifier: Apache-2.0
"""Network namespaces joined by bridges, removed again whatever happens.

Everything is named `mesh<pid>-<lab>-<name>` after the process that owns it. Removal happens by the fixture, else at
exit, else by the next run, which sweeps what belongs to dead processes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.support.polling import PATIENCE, wait_for

NETNS_DIR = Path("/run/netns")
CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWNED = re.compile(r"^mesh(\d+)-")
_counter = itertools.count()


def run(
    *command: str, check: bool = True, timeout: float = PATIENCE, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, output captured as text; a failure shows what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


class Namespace:
    """One network namespace, loopback up."""

    def __init__(self, name: str, short: str) -> None:
        self.name = name
        self.short = short
        self.addresses: list[str] = []  # without prefix length, in the order in which they were added
        run("ip", "netns", "add", name)
        self.ip("link", "set", "lo", "up")

    @property
    def path(self) -> Path:
        return NETNS_DIR / self.name

    @property
    def address(self) -> str:
        """The first IPv4 address that was added."""
        return next(a for a in self.addresses if ":" not in a)

    @property
    def address6(self) -> str:
        """The first IPv6 address that was added."""
        return next(a for a in self.addresses if ":" in a)

    def ip(self, *arguments: str) -> str:
        """`ip -n <this> ...`."""
        return run("ip", "-n", self.name, *arguments).stdout

    def command(self, *command: str) -> list[str]:
        """The argument list that runs a command in here (network only: mounts, /sys and processes stay the host's)."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def run(self, *command: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in here to its end; see `run`."""
        return run(*self.command(*command), **kwargs)

    def popen(
        self,
        *command: str,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in here; the process is the command itself (nsenter execs). Ended with the namespace."""
        return subprocess.Popen(self.command(*command), stdout=stdout, stderr=stderr, env=env, **kwargs)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in this namespace inside the block: sockets made there stay there."""
        libc = ctypes.CDLL(None, use_errno=True)
        clone_newnet = 0x40000000
        with Path("/proc/thread-self/ns/net").open() as home, self.path.open() as here:
            if libc.setns(here.fileno(), clone_newnet):
                raise OSError(ctypes.get_errno(), f"setns {self.name}")
            try:
                yield
            finally:
                if libc.setns(home.fileno(), clone_newnet):
                    raise OSError(ctypes.get_errno(), "setns back")

    def add_address(self, device: str, *addresses: str) -> None:
        """Addresses with prefix length; an IPv6 address is usable at once (no duplicate address detection)."""
        for address in addresses:
            self.ip("addr", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
            self.addresses.append(address.split("/")[0])

    def bridge(self, device: str, *addresses: str) -> None:
        """A bridge in here."""
        self.ip("link", "add", device, "type", "bridge", "forward_delay", "0")
        self.ip("link", "set", device, "up")
        self.add_address(device, *addresses)

    def take(self, address: str, device: str = "eth0") -> None:
        """Get an address that moves between hosts, and tell all neighbours (gratuitous ARP)."""
        self.ip("addr", "add", f"{address}/24", "dev", device)
        with self.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((device, 0))
            mac, packed = sock.getsockname()[4], socket.inet_aton(address)
            header = b"\xff" * 6 + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
            sock.send(header + mac + packed + b"\0" * 6 + packed)

    def pids(self) -> list[int]:
        return [int(p) for p in run("ip", "netns", "pids", self.name, check=False).stdout.split()]

    def delete(self) -> None:
        delete_namespace(self.name)


def veth(a: Namespace, device_a: str, b: Namespace, device_b: str, *, mtu: int = 1500) -> None:
    """A pair of interfaces between two namespaces, both up."""
    a.ip("link", "add", device_a, "mtu", str(mtu), "type", "veth", "peer", "name", device_b, "netns", b.name)
    b.ip("link", "set", device_b, "mtu", str(mtu))
    for namespace, device in ((a, device_a), (b, device_b)):
        namespace.ip("link", "set", device, "up")


class Lab:
    """A switch (bridge in a namespace of its own) and hosts on it: 192.0.2.0/24 and 2001:db8::/64.

    with Lab() as lab: client = lab.host("client"); client.run("curl", ...)
    """

    def __init__(self, label: str = "") -> None:
        sweep()
        adopt_orphans()
        self.prefix = f"mesh{os.getpid()}-{label or next(_counter)}"
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-"))  # short: socket paths are at most 107 bytes
        self.hosts: dict[str, Namespace] = {}
        self._cleanups: list[Callable[[], object]] = []
        self._numbers = itertools.count(11)
        atexit.register(self.close)
        try:
            self.switch = self.namespace("switch")
            self.switch.bridge("br0", "192.0.2.1/24", "2001:db8::1/64")
        except BaseException:
            self.close()
            raise

    def namespace(self, short: str) -> Namespace:
        """A namespace that is on no network."""
        namespace = Namespace(f"{self.prefix}-{short}", short)
        self.on_close(namespace.delete)
        return namespace

    def host(self, short: str, *, mtu: int = 1500) -> Namespace:
        """A namespace with eth0 on the switch: 192.0.2.N and 2001:db8::N, default route to the switch."""
        number = next(self._numbers)
        host = self.namespace(short)
        veth(self.switch, f"p{number}", host, "eth0", mtu=mtu)
        self.switch.ip("link", "set", f"p{number}", "master", "br0")
        host.add_address("eth0", f"192.0.2.{number}/24", f"2001:db8::{number}/64")
        host.ip("route", "add", "default", "via", "192.0.2.1")
        host.ip("-6", "route", "add", "default", "via", "2001:db8::1")
        self.hosts[short] = host
        return host

    def on_close(self, action: Callable[[], object]) -> None:
        """Run at close, last registered first."""
        self._cleanups.append(action)

    def close(self) -> None:
        """Remove everything; safe to call again."""
        atexit.unregister(self.close)
        errors: list[BaseException] = []
        while self._cleanups:
            try:
                self._cleanups.pop()()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                errors.append(error)
        shutil.rmtree(self.directory, ignore_errors=True)
        if errors:
            raise errors[0]

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def adopt_orphans() -> None:
    """Daemons' children that outlive them become ours, so that they end in `reap` and not as zombies of process 1."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def reap(pids: Iterable[int]) -> None:
    """Collect those of these processes that have ended and are our children."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def orphans_named(prefix: str) -> list[int]:
    """Our ended children of this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = path.read_text().rpartition(")")
            state, parent, *_ = tail.split()
            if state == "Z" and int(parent) == os.getpid() and head.split("(", 1)[1].startswith(prefix):
                found.append(int(path.parent.name))
    return found


def kill_all(pids: Callable[[], Sequence[int]], what: str) -> None:
    """SIGKILL until none is left."""

    def none_left() -> bool:
        found = [p for p in pids() if p != os.getpid()]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            orphans.add(pid)
        reap(orphans)
        return not found

    orphans: set[int] = set()

    wait_for(none_left, f"end of the processes of {what}")


def delete_namespace(name: str) -> None:
    """Kill what runs in a namespace and remove it."""
    if not (NETNS_DIR / name).exists():
        return
    kill_all(lambda: [int(p) for p in run("ip", "netns", "pids", name, check=False).stdout.split()], name)
    run("ip", "netns", "del", name, check=False)


def cgroup_directories(prefix: str) -> list[Path]:
    """The cgroups (of every hierarchy) whose name begins so."""
    return [p for pattern in (f"{prefix}*", f"*/{prefix}*") for p in CGROUP_ROOT.glob(pattern) if p.is_dir()]


def _below(top: Path, pattern: str) -> list[Path]:
    """What is below a cgroup; nothing where another process is removing it, too."""
    try:
        return list(top.rglob(pattern))
    except FileNotFoundError:
        return []


def delete_cgroups(prefix: str) -> None:
    """Kill what runs in the cgroups whose name begins so and remove them."""

    def pids() -> list[int]:
        found: set[int] = set()
        for top in cgroup_directories(prefix):
            for procs in _below(top, "cgroup.procs"):
                with contextlib.suppress(OSError):
                    found.update(int(p) for p in procs.read_text().split())
        return sorted(found)

    kill_all(pids, f"cgroup {prefix}")

    def removed() -> bool:
        for top in cgroup_directories(prefix):
            for directory in [*sorted((d for d in _below(top, "*") if d.is_dir()), reverse=True), top]:
                with contextlib.suppress(OSError):
                    directory.rmdir()
        return not cgroup_directories(prefix)

    wait_for(removed, f"removal of cgroup {prefix}")


def sweep() -> None:
    """Remove what dead processes have left: namespaces, their processes, cgroups, mounts, directories.

    One process at a time: the workers of a test run all begin with it.
    """
    with (Path(tempfile.gettempdir()) / "mesh-sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep()


def _sweep() -> None:
    def dead(name: str) -> bool:
        owner = _OWNED.match(name)
        return owner is not None and not Path(f"/proc/{owner[1]}").exists()

    for path in NETNS_DIR.glob("mesh*-*"):
        if dead(path.name):
            delete_namespace(path.name)
    for name in {p.name for p in cgroup_directories("mesh") if dead(p.name)}:
        delete_cgroups(name)
    for path in Path(tempfile.gettempdir()).glob("mesh*-*"):
        if dead(path.name):
            for mounted in mounts_below(path):
                run("umount", "-l", mounted, check=False)
            shutil.rmtree(path, ignore_errors=True)


def mounts_below(path: Path) -> list[str]:
    """Mount points under a directory, the deepest first."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{path}/")), reverse=True)
