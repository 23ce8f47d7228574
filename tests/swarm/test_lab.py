# SPDX-License-Identifier: Apache-2.0
"""The lab itself: a real swarm runs tasks, and nothing of a lab is left after it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import pytest

from tests.support.lab import images
from tests.support.lab.dockerd import Swarm
from tests.support.lab.netns import NETNS_DIR, Lab, Namespace, cgroup_directories, run, sweep
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]


def test_swarm_runs_the_server(swarm1: Swarm) -> None:
    swarm1.create("web", replicas=2, publish=["8000:8080"])
    attached = swarm1.manager.inspect("network", "docker_gwbridge")["Containers"]
    seen = set()
    for container in swarm1.containers("web"):
        address = attached[container]["IPv4Address"].split("/")[0]
        answer = json.loads(swarm1.manager.namespace.run("curl", "-sS", "-m60", f"http://{address}:8080/").stdout)
        assert answer["node"] == swarm1.manager.hostname
        seen.add(answer["task"])
    assert seen == {t["ID"] for t in swarm1.tasks("web")}


def test_three_nodes_share_a_service(swarm3: Swarm) -> None:
    swarm3.create("web", "--mode", "global", publish=["8000:8080"], replicas=3)
    for node in swarm3.nodes:
        (container,) = swarm3.containers("web", node)
        assert node.inspect("container", container)["Config"]["Labels"]["com.docker.swarm.service.name"] == "web"
    assert len({t["NodeID"] for t in swarm3.tasks("web")}) == 3


def test_hosts_reach_each_other(lab: Lab) -> None:
    a, b = lab.host("a"), lab.host("b")
    for family, address in ((socket.AF_INET, b.address), (socket.AF_INET6, b.address6)):
        with b.entered():
            listener = socket.create_server((address, 7000), family=family)
        with listener, a.entered():
            socket.create_connection((address, 7000), timeout=PATIENCE).close()


CRASH = """
import os, signal
from tests.support.lab.netns import Lab
from tests.support.lab.dockerd import Swarm
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
swarm = Swarm(Lab())
swarm.create("web")
print(swarm.lab.prefix, *swarm.manager.namespace.pids(), flush=True)
os.kill(os.getpid(), signal.{how})
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_nothing_is_left(how: str) -> None:
    """After ctrl-C at once, after a kill with the next run's sweep."""
    ended = subprocess.run(
        [sys.executable, "-c", CRASH.format(how=how)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert ended.returncode == -getattr(signal, how), ended.stderr
    prefix, *pids = ended.stdout.split()
    if how == "SIGKILL":
        assert (NETNS_DIR / f"{prefix}-n1").exists()
        sweep()
    assert not list(NETNS_DIR.glob(f"{prefix}*"))
    assert not cgroup_directories(prefix)
    assert not list(Path("/tmp").glob(f"{prefix}*"))
    assert prefix not in run("mount").stdout
    alive = run("ps", "-o", "pid=,stat=,args=", *pids, check=False).stdout.splitlines()
    assert not [line for line in alive if " Z" not in line]


@pytest.fixture
def server(lab: Lab, tmp_path: Path) -> tuple[Namespace, subprocess.Popen[bytes]]:
    """The stand-in server without a container."""
    with tarfile.open(images.server()) as tar:
        tar.extractall(tmp_path, filter="data")
    host = lab.host("server")
    process = host.popen(str(tmp_path / "server"), stdout=subprocess.DEVNULL)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            connect(host).close()
            return True
        return False

    wait_for(answers, "the server")
    return host, process


def connect(host: Namespace, port: int = images.HTTP_PORT) -> socket.socket:
    with host.entered():
        return socket.create_connection((host.address, port), timeout=PATIENCE)


def ask(connection: socket.socket, request: bytes) -> http.client.HTTPResponse:
    connection.sendall(request)
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return reply


def test_server_checks_integrity(server: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    host, _ = server
    with connect(host) as connection:
        assert ask(connection, b"GET /bytes?n=1000000 HTTP/1.1\r\n\r\n").read() == images.pattern(1000000)
        body = images.pattern(300001)
        head = f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        said = json.loads(ask(connection, head + body).read())
        assert said == {"bytes": len(body), "crc32": f"{zlib.crc32(body):08x}"}
    with connect(host, images.ECHO_PORT) as connection:
        connection.sendall(b"echo")
        connection.shutdown(socket.SHUT_WR)
        assert connection.makefile("rb").read() == b"echo"
    with host.entered():
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with datagrams:
        datagrams.settimeout(PATIENCE)
        datagrams.sendto(b"payload", (host.address, images.UDP_PORT))
        assert datagrams.recv(2000) == socket.gethostname().encode() + b" payload"


def test_server_understands_proxy_v2(server: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    host, _ = server
    addresses = bytes([203, 0, 113, 7, 192, 0, 2, 1]) + struct.pack("!HH", 4444, 8000)
    header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack("!H", len(addresses)) + addresses
    with connect(host) as connection:
        said = json.loads(ask(connection, header + b"GET / HTTP/1.1\r\n\r\n").read())
        assert said["proxied"] == "203.0.113.7:4444"
        assert said["peer"].startswith(f"{host.address}:")


def test_server_finishes_what_is_in_flight(server: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    host, process = server
    with connect(host) as idle, connect(host) as fresh, connect(host) as busy:
        assert ask(idle, b"GET / HTTP/1.1\r\n\r\n").read()
        reply = ask(busy, b"GET /slow?seconds=1 HTTP/1.1\r\n\r\n")
        process.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""
        assert ask(fresh, b"GET / HTTP/1.1\r\n\r\n").read()  # made before the end, asked after it
        assert len(reply.read()) == 80
    assert process.wait(PATIENCE) == 0


def test_mounts_of_dead_processes_are_swept() -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = Path(tempfile.mkdtemp(prefix=f"mesh{int(ended.stdout)}-0-"))
    (left / "bpf").mkdir()
    run("mount", "-t", "bpf", "bpf", str(left / "bpf"))
    sweep()
    assert not left.exists()
    assert str(left) not in Path("/proc/mounts").read_text()
