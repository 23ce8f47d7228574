# SPDX-License-Identifier: Apache-2.0
"""An address moves between two nodes of the kernel engine (the picture of test_tunnel) while slots are in transition:
what began on the one node goes on by way of the other, which knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.kernel_plane import Connection
from tests.engines.tunnel_pair import MEGABYTE, NODES, STREAM, Pair
from tests.support.lab.netns import Lab, Namespace
from tests.support.peers import Stream

pytestmark = [pytest.mark.root, pytest.mark.bpf]

VIP = "192.0.2.240"
COUNT = 24


class Floating(Pair):
    """With an address that either node may have."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, floating_addresses=VIP)
        self.tasks["also"] = self.task("also", self.a, 2)

    def move(self, to: Namespace) -> None:
        for node in (self.a, self.b):
            node.run("ip", "addr", "flush", "dev", "eth0", "to", f"{VIP}/32")
        to.take(VIP)

    def begin(self, *options: str) -> tuple[list[Connection], tuple[Stream, str]]:
        """Connections to the address, and a transfer that is under way both ways and not over before it is resumed."""
        connections = [Connection(self.client, VIP) for _ in range(COUNT)]
        tag = f"f{id(connections)}"
        stream = Stream(self.client, VIP, STREAM, tag, "-s", "-u", str(30 * MEGABYTE), "-d", str(30 * MEGABYTE))
        return connections, (stream, tag)

    def finish(self, begun: tuple[list[Connection], tuple[Stream, str]]) -> None:
        """All go on and end as they should."""
        connections, (stream, tag) = begun
        for number, connection in enumerate(connections):
            for size in (1000, 50_000) if number % 2 else (50_000, 1000):
                connection.echo(size)
            connection.close()
        stream.resume()
        client, server = self.ends(stream, tag)
        whole = {"tag": tag, "end": "complete", "sent": 30 * MEGABYTE, "received": 30 * MEGABYTE, "corrupt_at": -1}
        assert (client, server) == (whole, whole)

    def settle(self) -> None:
        for driver in self.drivers.values():
            driver.end_transitions()
            assert driver.tracked() == 0


@pytest.fixture(scope="module")
def shared() -> Iterator[Floating]:
    with Lab() as lab:
        yield (pair := Floating(lab))
        pair.close()


@pytest.fixture(scope="module", params=["tunnel", "direct"])
def back(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(shared: Floating, back: str) -> Floating:
    shared.ensure(back)
    shared.serve("here")
    shared.wait_ways(1500)
    return shared


def test_after_a_service_was_taken_over(pair: Floating) -> None:
    """Slots had nobody before: what is not noted may have been the kernel's."""
    for driver in pair.drivers.values():
        driver.serve(services=[], nodes=list(NODES))
    pair.serve("here", "there")
    pair.move(pair.a)
    begun = pair.begin()
    assert {c.backend for c in begun[0]} == {"here", "there"}
    pair.move(pair.b)
    pair.finish(begun)


def test_while_a_task_of_the_new_node_drains(pair: Floating) -> None:
    """The previous owner is on the node that gets the address, the current one on the node that had it."""
    pair.serve("here", "there")
    pair.settle()
    pair.move(pair.a)
    before = pair.begin()
    pair.serve("here", "there", drained=("there",))
    within = pair.begin()
    assert {c.backend for c in within[0]} == {"here"} < {c.backend for c in before[0]}
    pair.move(pair.b)
    pair.finish(within)
    pair.finish(before)


def test_while_both_owners_are_on_the_node_that_had_the_address(pair: Floating) -> None:
    pair.serve("here", "also")
    pair.settle()
    pair.move(pair.a)
    before = pair.begin()
    pair.serve("here", "also", drained=("here",))
    within = pair.begin()
    assert {c.backend for c in within[0]} == {"also"} < {c.backend for c in before[0]}
    was = pair.verdicts(pair.a).get("tunnel_back", 0)
    pair.move(pair.b)
    pair.finish(before)
    pair.finish(within)
    asked = pair.verdicts(pair.a)["tunnel_back"] - was
    assert asked >= sum(c.backend == "here" for c in before[0])


def test_there_and_back_again(pair: Floating) -> None:
    """By way of either node in turn, and through another change of the table."""
    pair.serve("here", "there")
    pair.settle()
    pair.move(pair.a)
    pair.serve("also", "there", "here", drained=("here",))
    begun = pair.begin()
    for node in (pair.b, pair.a, pair.b):
        pair.move(node)
        for connection in begun[0]:
            connection.echo()
    pair.finish(begun)
