# SPDX-License-Identifier: Apache-2.0
"""Tests against a real swarm run on the loop that the daemon runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from tests.cluster import ENGINES, Cluster
from tests.lab.dockerd import Swarm


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="module", params=ENGINES)
def shared_cluster5(request: pytest.FixtureRequest, shared_swarm5: Swarm) -> Iterator[Cluster]:
    """Three managers and two workers with an agent on each, once for each engine."""
    cluster = Cluster(shared_swarm5, shared_swarm5.lab.host(f"client-{request.param}"), engine=request.param)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster5(shared_cluster5: Cluster, swarm5: Swarm, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The same for one test; services are removed after it."""
    shared_cluster5.wait_ready()
    yield shared_cluster5
    request.node.add_report_section("teardown", "daemons", shared_cluster5.tails())
