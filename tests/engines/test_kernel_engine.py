# SPDX-License-Identifier: Apache-2.0
"""KernelDatapath by itself, in namespaces: what the suite over all engines cannot ask of the others."""

from __future__ import annotations

import select
import signal
import socket
from typing import Any

import pytest

from tests.engines import kernel_proofs
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, Connection, Plane, refused
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def engine(serving: Driver) -> Driver:
    """Not the suite's, which is a name."""
    return serving


def test_every_backend_answers_and_sees_the_clients_address(plane: Plane, engine: Driver) -> None:
    kernel_proofs.every_backend_answers_and_sees_the_clients_address(plane, engine)


def test_udp(plane: Plane, engine: Driver) -> None:
    kernel_proofs.datagrams_are_spread(plane, engine)


def test_processes_of_the_node_are_connected_straight(plane: Plane, engine: Driver) -> None:
    kernel_proofs.processes_of_the_node_are_connected_straight(plane, engine)


def test_a_connection_that_is_refused_gets_one_more_try(plane: Plane, engine: Driver) -> None:
    """A task that ends before the tables know of it, or does not listen yet: the client's kernel asks again."""
    deaf = plane.web("b1")
    deaf["backends"]["b1"][1] = TARGET + 1
    engine.serve(services=[deaf])
    with plane.client.entered(), socket.socket() as caller:
        caller.setblocking(False)
        caller.connect_ex((plane.node.address, PORT))
        wait_for(lambda: engine.stats()["verdicts"]["reset_held"] == 1, "refused by the task")
        engine.serve(services=[plane.web("b2")])
        assert select.select([], [caller], [], 30)[1]
        assert caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        caller.settimeout(10)
        assert caller.recv(100).startswith(b"b2 ")
    engine.serve(services=[deaf])
    with pytest.raises(ConnectionRefusedError):  # in the end the client is told
        Connection(plane.client, plane.node.address, timeout=30)
    stats = engine.stats()
    assert stats["verdicts"]["reset_held"] == 2
    told = {"refused": 1}
    assert stats["frontends"]["*:8000/tcp"]["failed"] == stats["backends"]["b1"]["failed"] == told


def test_ipv6_clients_of_ipv4_tasks(plane: Plane, engine: Driver) -> None:
    found = plane.calls(60, address=plane.node.address6)
    assert set(found) == {"b1", "b2", "b3"}
    stats = wait_for(lambda: (s := engine.stats()["frontends"]["*:8000/tcp"])["closed"] >= 60 and s, "60 closed")
    assert stats["opened"] == 60
    assert engine.problems() == []
    plane.node.add_address("eth0", "2001:db8::201/64")
    wait_for(lambda: not refused(plane.client, "2001:db8::201"), "the new address is served")


def test_netfilter_does_not_see_this_traffic(plane: Plane, engine: Driver) -> None:
    """What `mesh check` says of DOCKER-USER: rules on forwarded packets hold for other traffic, and not for this."""
    rules = "add table inet t; add chain inet t f { type filter hook forward priority -1; policy drop; }"
    plane.node.run("nft", rules)
    assert sum(plane.calls(20).values()) == 20
    assert sum(plane.calls(20, plane.namespaces["b1"]).values()) == 20
    plane.client.run("ip", "route", "add", "172.31.0.0/24", "via", plane.node.address)
    with pytest.raises(TimeoutError):
        Connection(plane.client, plane.namespaces["b1"].address, TARGET, timeout=1)


def test_sockets_of_containers_are_not_hooked(plane: Plane, engine: Driver) -> None:
    """The node's port is reached from a container by packets, although all share the root cgroup."""
    before = engine.stats()["verdicts"]["socket"]
    assert sum(plane.calls(30, plane.namespaces["b1"]).values()) == 30  # its own share included: hairpin
    assert engine.stats()["verdicts"]["socket"] == before


def test_explain_agrees_with_the_loaded_program_and_with_traffic(plane: Plane, engine: Driver) -> None:
    ids = engine.serve(services=[plane.web("b1", "b2", "b3")])["ids"]
    for _ in range(20):
        connection = Connection(plane.client, plane.node.address)
        source, port = connection.socket.getsockname()
        ours, loaded = engine.explain(source=source, port=port, destination=plane.node.address, to=PORT)
        assert (ours["hash"], ours["slot"], ours["owner"]) == (loaded["hash"], loaded["slot"], loaded["owner"])
        assert loaded["owner"] == ids[connection.backend]
        connection.close()
    ours, loaded = engine.explain(source="192.0.2.99", port=1, destination=plane.node.address, to=4711)
    assert (ours, loaded["verdict"]) == (None, "not ours")


def test_connections_stay_through_a_hundred_changes(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(30)]
    sets = [("b1", "b2", "b3"), ("b1", "b2", "b3")]
    for turn in range(100):
        weights = {"b1": 1 + turn % 3, "b2": 1 + turn % 5, "b3": turn % 2}
        engine.serve(services=[plane.web(*sets[turn % 2], weights=weights)])
        for connection in connections[turn % 3 :: 3]:
            connection.echo(100)
    for connection in connections:
        connection.echo(100)


def test_connections_outlive_a_full_flow_cache(plane: Plane) -> None:
    """After a take-over all slots are in transition: what a flood of starts pushes out of the flow cache is still
    known by its reverse entry, or established connections would be given to PASS."""
    engine = plane.driver(flow_cache=1024)
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in connections:
        connection.echo()
    for _ in range(3000):
        Connection(plane.client, plane.node.address).close()
    for connection in connections:
        connection.echo()
    engine.close(release=True)


def test_a_connection_that_nothing_knows_any_more_is_reset(plane: Plane, engine: Driver) -> None:
    """Its note is lost, and its owner is neither the slot's current nor its previous one: see docs/DATAPATH.md."""
    connections = [Connection(plane.client, plane.node.address) for _ in range(60)]
    for connection in connections:
        connection.echo()
    engine.serve(services=[plane.web("b1", "b2", "b3", weights={"b1": 0, "b3": 0})])
    engine.forget(names=["flows", "flows_new"])
    assert {c.backend for c in connections} == {"b1", "b2", "b3"}
    for connection in connections:
        if connection.backend == "b2":
            connection.echo()
            continue
        with pytest.raises(ConnectionError):
            connection.echo()
    assert set(plane.calls(20)) == {"b2"}


def test_a_draining_backend_keeps_its_connections_and_gets_no_new_ones(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(60)]
    engine.serve(services=[plane.web("b1", "b2", "b3", weights={"b2": 0})])
    assert "b2" not in plane.calls(40)
    for connection in connections:
        connection.echo()
    assert "b2" in {c.backend for c in connections}
    engine.serve(services=[plane.web("b1", "b3")])
    assert "b2" not in plane.calls(20)


def test_containers_come_and_go(plane: Plane, engine: Driver) -> None:
    engine.serve(services=[plane.web("b1")])
    assert set(plane.calls(5)) == {"b1"}
    plane.node.ip("link", "del", "veth1")
    plane.namespaces.pop("b1").delete()
    plane.add("b9", 1)  # the same address and interface name behind another veth
    engine.serve(services=[plane.web("b9")])
    assert set(plane.calls(10)) == {"b9"}
    before = engine.stats()["verdicts"]["error"]
    plane.add("b4", 4)
    engine.serve(services=[plane.web("b4", "b9")])
    assert set(plane.calls(30)) == {"b4", "b9"}
    assert engine.stats()["verdicts"]["error"] == before
    assert engine.problems() == []


def test_source_rules(plane: Plane, engine: Driver) -> None:
    cases: list[tuple[dict[str, list[str]], bool]] = [
        ({"deny": ["192.0.2.0/24"]}, False),
        ({"deny": ["192.0.3.0/24"]}, True),
        ({"allow": ["192.0.2.0/24"]}, True),
        ({"allow": ["10.0.0.0/8"]}, False),
        ({"allow": ["192.0.2.0/24"], "deny": ["192.0.2.0/28"]}, False),
        ({"allow": ["192.0.2.11/32"], "deny": ["192.0.2.0/24"]}, False),
        ({}, True),
    ]
    for options, expected in cases:
        engine.serve(services=[plane.web("b1", options=options)])
        if expected:
            Connection(plane.client, plane.node.address).close()
        else:
            assert refused(plane.client, plane.node.address), options


def test_xdp_stage_is_not_for_veths(plane: Plane) -> None:
    driver = plane.driver(xdp="on")
    driver.open()
    driver.serve(services=[plane.web("b1")])
    (line,) = driver.problems()
    assert line.startswith("interface eth0 has no XDP stage: it is a veth")
    plane.calls(5)
    driver.close(release=True)


def test_frontend_with_an_address_of_its_own(plane: Plane, engine: Driver) -> None:
    plane.node.add_address("eth0", "192.0.2.201/24")
    one = plane.web("b1", address="192.0.2.201")
    engine.serve(services=[one, plane.web("b2")])
    assert set(plane.calls(10, address="192.0.2.201")) == {"b1"}
    assert set(plane.calls(10)) == {"b2"}
    engine.serve(services=[one])
    with pytest.raises(ConnectionRefusedError):
        plane.calls(1)
    assert set(plane.calls(5, address="192.0.2.201")) == {"b1"}


def test_a_floating_address_is_served_from_its_first_packet(plane: Plane) -> None:
    """Even while the engine's process hears of nothing; clients of the other IP version meet the proxy beside it."""
    engine = plane.driver(floating_addresses="192.0.2.240, 2001:db8::240")
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    plane.node.add_address("eth0", "2001:db8::240/64")
    assert set(plane.calls(1, address="2001:db8::240")) <= {"b1", "b2", "b3"}
    engine.process.send_signal(signal.SIGSTOP)
    try:
        plane.node.add_address("eth0", "192.0.2.240/24")
        assert set(plane.calls(60, address="192.0.2.240")) == {"b1", "b2", "b3"}
    finally:
        engine.process.send_signal(signal.SIGCONT)
    assert engine.problems() == []


def test_many_services_are_published_and_read_at_once(plane: Plane, engine: Driver) -> None:
    many = [plane.web("b1", "b2", "b3") | {"published": 10000 + n, "name": f"s{n}"} for n in range(1200)]
    engine.serve(services=many)
    for port in (10000, 10600, 11199):
        connection = Connection(plane.client, plane.node.address, port)
        connection.echo()
        connection.close()
    assert len(engine.stats()["frontends"]) == 1200
    engine.serve(services=[plane.web("b1")])
    assert set(plane.calls(5)) == {"b1"}


def test_a_backends_change_costs_the_same_few_writes_whatever_there_is(plane: Plane, engine: Driver) -> None:
    """One store for a table of any size, none for what stays; no system call goes by how much there is."""

    def service(number: int, size: int) -> dict[str, Any]:
        host = f"172.31.{1 + number // 80}"
        backends = {f"t{number}x{i}": [f"{host}.{number % 80 * 3 + i}", TARGET, 1] for i in range(3)}
        options = {"table_size": size}
        return {"name": f"s{number}", "published": 10000 + number, "backends": backends, "options": options}

    for count, size in ((1, 1021), (1, 65537), (400, 1021)):
        services = [service(number, size) for number in range(count)]
        engine.serve(services=services)
        del services[-1]["backends"][f"t{count - 1}x1"]
        services[-1]["backends"]["new"] = ["172.31.0.250", TARGET, 1]
        work = engine.work(services=services)
        assert work["calls"] <= 12
        assert work["stores"] <= 12
        assert work["bytes"] < 8 * size + 500


@pytest.mark.parametrize(("release", "tcx"), [((6, 18), True), ((6, 18), False), ((6, 1), False)])
def test_programs_behind_ours_meet_what_is_not_ours(plane: Plane, release: tuple[int, int], tcx: bool) -> None:
    """In a tcx chain, among the filters behind it, and among clsact filters where there is no tcx."""
    engine = plane.driver()
    engine.pretend_kernel(major=release[0], minor=release[1])
    engine.open()
    engine.serve(services=[plane.web("b1", "b2")])
    before = engine.runs_behind(device="eth0", tcx=tcx)
    with plane.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(3):
            sock.sendto(b"not ours", (plane.node.address, 9))
    wait_for(lambda: engine.runs_behind(device="eth0", tcx=tcx) >= before + 3, "packets at the program behind ours")
    assert sum(plane.calls(5).values()) == 5
    engine.close(release=True)
    engine.end()


def test_entries_of_closed_connections_are_swept(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in connections:
        connection.echo()
    for connection in connections[5:]:
        connection.close()
    wait_for(lambda: engine.stats()["frontends"]["*:8000/tcp"]["closed"] == 15, "15 closed")
    assert engine.entries()["revnat"] == 20
    assert engine.sweep(seconds=3600) == 0
    swept = 0
    while swept < 15:
        swept += wait_for(lambda: engine.sweep(seconds=0), "closed entries swept")
    assert (swept, engine.entries()["revnat"]) == (15, 5)
    for connection in connections[:5]:
        connection.echo()
        connection.close()


def test_run_time_is_told_on_request(plane: Plane) -> None:
    driver = plane.driver(bpf_stats=1)
    driver.open()
    driver.serve(services=[plane.web("b1")])
    plane.calls(10)
    totals = driver.stats()["totals"]
    assert totals["program_ingress_runs"] >= 50
    assert totals["program_task_nanoseconds"] > 0
    driver.close(release=True)
