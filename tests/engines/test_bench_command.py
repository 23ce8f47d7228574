# SPDX-License-Identifier: Apache-2.0
"""`mesh bench` on a node, with each engine: what it says about services that really run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.engines.topology import ECHO, UDP, WEB, Topology
from tests.support.lab.netns import Namespace

pytestmark = pytest.mark.root


def mesh_bench(topology: Topology, where: Namespace, *options: str) -> subprocess.CompletedProcess[str]:
    state = str(topology.lab.directory / "mesh" / "state") if where is topology.node else "/nonexistent"
    command = [sys.executable, "-m", "mesh", "bench", "--state-dir", state, "-n", "300", "-t", "60", "-c", "4"]
    return where.run(*command, *options, check=False)


def answer(topology: Topology, where: Namespace, *options: str) -> Any:
    done = mesh_bench(topology, where, "--json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_on_a_node_it_compares_with_the_tasks_and_knows_who_answered(topology: Topology) -> None:
    told = answer(topology, topology.node, str(WEB))
    assert (told["kind"], told["service"], told["engine"]) == ("http", "web", topology.engine)
    assert {end["host"] for end in told["behind"]} == {host.address for host in topology.hosts.values()}
    assert [phase["name"] for phase in told["phases"]] == [
        "new connections, one request each",
        "requests on kept connections",
    ]
    for phase in told["phases"]:
        for side in ("through", "direct"):
            found = phase["sides"][side]
            assert (found["operations"], found["errors"], found["answers"]) == (300, {}, {"200": 300})
            assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"] <= found["latency_ms"]["max"]
    counts = told["distribution"]["counts"]
    assert set(counts) == {f"web/{name}" for name in topology.hosts} or set(counts) == set(topology.hosts)
    assert sum(counts.values()) >= 100
    assert "as the daemon counted" in told["distribution"]["how"]


def test_from_another_host_it_measures_what_that_host_sees(topology: Topology) -> None:
    told = answer(topology, topology.client, f"http://{topology.node.address}:{WEB}/", "--by", "body")
    assert [set(phase["sides"]) for phase in told["phases"]] == [{"through"}] * 2
    assert len(told["distribution"]["counts"]) >= len(topology.hosts)


def test_tcp_and_udp(topology: Topology) -> None:
    told = answer(topology, topology.node, f"tcp://{topology.node.address}:{ECHO}", "--echo", "--size", "2000")
    assert [phase["sides"]["through"]["received"] for phase in told["phases"]] == [600_000] * 2
    told = answer(topology, topology.client, f"udp://{topology.node.address}:{UDP}", "--send", "a\\x00b")
    assert [phase["sides"]["through"]["operations"] for phase in told["phases"]] == [300] * 2
    told = answer(topology, topology.node, "echo", "--no-direct")
    assert [set(phase["sides"]) for phase in told["phases"]] == [{"through"}]


def test_for_people(topology: Topology) -> None:
    done = mesh_bench(topology, topology.node, "web")
    assert done.returncode == 0, done.stderr
    for text in ("through/direct", "p99.9, ms", "from, ms", "distribution over backends", "of 2"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    done = mesh_bench(topology, topology.client, f"tcp://{topology.node.address}:4711")
    assert done.returncode == 1 and "refused" in done.stderr
    assert mesh_bench(topology, topology.node, "nothing").returncode == 4
    assert mesh_bench(topology, topology.client, "nothing").returncode == 3


def test_calls_that_fail_are_an_exit_code(topology: Topology) -> None:
    done = mesh_bench(topology, topology.node, f"tcp://127.0.0.1:{WEB}", "--echo", "-n", "20", "--timeout", "0.2")
    assert done.returncode == 1 and "ERROR" in done.stdout
