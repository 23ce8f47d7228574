# SPDX-License-Identifier: Apache-2.0
"""Counters of a frontend never fall while it is served. A part of them is the fallback proxy's, whose own frontends go
with an address of the node, and its process with the agent.
"""

from __future__ import annotations

import pytest

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import Connection, Plane
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]
FRONT = "*:8000/tcp"


@pytest.fixture
def engine(serving: Driver) -> Driver:
    """Not the suite's, which is a name."""
    return serving


def opened(engine: Driver) -> tuple[int, int, int, int]:
    """Of the frontend and of its only backend: connections that were opened, and those that are open."""
    stats = engine.stats()
    front, backend = stats["frontends"][FRONT], stats["backends"]["b1"]
    return front["opened"], backend["opened"], front["active"], backend["active"]


def call(plane: Plane, address: str) -> None:
    connection = Connection(plane.client, address)
    connection.echo()
    connection.close()


def test_counters_stay_when_an_address_of_the_node_goes(plane: Plane, engine: Driver) -> None:
    """Clients of the other IP version than the task's are the proxy's, at each address of the node by itself."""
    engine.forget_counters_after(seconds=0)
    engine.serve(services=[plane.web("b1")])
    call(plane, plane.node.address)
    more = "2001:db8::77"
    plane.node.add_address("eth0", f"{more}/64")
    wait_for(lambda: not _refused(plane, more), f"{more} is served")
    wait_for(lambda: opened(engine)[2:] == (0, 0), "the connections have ended")
    before = opened(engine)
    assert before[0] == before[1] >= 2
    plane.node.ip("addr", "del", f"{more}/64", "dev", "eth0")
    wait_for(lambda: not _kept_by_the_proxy(engine, plane, more), "the proxy has forgotten the address")
    assert opened(engine) == before
    plane.node.add_address("eth0", f"{more}/64")
    wait_for(lambda: not _refused(plane, more), f"{more} is served again")
    wait_for(lambda: opened(engine)[2:] == (0, 0), "the connections have ended")
    assert opened(engine)[0] > before[0]
    for services in ([], [plane.web("b1") | {"published": 8001}], [plane.web("b1")]):
        engine.serve(services=services)
        assert set(engine.stats()["frontends"]) == {f"*:{each['published']}/tcp" for each in services}
    assert opened(engine)[0] == 0  # a frontend that comes back begins anew


def _refused(plane: Plane, address: str) -> bool:
    try:
        call(plane, address)
    except OSError:
        return True
    return False


def _kept_by_the_proxy(engine: Driver, plane: Plane, address: str) -> bool:
    other = plane.web("b1") | {"name": "other", "published": 8001}
    for services in ([plane.web("b1"), other], [plane.web("b1")]):  # it forgets with a change
        engine.serve(services=services)
    return f"[{address}]:8000/tcp" in engine.proxied()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_counters_stay_when_the_process_ends(plane: Plane, engine: Driver, end: str) -> None:
    engine.serve(services=[plane.web("b1")])
    six = plane.node.address6
    wait_for(lambda: not _refused(plane, six), f"{six} is served")
    call(plane, plane.node.address)
    idle = Connection(plane.client, six)
    idle.echo()
    before = wait_for(lambda: (now := opened(engine))[2:] == (1, 1) and now, "one connection is open")
    if end == "closed":
        engine.close(release=False)
        engine.end()
    else:
        engine.kill()
    second = plane.driver()
    second.open()
    assert opened(second) == (*before[:2], 0, 0)
    second.serve(services=[plane.web("b1")])
    wait_for(lambda: not _refused(plane, six), f"{six} is served again")
    wait_for(lambda: opened(second)[0] > before[0], "counted on top")
    second.close(release=True)
    second.end()
    third = plane.driver()
    third.open()
    third.serve(services=[plane.web("b1")])
    assert opened(third)[:2] == (0, 0)
    third.close(release=True)
