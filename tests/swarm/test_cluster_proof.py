# SPDX-License-Identifier: Apache-2.0
"""The nodes of a real swarm agree on a key, prove themselves by it, and serve nobody who does not."""

from __future__ import annotations

import contextlib
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import WEB, Cluster, failures
from tests.support.daemon import Daemon
from tests.support.polling import PATIENCE, wait_for
from tests.support.proofs import agreed

pytestmark = [pytest.mark.root, pytest.mark.swarm]

PEER = 9552
HEADER = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x1a\x0a\0\0\x01\x0a\0\0\x02\x04\xd2\0\x50\xe0\0\x0b" + b"no such b!" + b"\0"
)  # a flow for a backend that no node has


def rotate(daemon: Daemon) -> tuple[int, str]:
    """`mesh keys rotate` there: exit code, and what it said."""
    command = [sys.executable, "-m", "mesh", "keys", "rotate", "--state-dir", str(daemon.config["state_dir"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_nodes_prove_themselves(cluster5: Cluster) -> None:
    wait_for(lambda: agreed(cluster5), "all agents have one key and demand proofs")
    for daemon in cluster5.daemons:
        assert stat.S_IMODE((Path(str(daemon.config["state_dir"])) / "keys.json").stat().st_mode) == 0o600
        assert daemon.state()["problems"] == []
    cluster5.swarm.create("web", replicas=5, publish=[f"{WEB}:8080"])
    cluster5.agree("web", 5)
    with cluster5.load() as loads:
        loads.wait_more(50)
        there, here = cluster5.swarm.nodes[0], cluster5.swarm.nodes[1]
        with contextlib.suppress(ConnectionError), here.namespace.entered():
            sock = socket.create_connection((there.address, PEER), PATIENCE)
            with sock:
                sock.sendall(HEADER)
                assert sock.recv(1) == b""
        loads.wait_more(50)
        before = agreed(cluster5)
        assert rotate(cluster5.daemons[-1])[0] == 4  # a worker says who can
        code, said = rotate(cluster5.daemons[0])
        assert code == 0 and "waiting" in said, said
        wait_for(lambda: agreed(cluster5) not in ("", before), "all agents use the new key")
        loads.wait_more(50)
        assert failures(loads.stop()) == {}
    assert not any(daemon.state()["problems"] for daemon in cluster5.daemons)
    key = agreed(cluster5)
    cluster5.daemons[0].stop()  # a manager: a restart of its agent keeps the key
    cluster5.daemons[0].start()
    wait_for(lambda: agreed(cluster5), "the key is agreed on again")
    assert agreed(cluster5) == key
