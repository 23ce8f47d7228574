# SPDX-License-Identifier: Apache-2.0
"""One behavioural suite over every engine: a test that asks for `topology` runs once for each of ENGINES."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import Plane
from tests.engines.topology import Topology, logs
from tests.support.lab.netns import Lab

ENGINES = [
    "proxy",
    "kernel",
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if os.geteuid():
        pytest.skip("network namespaces need root")
    return str(request.param)


@pytest.fixture(scope="module")
def shared_topology(engine: str) -> Iterator[Topology]:
    """Four backends and the daemon, for the tests of one module."""
    with Lab() as lab:
        made = Topology(lab, engine)
        made.serve()
        yield made


@pytest.fixture
def topology(shared_topology: Topology, request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The module's topology, serving `Topology.default`; the daemon's log is shown with a failure."""
    if shared_topology.daemon.process.poll() is not None:
        shared_topology.daemon.start()
    yield shared_topology
    request.node.add_report_section("teardown", "daemon", logs(shared_topology.lab.directory))
    if shared_topology.text(shared_topology.default()) != shared_topology.static_file.read_text():
        shared_topology.change(*shared_topology.default())


@pytest.fixture
def make_topology(engine: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Topology]]:
    """A topology of the test's own: arguments of Topology, daemon not yet started."""
    with Lab() as lab:
        yield lambda **options: Topology(lab, engine, **options)
        request.node.add_report_section("teardown", "daemon", logs(lab.directory))


@pytest.fixture
def plane() -> Iterator[Plane]:
    """A node whose kernel engine the test drives itself."""
    with Lab() as lab:
        yield Plane(lab)


@pytest.fixture
def serving(plane: Plane) -> Iterator[Driver]:
    """An engine on it that serves three backends."""
    driver = plane.driver()
    assert driver.preflight() is None
    assert driver.open()["frontends"] == {}
    driver.serve(services=[plane.web("b1", "b2", "b3")])
    yield driver
    if driver.process.poll() is None:
        driver.close(release=True)
        driver.end()
