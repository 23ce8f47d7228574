# SPDX-License-Identifier: Apache-2.0
"""Connections while the table changes, backends refuse, and many are open at once; and the books afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.engines.topology import HTTP_PORT, WEB, Topology
from tests.support import peers
from tests.support.polling import PATIENCE, wait_for

pytestmark = pytest.mark.root


def served(topology: Topology) -> dict[str, float]:
    """Connection counters of the web frontend."""
    daemon = topology.daemon
    return {
        key: daemon.total(f"mesh_connections_{key}", service="web")
        for key in ("opened_total", "closed_total", "active", "failed_total", "retried_total")
    }


def test_five_thousand_connections_at_once(topology: Topology) -> None:
    wait_for(lambda: served(topology)["active"] == 0, "no connection left of the tests before")
    with peers.Load(topology.client, topology.node.address, WEB, "-c", "5000", "-r", "4000", "-k", "3000") as load:
        load.wait_ready()
        wait_for(lambda: served(topology)["active"] == 5000, "5000 connections")
        report = load.stop()
    assert (report.ok, report.failures) == (5000, ())


def test_backends_come_and_go_under_load(topology: Topology) -> None:
    """New connections all succeed; established ones stay where they are, those of a draining backend too."""
    address = topology.node.address
    with (
        peers.Load(topology.client, address, WEB, "-n", "0", "-c", "16", "-r", "300") as fresh,
        peers.Load(topology.client, address, WEB, "-c", "200", "-k", "100") as kept,
    ):
        kept.wait_ready()
        for backends, weights in (
            (("b1", "b2", "b3", "b4"), {"b4": 0}),
            (("b1", "b2", "b3", "b4"), {"b4": 0, "b3": 0}),
            (("b1", "b2", "b3", "b4"), {}),
            (("b1", "b2", "b3", "b4"), {"b1": 0}),
            (("b1", "b2", "b3", "b4"), {"b2": 5}),
        ):
            topology.change(*topology.default(*backends, weights=weights))
            assert peers.load(topology.client, address, WEB, "-n", "100", "-c", "8").ok == 100
        fresh.wait_more()
        established, new = kept.stop(), fresh.stop()
    assert (established.ok, established.failures) == (200, ())
    assert (new.failed, new.failures) == (0, ())


def test_removed_backend_takes_only_its_own_connections(topology: Topology) -> None:
    with peers.Load(topology.client, topology.node.address, WEB, "-c", "100", "-k", "100") as kept:
        kept.wait_ready()
        topology.change(*topology.default("b1", "b2", "b3"))
        after = peers.load(topology.client, topology.node.address, WEB, "-n", "400", "-c", "16")
        report = kept.stop()
    assert report.failures_but_of("b4") == []
    assert (after.ok, after.failures) == (400, ())
    assert set(after.identities) == {"b1", "b2", "b3"}


def test_active_connections_stay_when_slots_leave_their_transition(make_topology: Callable[..., Topology]) -> None:
    """After the calm only slots without a live flow of another owner are without state again."""
    topology = make_topology()
    daemon = topology.serve(transition_calm=1.0)

    def tracked() -> int:
        return sum(f["tracked_slots"] for s in daemon.state()["services"] for f in s["frontends"])

    if topology.engine == "kernel":
        wait_for(lambda: tracked() == 0, "the slots of the take-over to settle")
    with peers.Load(topology.client, topology.node.address, WEB, "-c", "100", "-k", "100") as kept:
        kept.wait_ready()
        topology.change(*topology.default(weights={"b4": 0}))
        if topology.engine == "kernel":  # some of them are b4's, and stay tracked
            wait_for(lambda: 0 < tracked() <= 100, "only slots with a live flow in transition")
        kept.wait_more(200)
        report = kept.stop()
    assert (report.ok, report.failures) == (100, ())
    if topology.engine == "kernel":
        wait_for(lambda: tracked() == 0, "the slots of ended flows to settle")


def test_a_hundred_changes_in_a_row(topology: Topology) -> None:
    """Connections open before the first change are where they were after the last, also the silent ones."""
    address = topology.node.address
    with (
        peers.Load(topology.client, address, WEB, "-c", "100", "-k", "50") as busy,
        peers.Load(topology.client, address, WEB, "-c", "100", "-k", "3600000") as silent,
        peers.Load(topology.client, address, WEB, "-n", "0", "-c", "8", "-r", "400") as fresh,
    ):
        busy.wait_ready()
        silent.wait_ready()
        for n in range(100):
            drained = {f"b{1 + n % 4}": 0, f"b{1 + (n // 4 + 1) % 4}": 0}
            topology.change(*topology.default(weights=drained if n < 99 else {"b1": 2}))
        fresh.wait_more()
        reports = busy.stop(), silent.stop(), fresh.stop()
    assert [report.failures for report in reports] == [(), (), ()]
    assert [report.ok for report in reports[:2]] == [100, 100]


@pytest.mark.only("proxy")  # the kernel engine passes a refusal on: probes find such a backend
def test_refusing_backend_costs_no_connection(topology: Topology) -> None:
    """Nothing listens on b2: its flows get their next choice, the very one that the oracle names."""
    host = topology.hosts["b2"]
    before = served(topology)
    host.server.send_signal(signal.SIGTERM)
    host.server.wait(PATIENCE)
    try:
        report = peers.load(topology.client, topology.node.address, WEB, "-n", "1000", "-c", "16", "-p", "27000", "-v")
        after = served(topology)
    finally:
        host.server = topology.run_server("b2", host.namespace)
        wait_for(lambda: topology.listens(host.namespace, HTTP_PORT), "b2 back")
    assert (report.ok, report.failures) == (1000, ())
    for port, name in report.seen:
        choices = topology.predict(topology.default()[0], topology.client.address, port, topology.node.address, WEB)
        assert name == next(choice for choice in choices if choice != "b2")
    assert after["retried_total"] > before["retried_total"]


def test_refused_when_nobody_is_there(topology: Topology) -> None:
    topology.change(*topology.default(weights={"b1": 0, "b2": 0, "b3": 0, "b4": 0}))
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "20", "-c", "4", "-T", "5")
    assert report.ok == 0
    assert {cause.split()[0] for cause, _, _ in report.failures} <= {"connect:", "read:", "closed", "send:"}
    topology.change(*topology.default())
    assert peers.load(topology.client, topology.node.address, WEB, "-n", "20", "-c", "4").ok == 20


def test_port_that_is_no_longer_published_refuses(topology: Topology) -> None:
    topology.change(*topology.default()[1:])
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "5", "-c", "1", "-T", "5")
    assert report.failures == (("connect: ECONNREFUSED", "", 5),)
    topology.change(*topology.default())
    assert peers.load(topology.client, topology.node.address, WEB, "-n", "5", "-c", "1").ok == 5


def test_the_books_balance(topology: Topology) -> None:
    """After a soak with good, cut and refused connections: opened = closed + active, and descriptors are back."""
    client, address = topology.client, topology.node.address
    wait_for(lambda: served(topology)["active"] == 0, "no connection left of the tests before")
    before, descriptors = served(topology), held(topology)
    for _ in range(3):
        peers.load(client, address, WEB, "-n", "1500", "-c", "200")
        with peers.Load(client, address, WEB, "-c", "300", "-k", "20") as cut:
            cut.wait_ready()  # killed with its connections at the end of this block
        peers.load(client, address, WEB, "-n", "50", "-c", "50", "-u", "/bytes?n=1000000")
    wait_for(lambda: served(topology)["active"] == 0, "all connections over")
    after = served(topology)
    assert after["opened_total"] == after["closed_total"]
    assert after["opened_total"] - before["opened_total"] == 3 * (1500 + 300 + 50)
    wait_for(lambda: held(topology) <= descriptors, "descriptors back to where they were")


def held(topology: Topology) -> int:
    """Descriptors of the daemon without the pipes that the proxy engine keeps for use again."""
    return int(topology.daemon.descriptors() - 2 * topology.daemon.total("mesh_pipes"))


def test_a_take_over_refuses_no_client_of_the_other_version(topology: Topology) -> None:
    """Clients by IPv6 of tasks that speak IPv4: with the kernel engine the proxy beside it serves them."""
    old, address = topology.daemon.process, topology.node.address6
    with peers.Load(topology.client, address, WEB, "-n", "0", "-c", "16", "-r", "500") as fresh:
        for _ in range(2):
            fresh.wait_more()
            topology.daemon.start("--take-over")
            assert old.wait(PATIENCE) == 0
            old = topology.daemon.process
        fresh.wait_more()
        new = fresh.stop()
    assert (new.failed, new.failures) == (0, ())
