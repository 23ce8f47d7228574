# SPDX-License-Identifier: Apache-2.0
"""Three swarms, and agents on their nodes, that all modules here share; each test finds them well and empty.

A fixture whose name begins with `shared_` lives as long as tests of this package run; the one without is for one test.
Tests run on the loop that the daemon runs on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from tests.support.cluster import ENGINES, Cluster
from tests.support.lab import dockerd
from tests.support.lab.netns import Lab


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def swarm_of(managers: int, workers: int) -> Iterator[dockerd.Swarm]:
    """A swarm in a lab of its own."""
    if reason := dockerd.unavailable():
        pytest.skip(reason)
    with Lab() as made:
        yield dockerd.Swarm(made, managers, workers)


@pytest.fixture(scope="package")
def shared_swarm1() -> Iterator[dockerd.Swarm]:
    """A manager."""
    yield from swarm_of(1, 0)


@pytest.fixture(scope="package")
def shared_swarm3() -> Iterator[dockerd.Swarm]:
    """A manager and two workers."""
    yield from swarm_of(1, 2)


@pytest.fixture(scope="package")
def shared_swarm5() -> Iterator[dockerd.Swarm]:
    """Three managers and two workers."""
    yield from swarm_of(3, 2)


@pytest.fixture
def swarm1(shared_swarm1: dockerd.Swarm) -> Iterator[dockerd.Swarm]:
    """A swarm of one manager without services; those that the test makes are removed after it."""
    yield shared_swarm1
    shared_swarm1.reset()


@pytest.fixture
def swarm3(shared_swarm3: dockerd.Swarm) -> Iterator[dockerd.Swarm]:
    """A swarm of one manager and two workers; services are removed after the test."""
    yield shared_swarm3
    shared_swarm3.reset()


@pytest.fixture
def swarm5(shared_swarm5: dockerd.Swarm) -> Iterator[dockerd.Swarm]:
    """A swarm of three managers and two workers; services are removed after the test."""
    yield shared_swarm5
    shared_swarm5.reset()


def agents(swarm: dockerd.Swarm, engine: str) -> Iterator[Cluster]:
    """One on each node."""
    cluster = Cluster(swarm, swarm.lab.host(f"client-{engine}"), engine=engine)
    yield cluster
    cluster.close()


def for_a_test(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Ready; with a failure goes what the agents said."""
    cluster.revive()
    cluster.wait_ready()
    yield cluster
    request.node.add_report_section("teardown", "daemons", cluster.tails())


@pytest.fixture(scope="package", params=ENGINES)
def shared_cluster(request: pytest.FixtureRequest, shared_swarm3: dockerd.Swarm) -> Iterator[Cluster]:
    """A manager and two workers with an agent on each, once for each engine."""
    yield from agents(shared_swarm3, request.param)


@pytest.fixture
def cluster(shared_cluster: Cluster, swarm3: dockerd.Swarm, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The same for one test; services are removed after it."""
    yield from for_a_test(shared_cluster, request)


@pytest.fixture(scope="package", params=ENGINES)
def shared_cluster5(request: pytest.FixtureRequest, shared_swarm5: dockerd.Swarm) -> Iterator[Cluster]:
    """Three managers and two workers with an agent on each, once for each engine."""
    yield from agents(shared_swarm5, request.param)


@pytest.fixture
def cluster5(shared_cluster5: Cluster, swarm5: dockerd.Swarm, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The same for one test; services are removed after it."""
    yield from for_a_test(shared_cluster5, request)
