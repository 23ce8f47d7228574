# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests, the rule that in CI nothing may skip, and who runs what where tests run in parallel."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.lab.fixtures import lab

__all__ = ["lab"]

CI = bool(os.environ.get("CI"))

# How long an example takes says nothing here (a loaded machine). Equal code meets equal examples, so that nothing fails
# that has not changed; `make test-all` tries others.
RANDOM = bool(os.environ.get("MESH_TEST_ALL"))
settings.register_profile("mesh", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=not RANDOM)
settings.load_profile("mesh")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"nothing may skip in CI: {item.nodeid}: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"nothing may skip in CI: {collector.nodeid}: {_reason(report)}"
    return report


SUITES = ("swarm", "swarms", "guest", "engines", "bpf", "unit")


def _group(item: pytest.Item) -> tuple[int, str]:
    """Which tests one worker runs one after the other, and when their turn comes: what takes longest begins first, and
    what is small fills the end. Tests of a group share what is dear to make."""
    suite = item.path.parent.name
    if suite == "swarm":
        fives = "shared_swarm5" in getattr(item, "fixturenames", ())
        return (0, "swarm of five") if fives else (1, "swarms")
    turn = SUITES.index(suite) if suite in SUITES else len(SUITES)
    return turn, f"{suite}/{item.path.name}"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group(_group(item)[1]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a test says is not for an engine, and without MESH_TEST_ALL what it says can wait: no skips, for
    nothing is missing here."""

    def names(item: pytest.Item, marker: str) -> tuple[bool, bool]:
        """Whether the test has the marker, and whether that names the variant's engine."""
        mark, spec = item.get_closest_marker(marker), getattr(item, "callspec", None)
        if mark is None or spec is None:
            return False, False
        return True, any(value in mark.args for value in spec.params.values())

    everything = bool(os.environ.get("MESH_TEST_ALL"))
    out = [
        item for item in items if names(item, "only") == (True, False) or (names(item, "later")[1] and not everything)
    ]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: _group(item)[0])  # within a group as they are
