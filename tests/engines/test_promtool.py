# SPDX-License-Identifier: Apache-2.0
"""What Prometheus' own tool says of our metrics and alerts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mesh.metrics.exposition import render
from tests.support.metrics_samples import snapshot

ROOT = Path(__file__).parents[2]


def test_alert_rules_are_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", ROOT / "deploy/alerts.yml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_where_nothing_is_well_and_only_there(tmp_path: Path) -> None:
    """alerts_test.yml, with the number of alerts that there are."""
    rules = (ROOT / "deploy/alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(rules)
    cases = (
        (ROOT / "tests/engines/alerts_test.yml").read_text().replace("value: ALL", f"value: {rules.count('- alert:')}")
    )
    (tmp_path / "cases.yml").write_text(cases)
    command = ["promtool", "test", "rules", "cases.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("size", [(0, 0), (2, 3), (50, 10)])
def test_promtool_finds_nothing_to_object_to(size: tuple[int, int]) -> None:
    body, _ = render(snapshot(*size))
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
