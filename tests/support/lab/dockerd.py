# SPDX-License-Identifier: Apache-2.0
"""A real dockerd per network namespace, and swarms of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from tests.support.lab import images
from tests.support.lab.netns import Lab, Namespace, delete_cgroups, kill_all, orphans_named, reap, run
from tests.support.polling import PATIENCE, wait_for

# The node's own mounts: /run and /opt empty, /etc writable without a trace, name look-ups refused at once (a swarm task
# otherwise waits 20 s for a registry), the node's hostname. Held by a process of its own, so that dockerd can restart.
_HOLD = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/etc /run/etc-work /run/docker /run/lock
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc-work /etc
if test -d /opt; then mount -t tmpfs tmpfs /opt; fi
rm -f /etc/resolv.conf
echo 'nameserver 127.0.0.1' > /etc/resolv.conf
hostname "$1"
echo ready
exec sleep infinity
"""

# What a manager says that is busy with itself: it is asked again. "out of sequence": the swarm changed it meanwhile.
T = TypeVar("T")
_AGAIN = re.compile("update out of sequence|does not have a leader|lost leadership|code = Unavailable")


AT_ONCE = "--restart-delay=200ms"  # replaces what ends without the five seconds that Swarm waits by default


def unavailable() -> str:
    """Why no dockerd can run here; empty when it can."""
    if os.geteuid():
        return "dockerd needs root"
    missing = [
        name
        for name in ("dockerd", "containerd", "runc", "docker", "nsenter", "unshare", "gcc")
        if not shutil.which(name)
    ]
    return f"not installed: {', '.join(missing)} (make packages-test)" if missing else ""


def bpf_fs(lab: Lab, name: str = "") -> Path:
    """A bpf file system of this lab, one for each name; what is pinned there goes with it."""
    path = lab.directory / f"bpf{name}"
    if not path.exists():
        path.mkdir()
        run("mount", "-t", "bpf", "bpf", str(path))
        lab.on_close(lambda: run("umount", "-l", str(path)))
    return path


class Node:
    """One dockerd in one namespace. `hostname` is the node's name in the swarm."""

    def __init__(self, lab: Lab, namespace: Namespace) -> None:
        self.lab = lab
        self.namespace = namespace
        self.hostname = namespace.short
        self.address = namespace.address
        self.directory = lab.directory / namespace.short
        self.data_root = self.directory / "data"
        self.exec_root = self.directory / "run"
        self.socket = self.directory / "docker.sock"
        self.log = self.directory / "dockerd.log"
        self.cgroup = f"{lab.prefix}-{namespace.short}"
        self.images: list[images.Image] = []
        self._daemon: subprocess.Popen[bytes] | None = None
        self.directory.mkdir()
        lab.on_close(self.close)
        hold = ["unshare", "-m", "-u", "sh", "-c", _HOLD, "hold", self.hostname]
        with self.log.open("ab") as log:
            self._holder = namespace.popen(*hold, stdout=subprocess.PIPE, stderr=log)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{self.cgroup}: the node's mounts could not be made: {self.log.read_text()}")
        self.start()

    @property
    def host(self) -> str:
        """The Engine's address, as DOCKER_HOST."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """dockerd's process id."""
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def running(self) -> bool:
        """Whether dockerd runs."""
        return self._daemon is not None and self._daemon.poll() is None

    def inside(self, *command: str) -> list[str]:
        """The argument list that runs a command in the node's network, mount and UTS namespaces."""
        holder = f"/proc/{self._holder.pid}/ns"
        return [
            "nsenter",
            f"--net={self.namespace.path}",
            f"--mount={holder}/mnt",
            f"--uts={holder}/uts",
            "--",
            *command,
        ]

    def start(self) -> None:
        """Start dockerd (again) and wait until it answers."""
        for stale in (self.directory / "dockerd.pid", self.exec_root / "containerd" / "containerd.pid"):
            stale.unlink(missing_ok=True)
        arguments = [
            f"--data-root={self.data_root}",
            f"--exec-root={self.exec_root}",
            f"--pidfile={self.directory / 'dockerd.pid'}",
            f"--host={self.host}",
            f"--cgroup-parent=/{self.cgroup}",
            "--default-address-pool=base=198.18.0.0/16,size=24",
            "--log-level=warn",
        ]
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                self.inside("dockerd", *arguments), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        wait_for(self._answers, f"dockerd of {self.cgroup}", interval=0.1)

    def _answers(self) -> bool:
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            raise RuntimeError(f"dockerd of {self.cgroup} ended:\n{self.log.read_text()[-4000:]}")
        with contextlib.suppress(OSError):
            return bool(self.api("GET", "/version"))
        return False

    def stop(self) -> None:
        """SIGTERM: containers end too. Waits for the end."""
        assert self._daemon is not None
        self._daemon.terminate()
        self._daemon.wait(PATIENCE)

    def kill(self) -> None:
        """SIGKILL dockerd alone: containers live on."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()

    def pause(self) -> None:
        """SIGSTOP: the socket accepts, nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def docker(
        self, *arguments: str, check: bool = True, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """`docker ...` on this node."""
        return run("docker", "-H", self.host, *arguments, check=check, timeout=timeout)

    def api(self, method: str, path: str) -> Any:
        """A request to this Engine, parsed. Polling asks so: a `docker` process costs a tenth of a second of CPU."""
        connection = http.client.HTTPConnection("docker", timeout=PATIENCE)
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            connection.sock.settimeout(PATIENCE)
            connection.sock.connect(str(self.socket))
            connection.request(method, quote(path, safe="/?&="))
            reply = connection.getresponse()
            body = reply.read()
        if reply.status >= 400:
            raise RuntimeError(f"{method} {path}: {reply.status} {body.decode(errors='replace')}")
        return json.loads(body) if body else None

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        """What `docker <kind> inspect <name>` shows: kind is service, node, network or container."""
        found: dict[str, Any] = self.api("GET", f"/{kind}s/{name}" + ("/json" if kind == "container" else ""))
        return found

    def load(self, image: images.Image) -> None:
        """Import an image into this node's Engine."""
        changes = [word for change in image.changes for word in ("--change", change)]
        self.docker("import", *changes, str(image.tar), image.tag)

    def close(self) -> None:
        """Kill all that runs, remove all that is left."""
        for process in (self._daemon, self._holder):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        kill_all(self.namespace.pids, f"node {self.cgroup}")  # containerd and the shims
        delete_cgroups(self.cgroup)  # the containers
        kill_all(self.namespace.pids, f"node {self.cgroup}")
        reap(orphans_named("containerd"))
        shutil.rmtree(self.directory, ignore_errors=True)


def patiently(ask: Callable[[], T]) -> T:
    """What a manager answers; asked again while it says that it cannot at the moment."""
    busy: list[RuntimeError] = []

    def answered() -> tuple[T] | None:
        try:
            return (ask(),)
        except RuntimeError as error:
            if not _AGAIN.search(str(error)):
                raise
            busy[:] = [error]
        return None

    try:
        return wait_for(answered, "a manager that answers", interval=0.2)[0]  # type: ignore[index]
    except TimeoutError:
        raise busy[0] from None


class Swarm:
    """N dockerds joined to one swarm; `nodes[0]` leads it at first. `manager` is the one that is asked."""

    def __init__(self, lab: Lab, managers: int = 1, workers: int = 0) -> None:
        self.lab = lab
        self.asked = 0
        self.managers = managers
        hosts = [lab.host(f"n{number}") for number in range(1, managers + workers + 1)]
        found = images.server_images()
        with ThreadPoolExecutor(len(hosts)) as pool:  # most of it is waiting
            self.nodes = list(pool.map(lambda host: Node(lab, host), hosts))
            for _ in pool.map(lambda node: [node.load(image) for image in found], self.nodes):
                pass
            self.manager.docker("swarm", "init", "--advertise-addr", self.manager.address)
            for node in self.nodes[1:managers]:  # a manager at a time: each changes the quorum
                self._join(node, "manager")
            list(pool.map(lambda node: self._join(node, "worker"), self.nodes[managers:]))
        wait_for(lambda: self._ready(managers + workers), "all nodes ready")

    def join(self, node: Node) -> None:
        """A further worker joins; until it is ready."""
        self._join(node, "worker")
        self.nodes.append(node)
        wait_for(lambda: self._ready(len(self.nodes)), "all nodes ready")

    def _join(self, node: Node, role: str) -> None:
        token = self.docker("swarm", "join-token", "-q", role)
        address = f"{self.manager.address}:2377"
        node.docker("swarm", "join", "--token", token, "--advertise-addr", node.address, address)

    def join_one(self, short: str) -> Node:
        """A further worker that is not among `nodes`; whoever wants it removes it from the swarm and closes it."""
        node = Node(self.lab, self.lab.host(short))
        self._join(node, "worker")
        return node

    @property
    def manager(self) -> Node:
        return self.nodes[self.asked]

    def revive(self) -> None:
        """Start what was stopped or killed, all at once: a manager alone waits for the others. Until all are ready."""
        self.asked = 0
        for node in self.nodes:
            self.lab.switch.ip("link", "set", f"p{node.address.rpartition('.')[2]}", "up")
        ended = [node for node in self.nodes if not node.running]
        if ended:
            with ThreadPoolExecutor(len(ended)) as pool:
                list(pool.map(lambda node: node.start(), ended))
        wait_for(lambda: self._ready(len(self.nodes)), "all nodes ready again", interval=0.2)

    def _ready(self, count: int) -> bool:
        try:
            nodes = self.manager.api("GET", "/nodes")
        except (OSError, RuntimeError):  # it is not up yet, or has no leader
            return False
        return [node["Status"]["State"] for node in nodes].count("ready") == count

    def docker(self, *arguments: str, check: bool = True, timeout: float = PATIENCE) -> str:
        """`docker ...` on the first manager; its output."""
        done = patiently(lambda: self.manager.docker(*arguments, check=check, timeout=timeout))
        return done.stdout.strip()

    def create(
        self,
        name: str,
        *options: str,
        replicas: int = 1,
        publish: Sequence[str] = (),
        labels: dict[str, str] | None = None,
        image: str = "mesh-lab/server:1",
        wait: bool = True,
    ) -> str:
        """`docker service create` with the stand-in server; returns the service's id.

        Args:
            options: further options of `docker service create`.
            replicas: how many tasks there are; in mode global what to wait for.
            publish: as `--publish` takes it: "8000:8080" (published:target), "5000:8082/udp", "mode=host,...".
            labels: service labels.
            wait: until all replicas run.
        """
        command = ["service", "create", "--detach", "--no-resolve-image", "--name", name]
        if "global" not in options and "--mode=global" not in options:
            command += ["--replicas", str(replicas)]
        identity = {"TASK_ID": "{{.Task.ID}}", "TASK_NAME": "{{.Task.Name}}", "NODE": "{{.Node.Hostname}}"}
        for variable, value in identity.items():
            command += ["--env", f"{variable}={value}"]
        for port in publish:
            command += ["--publish", port]
        for label, value in (labels or {}).items():
            command += ["--label", f"{label}={value}"]
        service = self.docker(*command, *options, image)
        if wait:
            self.wait_running(name, replicas)
        return service

    def update(self, name: str, *options: str, timeout: float = PATIENCE) -> None:
        """`docker service update`, waits until Docker says that it is done."""
        before = self.manager.inspect("service", name)
        self.docker("service", "update", "--detach", "--no-resolve-image", *options, name)
        replaces = self.manager.inspect("service", name)["Spec"]["TaskTemplate"] != before["Spec"]["TaskTemplate"]
        started = before.get("UpdateStatus", {}).get("StartedAt")

        def done() -> bool:
            status = self.manager.inspect("service", name).get("UpdateStatus", {})
            if replaces and status.get("StartedAt") == started:  # Docker has not begun yet
                return False
            state = status.get("State", "completed")
            if state in ("paused", "rollback_completed"):
                raise RuntimeError(f"update of {name}: {state}")
            return bool(state == "completed")

        wait_for(done, f"update of {name}", timeout=timeout)

    def tasks(self, name: str, *, running: bool = True) -> list[dict[str, Any]]:
        """The tasks of a service as the Engine API gives them; `running`: only those that run and shall run."""
        filters = json.dumps({"service": [name]})
        found: list[dict[str, Any]] = self.api("GET", f"/tasks?filters={filters}")
        return [
            t for t in found if not running or (t["Status"]["State"] == "running" and t["DesiredState"] == "running")
        ]

    def api(self, method: str, path: str, *, node: Node | None = None) -> Any:
        """A request to the Engine API of a node (default: the first manager), parsed."""
        return patiently(lambda: (node or self.manager).api(method, path))

    def wait_running(self, name: str, count: int, *, timeout: float = PATIENCE) -> None:
        """Until exactly `count` tasks of a service run and no other is on its way."""

        def running() -> bool:
            tasks = [t for t in self.tasks(name, running=False) if t["DesiredState"] == "running"]
            return len(tasks) == count and all(t["Status"]["State"] == "running" for t in tasks)

        try:
            wait_for(running, f"{count} tasks of {name}", timeout=timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.docker('service', 'ps', '--no-trunc', name, check=False)}") from None

    def containers(self, name: str, node: Node | None = None) -> list[str]:
        """Ids of the running containers of a service on a node (default: the first manager)."""
        filters = json.dumps({"label": [f"com.docker.swarm.service.name={name}"]})
        return [found["Id"] for found in (node or self.manager).api("GET", f"/containers/json?filters={filters}")]

    def remove(self, *names: str) -> None:
        """`docker service rm`, and until their containers have ended by themselves."""
        self.docker("service", "rm", *names)
        self._await_end(names)

    def reset(self) -> None:
        """Leave to the next test what the first one found: every node ready, active and in its role, and no service.

        Repairs what a test that failed has left; services are removed at once, without grace.
        """
        self.revive()
        for number, (node, described) in enumerate(zip(self.nodes, self._described(), strict=True)):
            role = "manager" if number < self.managers else "worker"
            if described["Availability"] != "active":
                self.docker("node", "update", "--availability", "active", node.hostname)
            if described["Role"] != role:
                self.docker("node", "promote" if role == "manager" else "demote", node.hostname)
        names = self.docker("service", "ls", "--format", "{{.Name}}").split()
        if not names:
            return
        self.docker("service", "rm", *names)
        for node in self.nodes:
            if found := [c for name in names for c in self.containers(name, node)]:
                node.docker("kill", *found, check=False)
        self._await_end(names)

    def _described(self) -> list[dict[str, Any]]:
        """What the swarm wants of each of `nodes`: Role and Availability."""
        found = {node["Description"]["Hostname"]: node["Spec"] for node in self.api("GET", "/nodes")}
        return [found[node.hostname] for node in self.nodes]

    def _await_end(self, names: Sequence[str]) -> None:
        def ended() -> bool:
            return not any(self.containers(name, node) for name in names for node in self.nodes)

        wait_for(ended, f"end of {', '.join(names)}")
