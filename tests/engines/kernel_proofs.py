# SPDX-License-Identifier: Apache-2.0
"""What the kernel engine must do on any kernel: proven on this one (test_kernel_engine) and in a guest (inside.py)."""

from __future__ import annotations

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, Connection, Plane, datagram
from tests.support.polling import wait_for


def every_backend_answers_and_sees_the_clients_address(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(60)]
    assert {c.seen for c in connections} == {plane.client.address}
    assert {c.backend for c in connections} == {"b1", "b2", "b3"}
    for connection in connections:
        connection.echo(20000)
        connection.close()
    stats = wait_for(lambda: (s := engine.stats())["frontends"]["*:8000/tcp"]["closed"] == 60 and s, "60 closed")
    frontend = stats["frontends"]["*:8000/tcp"]
    assert (frontend["opened"], frontend["active"]) == (60, 0)
    assert sum(b["opened"] for b in stats["backends"].values()) == 60
    assert frontend["bytes_in"] > 60 * 20000 < frontend["bytes_out"]
    assert engine.problems() == []


def datagrams_are_spread(plane: Plane, engine: Driver) -> None:
    engine.serve(services=[plane.web("b1", "b2", "b3", protocol="udp")])
    answers = [datagram(plane.client, plane.node.address).split() for _ in range(60)]
    assert {name for name, _ in answers} == {"b1", "b2", "b3"}
    assert {seen for _, seen in answers} == {plane.client.address}
    assert len({datagram(plane.node, "127.0.0.1").split()[0] for _ in range(60)}) == 3


def processes_of_the_node_are_connected_straight(plane: Plane, engine: Driver) -> None:
    before = engine.stats()["verdicts"]["socket"]
    for address in ("127.0.0.1", plane.node.address):
        connection = Connection(plane.node, address)
        assert connection.socket.getpeername() == (address, PORT)
        connection.echo()
        connection.close()
    assert engine.stats()["verdicts"]["socket"] == before + 2
