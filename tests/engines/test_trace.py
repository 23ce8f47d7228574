# SPDX-License-Identifier: Apache-2.0
"""`mesh trace` against the running kernel: real sockets on loopback, a real bcc program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mesh.trace.connections import ends_of

DRIVER = Path(__file__).with_name("trace_driver.py")


def state_of(port: int, address: str = "127.0.0.1") -> dict[str, object]:
    target = {"backend": "b1", "name": "web.1", "address": address, "port": port}
    frontend = {"frontend": "[*]:80/tcp", "targets": [target]}
    return {"services": [{"id": "s", "name": "web", "frontends": [frontend]}]}


def test_ends_are_backends_and_frontends() -> None:
    ends = ends_of(state_of(8080))
    assert {(key[1], end.backend) for key, end in ends.items()} == {(80, ""), (8080, "web.1")}
    assert bytes(10) + b"\xff\xff\x7f\0\0\1" in {key[0] for key in ends}


@pytest.mark.root
def test_open_close_reset_with_bytes_and_filters() -> None:
    """In a mount namespace of its own, because tracefs may not be mounted on this machine."""
    shell = 'mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", shell, "-", sys.executable, DRIVER],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert Counter(row["event"] for row in rows) == {"open": 6, "close": 5, "reset": 1}, rows
    assert {row["service"] for row in rows} == {"web"}
    closed = [row for row in rows if row["event"] == "close"]
    assert all(row["bytes_in"] == 1000 and row["bytes_out"] == 5000 for row in closed), closed
    assert all(row["duration"] > 0 and row["rtt_ms"] > 0 and row["retransmits"] == 0 for row in closed)
    [reset] = [row for row in rows if row["event"] == "reset"]
    assert reset["reason"] == "sent by the peer"
