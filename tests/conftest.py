# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests, the rule that in CI nothing may skip, and which worker of pytest-xdist runs what."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.support.lab.fixtures import lab
from tests.support.lab.netns import sweep

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


SUITES = ("swarm", "guest", "attacks", "engines", "flows", "bpf", "scenarios", "unit")
SWARMS = {
    "test_cluster_changes.py": "swarm of five",
    "test_cluster_managers.py": "swarm of five",
    "test_cluster_proof.py": "swarm of five",
    "test_cluster_restarts.py": "swarm of five",
    "test_partial.py": "bare swarm",
    "test_provider.py": "swarm of one",
    "test_scenario_one_node.py": "swarm of one",
}
"""The files of tests/swarm that do not use the swarm of three."""
LONGEST = ("swarm of five", "swarm of three", "tests/guest/test_stock_kernel.py", "swarm of one", "bare swarm")


def group_of(nodeid: str) -> tuple[int, str]:
    """Which tests one worker runs one after the other, and when their turn comes, the first first.

    What tests of a group share is dear to make: swarms, topologies. What takes longest begins first, and what is small
    fills the end.
    """
    path = nodeid.partition("::")[0]
    suite, _, file = path.removeprefix("tests/").partition("/")
    group = SWARMS.get(file, "swarm of three") if suite == "swarm" else path
    if group in LONGEST:
        return LONGEST.index(group), group
    return len(LONGEST) + (SUITES.index(suite) if suite in SUITES else len(SUITES)), group


class Groups(LoadScopeScheduling):  # type: ignore[misc]
    """Gives workers whole groups, in the order in which they are collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Groups:
    config.option.loadscopereorder = False
    return Groups(config, log)


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
        items.sort(key=lambda item: group_of(item.nodeid)[0])  # within a group as they are


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what workers that were killed have left: after ctrl-C they have ten seconds to end swarms themselves."""
    if getattr(config.option, "numprocesses", None) and not os.geteuid():
        sweep()
