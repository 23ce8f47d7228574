# SPDX-License-Identifier: Apache-2.0
"""The fixture of a lab. What cannot run here skips with its reason; in CI that is a failure (tests/conftest.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.lab.netns import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A switch with no host yet, for one test."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with Lab() as made:
        yield made
