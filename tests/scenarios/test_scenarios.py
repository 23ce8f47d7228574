# SPDX-License-Identifier: Apache-2.0
"""Golden scenarios: an inventory in, what the kernel engine's maps hold out, compared with a text file.

A scenario NAME.toml (scenario.py has the format) is composed, planned and applied by the real kernel engine, and its
maps are printed as `mesh maps` prints them. NAME.txt has what is expected. `make golden` writes these files anew: read
the difference before you commit it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_maps_hold_what_is_expected(name: str, applied: dict[str, str], request: pytest.FixtureRequest) -> None:
    golden = HERE / f"{name}.txt"
    if request.config.getoption("--update-golden", default=False):
        golden.write_text(applied[name])
    assert "Traceback" not in applied[name], applied[name]
    assert applied[name].splitlines() == golden.read_text().splitlines(), "if this is meant: make golden"


def test_every_golden_file_has_its_scenario() -> None:
    assert sorted(path.stem for path in HERE.glob("*.txt")) == NAMES
