# SPDX-License-Identifier: Apache-2.0
"""deploy/mesh.service under a real systemd: the kernel engine works in the unit's sandbox, and its pins outlive it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.datapath.stop_rules import closed_table
from tests.engines import sandbox_probe
from tests.engines.topology import ECHO, WEB, Spec, Topology
from tests.support import peers
from tests.support.lab.netns import Lab
from tests.support.lab.systemd import Systemd, missing, program
from tests.support.polling import PATIENCE, wait_for

UNIT = Path(__file__).parents[2] / "deploy" / "mesh.service"
EXPOSURE = 40  # of 100; systemd-analyze prints tenths

DROP_IN = """
[Service]
Environment=MESH_PROVIDER=static MESH_STATIC_FILE=/lab/mesh-static.toml MESH_ENGINE={engine} MESH_DRAIN_TIMEOUT=1
Environment=MESH_ON_STOP=closed
StandardOutput=append:/lab/unit.log
StandardError=append:/lab/unit.log
"""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_units_exposure_is_low() -> None:
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE}", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_has_no_mistake(tmp_path: Path) -> None:
    """systemd ignores what it does not know, so a misspelt option protects nothing."""
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"(?m)^(ExecStart=)\S+", r"\1/bin/true", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]
    assert not said


def state(topology: Topology) -> dict[str, Any]:
    """The answer of GET /state; empty: none."""
    try:
        with topology.node.entered():
            connection = http.client.HTTPConnection("127.0.0.1", 9550, timeout=PATIENCE)
            connection.connect()
        connection.request("GET", "/state")
        return dict(json.loads(connection.getresponse().read()))
    except OSError:
        return {}


def probe_unit() -> str:
    """The unit with another program, which ends by itself."""
    text = re.sub(r"(?m)^ExecStart=.*", "ExecStart=/opt/mesh/bin/probe", UNIT.read_text())
    return re.sub(r"(?m)^(WatchdogSec|Restart|ExecReload)=.*", "", text.replace("Type=notify", "Type=oneshot"))


@contextlib.contextmanager
def engine_socket(lab: Lab) -> Iterator[None]:
    """The Engine's socket and a file of another user, where sandbox_probe.py looks for them."""
    path, other = lab.directory / sandbox_probe.ENGINE.name, lab.directory / "other"
    other.mkdir(mode=0o700)
    (other / "key").write_text("x")
    (other / "key").chmod(0o600)
    for each in (other / "key", other):
        os.chown(each, 1000, 1000)
    lab.directory.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o660)
        sock.listen()
        yield


@pytest.mark.root
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_units_sandbox_allows_what_the_daemon_does_and_nothing_else(lab: Lab) -> None:
    files = {
        "etc/systemd/system/probe.service": probe_unit(),
        f"etc/systemd/system/{UNIT.name}.d/test.conf": "[Unit]\nConditionPathExists=/nowhere\n",
        "opt/mesh/bin/probe": program("tests.engines.sandbox_probe"),
    }
    with engine_socket(lab):
        systemd = Systemd(lab, lab.host("node"), UNIT, files)
        wait_for(lambda: not systemd.run("systemctl", "is-system-running").returncode, "systemd is up", interval=0.1)
        done = systemd.run("systemctl", "start", "probe.service")
        assert done.returncode == 0, systemd.tail()
        assert json.loads(systemd.run("cat", str(sandbox_probe.REPORT)).stdout) == {}


@pytest.mark.root
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("engine", ["kernel", "proxy"])
def test_an_engine_works_in_the_units_sandbox(lab: Lab, engine: str) -> None:
    topology = Topology(lab, engine, backends=2)
    open_to_all = Spec("web", (f"{WEB}:8080/tcp",), ("b1", "b2"), {}, {"health": "off"})
    rules = {"health": "off", "deny": topology.client.address}
    topology.write((open_to_all, Spec("closed", (f"{ECHO}:8080/tcp",), ("b1",), {}, rules)))
    drop_in = f"etc/systemd/system/{UNIT.name}.d/test.conf"
    systemd = Systemd(lab, topology.node, UNIT, {drop_in: DROP_IN.format(engine=engine)})
    unit_log = lab.directory / "unit.log"

    def active() -> bool:
        found = systemd.show("ActiveState", "Result", "NRestarts", "ExecMainStatus", "StatusText")
        said = unit_log.read_text() if unit_log.exists() else ""
        failed = found.get("NRestarts", "0") != "0" or found.get("ActiveState") == "failed"
        assert not failed, "\n---\n".join((str(found), said, systemd.tail()))
        return found.get("ActiveState") == "active"

    def serves() -> None:
        wait_for(active, "the unit is up", interval=0.1)
        address = topology.node.address
        assert peers.load(topology.client, address, WEB, "-n", "20", "-c", "4", "-u", "/").ok == 20
        denied = topology.client.run("curl", "-sf", "-m", "0.5", f"http://{address}:{ECHO}/", check=False)
        assert denied.returncode, denied.stdout
        calls = [systemd.run("curl", "-sf", f"http://{address}:{WEB}/") for _ in range(4)]
        assert not any(call.returncode for call in calls), calls  # the node's own processes

    serves()
    found = state(topology)
    assert (found["engine"], found["problems"]) == (engine, [])
    status = systemd.run("cat", f"/proc/{systemd.show('MainPID')['MainPID']}/status").stdout
    assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status
    assert systemd.run("systemctl", "restart", UNIT.name).returncode == 0, unit_log.read_text()
    serves()
    if engine == "kernel":  # what one daemon has pinned, outside of its sandbox, the next one finds
        assert systemd.run("sh", "-c", "ls /sys/fs/bpf/mesh/*").stdout
        assert "restored=2" in unit_log.read_text().rpartition("mesh starts")[2]
    assert systemd.run("systemctl", "stop", UNIT.name).returncode == 0
    assert systemd.show("Result")["Result"] == "success"
    said = unit_log.read_text()
    assert "level=error" not in said and "Traceback" not in said, said
    assert closed_table("/run/mesh") in topology.node.run("nft", "list", "tables").stdout
