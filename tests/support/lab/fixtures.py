# SPDX-License-Identifier: Apache-2.0
"""Fixtures over the lab. What cannot run here skips with its reason; in CI that is a failure (tests/conftest.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.lab import dockerd
from tests.support.lab.netns import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A switch with no host yet, for one test."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with Lab() as made:
        yield made


def swarm_of(managers: int, workers: int) -> Iterator[dockerd.Swarm]:
    """A swarm in a lab of its own."""
    if reason := dockerd.unavailable():
        pytest.skip(reason)
    with Lab() as made:
        yield dockerd.Swarm(made, managers, workers)


@pytest.fixture(scope="session")
def shared_swarm1() -> Iterator[dockerd.Swarm]:
    """A swarm of one manager for the whole session. Tests ask for `swarm1`, which cleans up after each."""
    yield from swarm_of(1, 0)


@pytest.fixture
def swarm1(shared_swarm1: dockerd.Swarm) -> Iterator[dockerd.Swarm]:
    """A swarm of one manager without services; those that the test makes are removed after it."""
    yield shared_swarm1
    shared_swarm1.reset()


@pytest.fixture(scope="module")
def shared_swarm3() -> Iterator[dockerd.Swarm]:
    """A swarm of one manager and two workers for one module."""
    yield from swarm_of(1, 2)


@pytest.fixture
def swarm3(shared_swarm3: dockerd.Swarm) -> Iterator[dockerd.Swarm]:
    """A swarm of one manager and two workers; services are removed after the test."""
    yield shared_swarm3
    shared_swarm3.reset()


@pytest.fixture(scope="module")
def shared_swarm5() -> Iterator[dockerd.Swarm]:
    """A swarm of three managers and two workers for one module."""
    yield from swarm_of(3, 2)


@pytest.fixture
def swarm5(shared_swarm5: dockerd.Swarm) -> Iterator[dockerd.Swarm]:
    """A swarm of three managers and two workers; services are removed after the test."""
    yield shared_swarm5
    shared_swarm5.revive()
    shared_swarm5.reset()
