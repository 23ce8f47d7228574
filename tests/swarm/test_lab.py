# SPDX-License-Identifier: Apache-2.0
"""The lab itself: a real swarm runs tasks, and nothing of a lab is left after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.dockerd import Swarm
from tests.lab.netns import NETNS_DIR, Lab, cgroup_directories, run, sweep

pytestmark = [pytest.mark.root, pytest.mark.swarm]


def test_swarm_runs_the_server(swarm1: Swarm) -> None:
    swarm1.create("web", replicas=2, publish=["8000:8080"])
    attached = swarm1.manager.inspect("network", "docker_gwbridge")["Containers"]
    seen = set()
    for container in swarm1.containers("web"):
        address = attached[container]["IPv4Address"].split("/")[0]
        answer = json.loads(swarm1.manager.namespace.run("curl", "-sS", "-m5", f"http://{address}:8080/").stdout)
        assert answer["node"] == swarm1.manager.hostname
        seen.add(answer["task"])
    assert seen == {t["ID"] for t in swarm1.tasks("web")}


def test_hosts_reach_each_other(lab: Lab) -> None:
    a, b = lab.host("a"), lab.host("b")
    for family, address in ((socket.AF_INET, b.address), (socket.AF_INET6, b.address6)):
        with b.entered():
            listener = socket.create_server((address, 7000), family=family)
        with listener, a.entered():
            socket.create_connection((address, 7000), timeout=5).close()


CRASH = """
import os, signal
from tests.lab.netns import Lab
from tests.lab.dockerd import Swarm
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
        timeout=120,
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
