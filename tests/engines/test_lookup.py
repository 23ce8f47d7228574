# SPDX-License-Identifier: Apache-2.0
"""What an engine answers to "where does this flow go": the oracle's words, after any chain of plans."""

from __future__ import annotations

import functools
import ipaddress
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mesh.datapath.base import Applied, Datapath
from mesh.datapath.lookup import lookup
from mesh.model import (
    ANY_ADDRESS,
    Affinity,
    DesiredState,
    Flow,
    Frontend,
    FrontendState,
    Protocol,
    ServiceOptions,
    Target,
)
from mesh.reconcile.plan import plan
from tests.oracle import selection
from tests.support.memory import MemoryDatapath

SIZE = 1021


def make_memory() -> Datapath:
    return MemoryDatapath()


FACTORIES = [make_memory]


@pytest.fixture(params=FACTORIES, ids=lambda factory: factory.__name__.removeprefix("make_"))
def datapath(request: pytest.FixtureRequest) -> Iterator[Datapath]:
    made: Datapath = request.param()
    made.open()
    yield made
    made.close(release=True)


def state(
    port: int, weights: dict[str, int], affinity: Affinity = Affinity.FLOW, address: str = str(ANY_ADDRESS)
) -> FrontendState:
    targets = tuple(
        Target(name, ipaddress.ip_address(f"127.0.0.{10 + int(name[1:])}"), 9, weight)
        for name, weight in sorted(weights.items())
    )
    options = ServiceOptions(affinity=affinity, table_size=SIZE)
    return FrontendState(
        Frontend(ipaddress.ip_address(address), port, Protocol.TCP), f"s{port}", f"s{port}", options, targets
    )


class Chain:
    """An engine that is taken from one desired state to the next."""

    def __init__(self, datapath: Datapath) -> None:
        self.datapath, self.applied = datapath, Applied()

    def to(self, *states: FrontendState) -> None:
        desired = DesiredState(self.applied.generation + 1, {s.frontend: s for s in states})
        self.applied = self.datapath.apply(plan(self.applied, desired))


def flows(rng: random.Random, port: int, count: int = 200) -> list[Flow]:
    def address(version: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        number = rng.getrandbits(32 if version == 4 else 128)
        return ipaddress.IPv4Address(number) if version == 4 else ipaddress.IPv6Address(number)

    versions = (rng.choice((4, 6)) for _ in range(count))
    return [Flow(address(v), rng.randrange(65536), address(v), port, Protocol.TCP) for v in versions]


@functools.cache
def oracle_table(weights: tuple[tuple[str, int], ...]) -> list[int]:
    """The oracle's table of these backends, numbered in the order of their names."""
    numbered = enumerate(weights, selection.FIRST)
    return selection.maglev(SIZE, [(selection.seed_of(name), number, weight) for number, (name, weight) in numbered])


def expected(flow: Flow, weights: dict[str, int], affinity: Affinity) -> list[str]:
    """Names of a flow's choices by the oracle, the first one first; [""] where there is no backend."""
    numbers = {name: selection.FIRST + i for i, name in enumerate(sorted(weights))}
    table = oracle_table(tuple(sorted(weights.items())))
    source, destination = selection.address(str(flow.source)), selection.address(str(flow.destination))
    value = (
        selection.client_hash(source)
        if affinity is Affinity.CLIENT_IP
        else selection.flow_hash(source, flow.source_port, destination, flow.destination_port, int(flow.protocol))
    )
    names = {number: name for name, number in numbers.items()}
    return [names.get(owner, "") for owner in selection.choices(table, value)]


@pytest.mark.parametrize("affinity", list(Affinity))
def test_lookups_are_the_oracles_through_a_chain_of_changes(datapath: Datapath, affinity: Affinity) -> None:
    rng = random.Random(11)
    chain = Chain(datapath)
    for _ in range(6):
        weights = {f"b{i}": rng.choice((0, 1, 1, 3)) for i in rng.sample(range(8), rng.randrange(0, 7))}
        other = {"b1": 1}
        chain.to(state(18000, weights, affinity), state(18001, other))
        for flow in flows(rng, 18000):
            choice = datapath.lookup(flow)
            assert choice is not None
            names = expected(flow, weights, affinity)
            assert (choice.backend.key.backend if choice.backend else "") == names[0]
            assert [entry.key.backend for entry in choice.next] == [name for name in names[1:] if name]
        for flow in flows(rng, 18001, 5):
            assert datapath.lookup(flow).backend.key.backend == "b1"  # type: ignore[union-attr]


def test_not_our_port(datapath: Datapath) -> None:
    chain = Chain(datapath)
    chain.to(state(18000, {"b1": 1}))
    (flow,) = flows(random.Random(1), 18002, 1)
    assert datapath.lookup(flow) is None
    assert datapath.lookup(replace(flow, destination_port=18000, protocol=Protocol.UDP)) is None
    chain.to()
    assert datapath.lookup(replace(flow, destination_port=18000)) is None


def test_an_address_of_its_own_wins_over_any(datapath: Datapath) -> None:
    chain = Chain(datapath)
    chain.to(state(18000, {"b1": 1}), state(18000, {"b2": 1}, address="127.0.0.5"))
    (flow,) = (f for f in flows(random.Random(2), 18000, 1))
    own = replace(flow, destination=ipaddress.ip_address("127.0.0.5"))
    assert datapath.lookup(flow).backend.key.backend == "b1"  # type: ignore[union-attr]
    assert datapath.lookup(own).backend.key.backend == "b2"  # type: ignore[union-attr]


def test_the_same_plan_again_changes_nothing(datapath: Datapath) -> None:
    desired = DesiredState(1, {state(18000, {"b1": 1, "b2": 1}).frontend: state(18000, {"b1": 1, "b2": 1})})
    steps = plan(Applied(), desired)
    assert datapath.apply(steps) == steps.result
    assert datapath.apply(steps) == steps.result
    assert plan(steps.result, desired).empty


def test_a_frontend_on_every_address_answers_for_own_addresses_only(datapath: Datapath) -> None:
    chain = Chain(datapath)
    chain.to(state(18000, {"b1": 1}), state(18000, {"b2": 1}, address="192.0.2.9"))
    own = {ipaddress.ip_address("192.0.2.1")}
    (flow,) = flows(random.Random(3), 18000, 1)
    asked = {text: replace(flow, destination=ipaddress.ip_address(text)) for text in ("192.0.2.1", "192.0.2.2")}
    assert lookup(chain.applied, asked["192.0.2.1"], own=own).backend.key.backend == "b1"  # type: ignore[union-attr]
    assert lookup(chain.applied, asked["192.0.2.2"], own=own) is None
    mapped = replace(flow, destination=ipaddress.ip_address("::ffff:192.0.2.1"))
    assert lookup(chain.applied, mapped, own=own).backend.key.backend == "b1"  # type: ignore[union-attr]
    published = replace(flow, destination=ipaddress.ip_address("192.0.2.9"))
    assert lookup(chain.applied, published, own=own).backend.key.backend == "b2"  # type: ignore[union-attr]


def test_a_lookup_names_as_many_backends_as_asked(datapath: Datapath) -> None:
    chain = Chain(datapath)
    chain.to(state(18000, {f"b{i}": 1 for i in range(6)}))
    for flow in flows(random.Random(4), 18000, 20):
        for count in (1, 2, 6):
            choice = lookup(chain.applied, flow, choices=count)
            assert choice is not None
            assert len({choice.backend, *choice.next}) == count
