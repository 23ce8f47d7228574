# SPDX-License-Identifier: Apache-2.0
"""A daemon that is gone, or stands still, for orphan_timeout: the node's other server of the port has it back, and
nothing is cut when the daemon returns. That server stands for Docker's own mesh."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.kernel_plane import PORT, TARGET, Connection, Plane, serve
from tests.support.daemon import Daemon
from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

TIMEOUT = 3
CALLS = 5000  # new connections that each test makes, at least
OTHER6 = f"""
import socket
s = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
while True:
    c, a = s.accept()
    c.sendall(b"docker x\\n")
    c.close()
"""


class Load:
    """New connections, one after the other, until it is closed: who answered, and what failed."""

    def __init__(self, namespace: Namespace, address: str) -> None:
        self.answers: Counter[str] = Counter()
        self.last = ""
        self.failed: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(namespace, address)) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _work(self, namespace: Namespace, address: str) -> None:
        with namespace.entered():
            while not self._ended.is_set():
                try:
                    with socket.create_connection((address, PORT), timeout=PATIENCE) as sock:
                        text = sock.recv(100)
                        sock.sendall(b"x")
                        assert text and sock.recv(1) == b"x", "closed"
                    self.last = text.split()[0].decode()
                    self.answers[self.last] += 1
                except (OSError, AssertionError) as error:
                    self.failed.append(f"{error}")

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def echo(connections: list[Connection]) -> bool:
    for connection in connections:
        connection.echo()
    return True


def calm(plane: Plane, seconds: int) -> Path:
    """The daemon's configuration file, with this transition_calm."""
    file = plane.lab.directory / "mesh.toml"
    file.write_text(f"transition_calm = {seconds}\n")
    return file


def settle(plane: Plane, daemon: Daemon) -> None:
    """Wait until no slot is in transition from the other server any more; slots do not settle again after this."""
    wait_for(lambda: settled(plane), "the take-over from the other server is over")
    calm(plane, 8100)
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "transition_calm" in daemon.tail(), "the new calm is in force")


def settled(plane: Plane) -> bool:
    """Whether no slot is in transition any more."""
    return re.search(r"transition +0 slots", mesh(plane, "maps").stdout) is not None


def mesh(plane: Plane, *command: str) -> subprocess.CompletedProcess[str]:
    line = (str(Path(sys.executable).with_name("mesh")), *command, "--state-dir", str(plane.state))
    return plane.node.run(*line, check=False, env=os.environ | {"MESH_BPF_FS": str(plane.bpffs)})


@contextlib.contextmanager
def serving(plane: Plane, **config: object) -> Iterator[Daemon]:
    """The daemon, which serves b1 and b2."""
    file = plane.lab.directory / "static.toml"
    backends = "".join(
        f'[[services.backends]]\nname = "{name}"\naddress = "{plane.namespaces[name].address}"\n'
        for name in ("b1", "b2")
    )
    file.write_text(
        f'[[services]]\nname = "web"\n[services.options]\nhealth = "off"\n'
        f"[[services.ports]]\npublished = {PORT}\ntarget = {TARGET}\n{backends}"
    )
    options: dict[str, object] = {
        "engine": "kernel",
        "provider": "static",
        "static_file": file,
        "state_dir": plane.state,
        "bpf_fs": plane.bpffs,
        "drain_timeout": 0,
        "guard_hold": 0,
        "orphan_timeout": TIMEOUT,
        "config": calm(plane, 1),
    }
    everything: dict[str, Any] = options | config
    with contextlib.closing(Daemon(plane.node, plane.lab.directory / "daemon", **everything)) as daemon:
        yield daemon


@pytest.mark.parametrize("how", ["killed", "stands still"])
def test_tables_hand_back_and_are_taken_again(plane: Plane, how: str) -> None:
    serve(plane.node, "docker", PORT)
    with serving(plane) as daemon:
        load = Load(plane.client, plane.node.address)
        try:
            wait_for(lambda: load.last in ("b1", "b2"), "the mesh serves")
            settle(plane, daemon)
            ours = [Connection(plane.client, plane.node.address) for _ in range(20)]
            if how == "killed":
                daemon.kill()
            else:
                daemon.process.send_signal(signal.SIGSTOP)
            wait_for(lambda: load.last == "docker", "handed back")
            theirs = [Connection(plane.client, plane.node.address) for _ in range(20)]
            assert {connection.backend for connection in theirs} == {"docker"}
            both = ours + theirs
            assert echo(both)
            if how == "killed":
                daemon.start()
            else:
                daemon.process.send_signal(signal.SIGCONT)
            wait_for(lambda: echo(both) and load.last in ("b1", "b2"), "taken over again")
            assert not settled(plane)
            wait_for(lambda: echo(both) and load.answers.total() >= CALLS, "enough calls", timeout=4 * PATIENCE)
        finally:
            load.close()
        assert load.failed == []
        assert load.answers["docker"] and load.answers["b1"] and load.answers["b2"]
        assert daemon.metrics()['mesh_verdicts_total{verdict="orphaned"}'] >= load.answers["docker"] / 2
        for connection in both:
            connection.close()


def test_tables_of_a_daemon_that_was_not_away_for_long_stay(plane: Plane) -> None:
    serve(plane.node, "docker", PORT)
    with serving(plane, orphan_timeout=900) as daemon:
        settle(plane, daemon)
        daemon.kill()
        assert set(plane.calls(20)) == {"b1", "b2"}
        daemon.start()
        assert set(plane.calls(20)) == {"b1", "b2"} and settled(plane)


def test_a_stop_says_what_goes_on_until_when_and_a_release_can_be_repeated(plane: Plane) -> None:
    serve(plane.node, "docker", PORT)
    with serving(plane) as daemon:
        done = mesh(plane, "stop")
        assert done.returncode == 0, done
        assert f"daemon {daemon.process.pid} stopped" in done.stdout
        assert "forward by the last tables until" in done.stdout and "mesh.deny" in done.stdout, done
        assert "`mesh stop --release` hands back now" in done.stdout
        done = mesh(plane, "status")
        assert done.returncode == 3 and "still forward by the last tables until" in done.stderr, done
        wait_for(lambda: set(plane.calls(5)) == {"docker"}, "handed back")
        done = mesh(plane, "status")
        assert "have left new connections to Docker since then" in done.stderr, done
        done = mesh(plane, "stop", "--release", "--now")
        assert done.returncode == 0 and "are removed" in done.stdout, done
        assert plane.pins() == []
        for _ in range(2):
            done = mesh(plane, "stop", "--release")
            assert done.returncode == 0 and "none has left anything" in done.stdout, done
        assert set(plane.calls(5)) == {"docker"}


def test_never(plane: Plane) -> None:
    with serving(plane, orphan_timeout=0) as daemon:
        daemon.kill()
        done = mesh(plane, "status")
        assert "forward by the last tables for good" in done.stderr, done
        assert mesh(plane, "stop", "--release", "--now").returncode == 0


@pytest.mark.parametrize("engine", ["proxy", "kernel"])
def test_a_killed_daemons_redirection_ends_by_itself(plane: Plane, engine: str) -> None:
    """The proxy engine's, or that of the fallback proxy beside the kernel engine, which IPv6 clients of an IPv4 task
    meet."""
    plane.node.popen(sys.executable, "-I", "-S", "-c", OTHER6)
    wait_for(lambda: f":{PORT} " in plane.node.run("ss", "-Htln").stdout, "the other server")
    address = plane.node.address6 if engine == "kernel" else plane.node.address

    def who() -> str:
        try:
            connection = Connection(plane.client, address)
        except OSError:
            return ""
        connection.close()
        return connection.backend

    with serving(plane, engine=engine, intercept="auto" if engine == "kernel" else "nft") as daemon:
        wait_for(lambda: who() in ("b1", "b2"), "the mesh serves")
        threading.Event().wait(2 * TIMEOUT)  # it is refreshed for as long as the daemon lives
        assert all(who() in ("b1", "b2") for _ in range(20))
        daemon.kill()
        wait_for(lambda: who() == "docker", "the redirection has ended")
        daemon.start()
        wait_for(lambda: who() in ("b1", "b2"), "the mesh serves again")
