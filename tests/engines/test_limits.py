# SPDX-License-Identifier: Apache-2.0
"""At its limits and at its end the daemon pauses, waits and counts; it does not spin, die or cut what is under way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.topology import HTTP_PORT, STREAM, WEB, Topology
from tests.support import peers
from tests.support.polling import PATIENCE, wait_for

pytestmark = pytest.mark.root


@pytest.mark.only("proxy")  # the kernel engine holds no connection: it has no such limit
def test_limit_of_connections_pauses_accepting(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=2)
    daemon = topology.serve(max_connections=50)
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "2000", "-c", "200")
    assert (report.ok, report.failures) == (2000, ())
    with peers.Load(topology.client, topology.node.address, WEB, "-c", "50", "-k", "3600000") as kept:
        kept.wait_ready()
        with peers.Load(topology.client, topology.node.address, WEB, "-n", "20", "-c", "20") as waiting:
            wait_for(lambda: daemon.total("mesh_accept_paused_threads") > 0, "accepting is paused")
            began, spent = time.monotonic(), processor_time(daemon.process.pid)
            time.sleep(1)
            assert daemon.total("mesh_connections_active", service="web") <= 50
            # A thread that spins takes a core.
            assert processor_time(daemon.process.pid) - spent < 0.5 * (time.monotonic() - began)
            assert waiting.running
            kept.stop()
            assert waiting.wait().ok == 20
    assert daemon.total("mesh_accept_pauses_total") > 0


def processor_time(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.only("proxy")  # the kernel engine makes no connections: health finds such a backend
def test_a_backend_that_does_not_answer_costs_time_but_no_connection(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=3)
    topology.serve(connect_timeout=1.0)
    topology.hosts["b3"].namespace.run("nft", "add", "table", "inet", "deaf")
    topology.hosts["b3"].namespace.run(
        "nft", "add", "chain", "inet", "deaf", "in", "{ type filter hook input priority 0; policy drop; }"
    )
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "200", "-c", "50")
    assert (report.ok, report.failures) == (200, ())
    assert set(report.identities) == {"b1", "b2"}
    assert topology.daemon.total("mesh_backend_connections_failed_total", cause="timeout") > 0


@pytest.mark.only("proxy")  # the kernel engine's connections do not depend on the daemon
def test_sigterm_lets_connections_end(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=2)
    daemon = topology.serve(drain_timeout=PATIENCE)
    address = topology.node.address
    long = [peers.Stream(topology.client, address, STREAM, f"t{n}", "-s", "-d", "1000000") for n in range(20)]
    wait_for(lambda: daemon.total("mesh_connections_active", service="stream") == 20, "transfers under way")
    daemon.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        report = peers.load(topology.client, address, WEB, "-n", "1", "-T", "2")
        return report.failures == (("connect: ECONNREFUSED", "", 1),)

    wait_for(refused, "new ones are refused")
    assert daemon.process.poll() is None
    for stream in long:
        stream.resume()
    assert {stream.wait()["end"] for stream in long} == {"complete"}
    assert daemon.process.wait(PATIENCE) == 0


def test_sigterm_does_not_wait_for_ever(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=2)
    daemon = topology.serve(drain_timeout=1)
    with peers.Load(topology.client, topology.node.address, WEB, "-c", "10", "-k", "200") as kept:
        kept.wait_ready()
        assert daemon.stop() == 0


def test_a_killed_backend_ends_its_connections_only(topology: Topology) -> None:
    host = topology.hosts["b1"]
    with peers.Load(topology.client, topology.node.address, WEB, "-c", "100", "-k", "100") as kept:
        kept.wait_ready()
        host.server.kill()
        host.server.wait()
        host.server = topology.run_server("b1", host.namespace)
        wait_for(lambda: topology.listens(host.namespace, HTTP_PORT), "b1 back")
        assert peers.load(topology.client, topology.node.address, WEB, "-n", "200", "-c", "16").ok == 200
        report = kept.stop()
    assert report.failures_but_of("b1") == []
    assert report.failed > 0
