# SPDX-License-Identifier: Apache-2.0
"""A SYN flood on a published port while connections are under way in tables in transition."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engines.kernel_plane import PORT, Connection, Plane

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FLOOD = Path(__file__).parents[2] / "bench" / "load" / "flood.c"
CHUNK, CHUNKS = 1 << 16, 300
RATE, SECONDS = 15_000, 1
CACHE = 1024


def transfer(connection: Connection) -> float:
    """Bytes per second of CHUNKS chunks there and back, each compared."""
    started = time.monotonic()
    for _ in range(CHUNKS):
        connection.echo(CHUNK)
    return CHUNK * CHUNKS / (time.monotonic() - started)


def test_connections_go_on_through_a_flood_of_starts(plane: Plane, record_property: Any) -> None:
    """After a take-over every slot is in transition: starts fill the flow cache and the openings, nothing else."""
    program = plane.lab.directory / "flood"
    subprocess.run(["gcc", "-O2", "-std=gnu11", "-o", program, FLOOD], check=True)
    attacker = plane.lab.host("attacker")
    engine = plane.driver(flow_cache=CACHE)
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    idle = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in idle:
        connection.echo()
    bulk = Connection(plane.client, plane.node.address)
    calm = transfer(bulk)
    command = (str(program), "198.18.0.0", plane.node.address, str(PORT), str(RATE), str(SECONDS))
    rates: list[float] = []
    while (stats := engine.stats())["verdicts"]["started"] <= 10 * CACHE:
        with attacker.popen(*command, stdout=subprocess.PIPE, text=True) as flood:
            rates.append(transfer(bulk))
            while flood.poll() is None:
                rates.append(transfer(bulk))
            assert flood.returncode == 0 and json.loads(flood.stdout.read())["sent"] > 0  # type: ignore[union-attr]
    record_property("throughput_under_flood", round(sum(rates) / len(rates) / calm, 3))
    entries = engine.entries()
    assert entries["flows_new"] <= 65536 >= entries["revnat_new"]
    assert entries["flows"] == entries["revnat"] == len(idle) + 1  # no start that nobody follows up gets in
    assert stats["frontends"]["*:8000/tcp"]["opened"] == len(idle) + 1
    for connection in idle:
        connection.echo()
    transfer(bulk)
    assert sum(plane.calls(20).values()) == 20  # new ones are served as before
    for connection in (*idle, bulk):
        connection.close()
    engine.close(release=True)
    engine.end()
    assert plane.pins() == []
