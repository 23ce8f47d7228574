# SPDX-License-Identifier: Apache-2.0
"""What attacks meet: a node with the kernel engine, or two nodes with either."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.attacks.two_nodes import KEY, NODES, TwoNodes
from tests.engines.kernel_plane import Plane
from tests.support.lab.netns import Lab


@pytest.fixture
def plane() -> Iterator[Plane]:
    """Client, node with two tasks; the test drives the kernel engine itself."""
    with Lab() as lab:
        yield Plane(lab, backends=2)


@pytest.fixture(scope="module", params=["kernel", "proxy"])
def two_nodes(request: pytest.FixtureRequest) -> Iterator[TwoNodes]:
    """The picture, once for each engine."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with Lab() as lab:
        yield TwoNodes(lab, str(request.param))


@pytest.fixture
def proving(two_nodes: TwoNodes) -> Iterator[TwoNodes]:
    """Both nodes prove by KEY, and demand that of each other."""
    every = [address for addresses in NODES.values() for address in addresses]
    for driver in two_nodes.drivers.values():
        driver.prove(keys=[[KEY[0], KEY[1].hex()]], nodes=every)
    yield two_nodes
    for driver in two_nodes.drivers.values():
        driver.prove(keys=[], nodes=[])
