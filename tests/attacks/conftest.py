# SPDX-License-Identifier: Apache-2.0
"""A node whose kernel engine the attack meets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.kernel_plane import Plane
from tests.support.lab.netns import Lab


@pytest.fixture
def plane() -> Iterator[Plane]:
    """Client, node with two tasks; the test drives the kernel engine itself."""
    with Lab() as lab:
        yield Plane(lab, backends=2)
