# SPDX-License-Identifier: Apache-2.0
"""Tests against a real swarm run on the loop that the daemon runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from tests.support.cluster import ENGINES, Cluster
from tests.support.lab.dockerd import Swarm


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def agents(swarm: Swarm, engine: str) -> Iterator[Cluster]:
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


@pytest.fixture(scope="module")
def shared_cluster(request: pytest.FixtureRequest, shared_swarm3: Swarm) -> Iterator[Cluster]:
    """A manager and two workers with an agent on each, with the module's ENGINE."""
    yield from agents(shared_swarm3, request.module.ENGINE)


@pytest.fixture
def cluster(shared_cluster: Cluster, swarm3: Swarm, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The same for one test; services are removed after it."""
    yield from for_a_test(shared_cluster, request)


@pytest.fixture(scope="module", params=ENGINES)
def shared_cluster5(request: pytest.FixtureRequest, shared_swarm5: Swarm) -> Iterator[Cluster]:
    """Three managers and two workers with an agent on each, once for each engine."""
    yield from agents(shared_swarm5, request.param)


@pytest.fixture
def cluster5(shared_cluster5: Cluster, swarm5: Swarm, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The same for one test; services are removed after it."""
    yield from for_a_test(shared_cluster5, request)
