# SPDX-License-Identifier: Apache-2.0
"""The daemon as a real process: static file, proxy engine, loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.polling import PATIENCE, wait_for
from tests.support.ports import free_port


class Named(socketserver.StreamRequestHandler):
    """Says its server's name; then `hold` keeps the connection until the client says something."""

    def handle(self) -> None:
        self.wfile.write(self.server.name)  # type: ignore[attr-defined]
        if self.rfile.readline().strip() == b"hold":
            self.wfile.write(self.rfile.readline())


class Backend(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Named)
        self.name = name.encode() + b"\n"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A probe that goes without listening is no error."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class World:
    """Three backends, a static file, and daemons that serve it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.port, self.http = free_port(), free_port()
        self.backends = {name: Backend(name) for name in ("a", "b", "c")}
        self.draining: set[str] = set()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.config = directory / "mesh.toml"
        self.configure()
        self.write()

    def configure(self, **more: object) -> None:
        keys = {
            "provider": "static",
            "engine": "proxy",
            "intercept": "bind",
            "static_file": str(self.directory / "static.toml"),
            "state_dir": str(self.state_dir),
            "http_listen": f"127.0.0.1:{self.http}",
            "drain_timeout": 20.0,
            "threads": 2,
            **more,
        }
        self.config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))

    def write(self, published: int = 0) -> None:
        lines = ["[[services]]", 'name = "web"', "[[services.ports]]", f"published = {published or self.port}"]
        lines += ["target = 1"]
        for name, backend in self.backends.items():
            lines += ["[[services.backends]]", f'name = "{name}"', 'address = "127.0.0.1"', f"port = {backend.port}"]
            lines += [f"draining = {str(name in self.draining).lower()}"]
        new = self.directory / "static.new"
        new.write_text("\n".join(lines) + "\n")
        new.rename(self.directory / "static.toml")

    def spawn(self, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mesh", "run", "--config", str(self.config), *flags]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MESH_", "NOTIFY_"))}
        log = (self.directory / f"log{len(self.processes)}").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        log.close()
        self.processes.append(process)
        return process

    def log(self, number: int = -1) -> str:
        return (self.directory / f"log{number % len(self.processes)}").read_text()

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        process = self.spawn(*flags)

        def ready() -> bool:
            assert process.poll() is None, self.log()
            return self.get("/readyz")[0] == 200 and self.state()["pid"] == process.pid

        wait_for(ready, "ready")
        return process

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                return 0, b""

    def state(self) -> dict[str, Any]:
        """What it says; while it does not, that of nobody."""
        status, body = self.get("/state")
        nobody = {"pid": 0, "services": [], "problems": [], "generation": {"applied": 0, "desired": 1}}
        return json.loads(body) if status == 200 else nobody

    def weights(self) -> dict[str, int]:
        found = {}
        for service in self.state()["services"]:
            for frontend in service["frontends"]:
                found |= {t["name"] or t["backend"]: t["weight"] for t in frontend["targets"]}
        return found

    def call(self, port: int = 0) -> str:
        with socket.create_connection(("127.0.0.1", port or self.port), timeout=PATIENCE) as connection:
            connection.sendall(b"bye\n")
            data = b""
            while chunk := connection.recv(100):
                data += chunk
            return data.decode().strip()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for backend in self.backends.values():
            backend.stop()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_every_backend_answers_and_an_edit_is_followed(world: World) -> None:
    world.start()
    assert {world.call() for _ in range(60)} == {"a", "b", "c"}
    world.draining = {"a"}
    world.write()
    wait_for(lambda: world.weights() == {"a": 0, "b": 1, "c": 1}, "draining")
    assert {world.call() for _ in range(60)} == {"b", "c"}
    other = free_port()
    world.write(other)
    wait_for(lambda: f"*:{other}/tcp" in world.get("/state")[1].decode(), "the other port")
    wait_for(lambda: world.state()["generation"]["applied"] == world.state()["generation"]["desired"], "applied")
    assert world.call(other) in {"b", "c"}
    with pytest.raises(ConnectionRefusedError):
        world.call()


def test_killed_and_started_again_it_serves_and_remembers_what_was_drained(world: World) -> None:
    process = world.start()
    drain = [sys.executable, "-m", "mesh", "drain", "backend", "b", "--state-dir", str(world.state_dir)]
    done = subprocess.run(drain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: world.weights() == {"a": 1, "b": 0, "c": 1}, "drained")
    process.kill()
    process.wait()
    world.start()
    assert world.weights() == {"a": 1, "b": 0, "c": 1}
    assert {world.call() for _ in range(40)} == {"a", "c"}


def test_a_dead_backend_gets_nothing_and_all_dead_is_shouted_about(world: World) -> None:
    world.start()
    wait_for(lambda: {t["health"] for t in targets(world)} == {"up"}, "first verdicts")
    world.backends["a"].stop()
    while world.weights().get("a", 1):
        assert world.call() in {"b", "c"}  # the next choice, meanwhile
    for name in ("b", "c"):
        world.backends[name].stop()
    wait_for(lambda: any("all are used again" in p for p in world.state()["problems"]), "panic")
    assert set(world.weights().values()) == {1}
    assert "EVERY BACKEND IS DOWN" in world.log()


def test_the_last_backend_goes_from_the_file_once_it_is_dead(world: World) -> None:
    world.start()
    names, world.backends = world.backends, {"a": world.backends["a"]}
    for name in ("b", "c"):
        names[name].stop()
    world.write()
    wait_for(lambda: set(world.weights()) == {"a"}, "one backend")
    alone, world.backends = world.backends["a"], {}
    world.write()
    wait_for(lambda: "it is the service's last" in world.log(), "held back")
    assert world.call() == "a"  # the source may be wrong: it lives
    alone.stop()
    wait_for(lambda: not world.weights(), "let go")


def targets(world: World) -> list[dict[str, Any]]:
    return [t for s in world.state()["services"] for f in s["frontends"] for t in f["targets"]]


def test_a_second_daemon_is_refused_by_pid(world: World) -> None:
    process = world.start()
    second = world.spawn("--http-listen=")
    assert second.wait(PATIENCE) == 1
    assert f"pid {process.pid}" in world.log()
    assert "--take-over" in world.log()
    assert world.call() in {"a", "b", "c"}


def test_sighup_takes_new_values_and_refuses_broken_ones(world: World) -> None:
    process = world.start()
    world.configure(panic_threshold=0.9, threads=1)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: "configuration reloaded" in world.log(), "reload")
    assert "panic_threshold" in world.log()
    assert "take effect at the next start" in world.log()
    world.configure(panic_treshold=0.9)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: "did you mean panic_threshold?" in world.log(), "refusal")
    assert world.call() in {"a", "b", "c"}
    wait_for(lambda: any("did you mean panic_threshold?" in said for said in world.state()["problems"]), "status")
    world.configure(panic_threshold=0.8)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: not world.state()["problems"], "the mended file")


def test_a_deprecated_key_is_used_and_shown_until_it_is_renamed(world: World) -> None:
    """A file of an older build must not stop the node."""
    world.configure(vips="192.0.2.240")
    process = world.start()
    assert world.call() in {"a", "b", "c"}
    assert any("vips is deprecated (rename it to floating_addresses)" in said for said in world.state()["problems"])
    assert world.log().count("vips is deprecated") == 1
    world.configure(floating_addresses="192.0.2.240")
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: not world.state()["problems"], "the mended file")
    assert "take effect at the next start" not in world.log()  # it is the same value


def test_sigterm_waits_for_connections_within_the_bound(world: World) -> None:
    world.configure(drain_timeout=3600.0)
    process = world.start()
    with socket.create_connection(("127.0.0.1", world.port), timeout=PATIENCE) as held:
        held.sendall(b"hold\n")
        assert held.recv(100).strip() in {b"a", b"b", b"c"}
        process.terminate()
        wait_for(lambda: world.state().get("stopping"), "stopping")
        wait_for(lambda: refused(world.port), "closed port")
        assert process.poll() is None
        held.sendall(b"still here\n")
        assert held.recv(100) == b"still here\n"
    assert process.wait(PATIENCE) == 0
    assert [path.name for path in world.state_dir.iterdir()] == ["lock"]


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_sigterm_ends_it_at_once(world: World) -> None:
    world.configure(drain_timeout=3600.0)
    process = world.start()
    with socket.create_connection(("127.0.0.1", world.port), timeout=PATIENCE) as held:
        held.sendall(b"hold\n")
        held.recv(100)
        process.terminate()
        wait_for(lambda: world.state().get("stopping"), "stopping")
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_take_over_under_load_loses_nothing(world: World) -> None:
    old = world.start()
    failures: list[str] = []
    done = threading.Event()
    calls = [0, 0]

    def load(index: int) -> None:
        while not done.is_set():
            try:
                if (answer := world.call()) not in {"a", "b", "c"}:
                    failures.append(f"answer {answer!r}")
            except OSError as error:
                failures.append(repr(error))
            calls[index] += 1

    threads = [threading.Thread(target=load, args=(index,), daemon=True) for index in range(2)]
    with socket.create_connection(("127.0.0.1", world.port), timeout=PATIENCE) as held:
        held.sendall(b"hold\n")
        held.recv(100)
        for thread in threads:
            thread.start()
        new = world.start("--take-over")
        wait_for(lambda: "handed over" in world.log(0), "hand-over")
        assert old.poll() is None  # it keeps what it has
        at_hand_over = sum(calls)
        wait_for(lambda: sum(calls) > at_hand_over + 200, "calls after the hand-over")
        held.sendall(b"still here\n")
        assert held.recv(100) == b"still here\n"
    assert old.wait(PATIENCE) == 0
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert (world.state_dir / "lock").read_text().strip() == str(new.pid)
    third = world.spawn("--http-listen=")
    assert third.wait(PATIENCE) == 1
    assert f"pid {new.pid}" in world.log()
    assert world.state()["pid"] == new.pid


def test_a_take_over_that_fails_leaves_everything_as_it_was(world: World) -> None:
    old = world.start()
    broken = world.spawn("--take-over", "--static-file", str(world.directory / "nowhere.toml"))
    wait_for(lambda: "handing over" in world.log(0), "begin")
    broken.kill()
    broken.wait()
    wait_for(lambda: "this process keeps serving" in world.log(0), "end")
    world.draining = {"a"}
    world.write()
    wait_for(lambda: world.weights() == {"a": 0, "b": 1, "c": 1}, "the old one follows changes")
    assert old.poll() is None
    assert {world.call() for _ in range(40)} == {"b", "c"}


def test_take_over_where_nobody_runs_just_starts(world: World) -> None:
    world.start("--take-over")
    assert world.call() in {"a", "b", "c"}
