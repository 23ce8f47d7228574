# SPDX-License-Identifier: Apache-2.0
"""In CI nothing may skip: a test that did not run has proved nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = {
    "call": "import pytest\ndef test_x(): pytest.skip('no root')\n",
    "fixture": "import pytest\n@pytest.fixture\ndef f(): pytest.skip('no root')\ndef test_x(f): pass\n",
    "mark": "import pytest\n@pytest.mark.skip(reason='no root')\ndef test_x(): pass\n",
    "module": "import pytest\npytest.skip('no root', allow_module_level=True)\n",
}


@pytest.mark.parametrize(("ci", "expected"), [("", "4 skipped"), ("1", "1 failed, 3 errors")])
def test_a_skip_fails_in_ci(tmp_path: Path, ci: str, expected: str) -> None:
    for how, text in SKIPS.items():
        (tmp_path / f"test_{how}.py").write_text(text)
    plain = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, "--continue-on-collection-errors", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CI": ci},
    )
    assert expected in ended.stdout, ended.stdout
    assert bool(ended.returncode) is bool(ci)
