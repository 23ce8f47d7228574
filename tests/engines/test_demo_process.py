# SPDX-License-Identifier: Apache-2.0
"""`mesh run` where there is no Docker: the demo answers, everything that it prints works, and it ends cleanly."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.metrics import families
from mesh.providers.demo import BACKENDS
from tests.support.lab.demo import Demo, get
from tests.support.polling import PATIENCE


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo")) as running:
        yield running


def hello(demo: Demo) -> str:
    status, body = get(f"http://127.0.0.1:{demo.published}/")
    match = re.match(r"Hello from (demo\.\d) at ", body)
    assert status == 200 and match is not None, body
    return match[1]


def test_every_backend_answers(demo: Demo) -> None:
    assert len(Counter(hello(demo) for _ in range(200))) == BACKENDS


def test_the_commands_that_are_printed_work(demo: Demo) -> None:
    """Each line of the welcome that starts with two spaces, as it stands, by a shell."""
    commands = re.findall(r"^  (\S.*)$", demo.output(), re.MULTILINE)
    commands = [c for c in commands if re.match(r"curl |for |(\S+ -m )?mesh ", c)]
    assert len(commands) >= 7
    for command in commands:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0 and done.stdout, (command, done.stderr)
    assert demo.mesh("undrain", "backend", "demo.1")[0] == 0


def test_status_and_tables(demo: Demo) -> None:
    status = demo.json("status")
    assert (status["ready"], status["engine"], status["provider"]["kind"]) == (True, "proxy", "demo")
    code, text = demo.mesh("status")
    assert code == 0 and "1 services, 1 of 1 ports, 5 backends" in text
    assert f"*:{demo.published}/tcp" in demo.mesh("services")[1]
    backends = demo.json("backends", "demo")
    assert len(backends) == BACKENDS
    assert sum(b["slots"] for b in backends) == backends[0]["table_size"]


def test_explain_tells_the_truth(demo: Demo) -> None:
    """What explain says of a connection is where the connection then goes."""
    import http.client
    import socket

    for number in range(20):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            source, to = f"127.0.0.1:{sock.getsockname()[1]}", f"127.0.0.1:{demo.published}"
            if number:  # what the command asks
                said = json.loads(get(f"http://{demo.http}/explain?source={source}&destination={to}&protocol=tcp")[1])
            else:
                said = demo.json("explain", source, to)
            sock.connect(("127.0.0.1", demo.published))
            connection = http.client.HTTPConnection("127.0.0.1")
            connection.sock = sock
            connection.request("GET", "/")
            body = connection.getresponse().read().decode()
        assert body.startswith(f"Hello from {said['backend']['name']} ")
    code, text = demo.mesh("explain", "127.0.0.1:40000", "127.0.0.1:1")
    assert code == 4 and "not published" in text


def test_drain_and_undrain(demo: Demo) -> None:
    assert demo.mesh("drain", "backend", "demo.2")[0] == 0
    try:
        demo._wait(lambda: {b["name"]: b["weight"] for b in demo.json("backends")}["demo.2"] == 0)
        assert "demo.2" not in Counter(hello(demo) for _ in range(60))
        assert "backend demo.2" in demo.mesh("status")[1]
    finally:
        assert demo.mesh("undrain", "backend", "demo.2")[0] == 0
    demo._wait(lambda: {b["name"]: b["weight"] for b in demo.json("backends")}["demo.2"] > 0)
    assert demo.mesh("drain", "backend", "demo")[0] == 4  # may be any of five


def test_metrics_are_declared_counted_and_clean(demo: Demo) -> None:
    def opened() -> float:
        body = get(f"http://{demo.http}/metrics")[1]
        match = re.search(r"^mesh_connections_opened_total\{[^}]*\} (\d+)", body, re.MULTILINE)
        return float(match[1]) if match else 0.0

    before = opened()
    for _ in range(10):
        hello(demo)
    demo._wait(lambda: opened() == before + 10)
    body = get(f"http://{demo.http}/metrics")[1]
    declared = {family.name: family for family in (*families.FAMILIES, *families.ENGINE.values())}
    for name, text in re.findall(r"^# HELP (mesh_\S+) (.*)$", body, re.MULTILINE):
        assert declared[name].help == text
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_sigterm_lets_a_request_end(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        slow = subprocess.Popen(
            ["curl", "-sS", f"http://127.0.0.1:{demo.published}/slow"], stdout=subprocess.PIPE, text=True
        )
        opened = re.compile(r"^mesh_connections_opened_total\{[^}]*\} [1-9]", re.MULTILINE)
        demo._wait(lambda: opened.search(get(f"http://{demo.http}/metrics")[1]))
        assert demo.stop() == 0, demo.output()
        assert slow.communicate(timeout=PATIENCE)[0].startswith("Hello from demo.")
        assert "Traceback" not in demo.output()
        assert demo.mesh("status")[0] == 3


def test_ctrl_c_is_as_good(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        hello(demo)
        assert demo.stop(signal.SIGINT) == 0, demo.output()


def test_mesh_stop(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        code, text = demo.mesh("stop", "--release")
        assert code == 0 and f"daemon {demo.process.pid} stopped" in text
        assert demo.process.wait(PATIENCE) == 0
