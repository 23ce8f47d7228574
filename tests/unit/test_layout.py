# SPDX-License-Identifier: Apache-2.0
"""How tests are laid out: no test module imports another, there is one way to wait, and unit tests are pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
POLLING = TESTS / "support/polling.py"
IMPURE = {"subprocess", "multiprocessing"}
ONE_PROCESS = {"test_spdx.py": "git, for the list of files", "test_new_label.py": "Python, over a copy of the package"}
NEEDS_MORE = {"lab", "daemon", "cluster", "fastpath_bench", "peers"}  # of tests.support: root, Docker, or an engine


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, and everything that is imported from one, by absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def between_tests(tree: ast.Module) -> list[str]:
    """Test modules that are imported."""
    parts = (name.split(".") for name in imports(tree))
    return [".".join(names) for names in parts if names[0] == "tests" and names[-1].startswith("test_")]


def own_polling(tree: ast.Module) -> list[str]:
    """Loops that sleep until something holds, and bounds of one's own for that."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.While):
            calls = [call for part in node.body for call in ast.walk(part) if isinstance(call, ast.Call)]
            found += [f"line {call.lineno}" for call in calls if pauses(call)]
        elif isinstance(node, ast.Assign):
            found += [ast.unparse(name) for name in node.targets if ast.unparse(name) == "PATIENCE"]
    return found


def pauses(call: ast.Call) -> bool:
    """Whether it is a sleep that takes time: sleep(0) lets others run."""
    return ast.unparse(call.func).endswith("sleep") and ast.unparse(call.args[0]) != "0"


def impure(tree: ast.Module) -> list[str]:
    """What a unit test must not import: processes, threads, and support that needs root, Docker or an engine."""
    names = set(imports(tree))
    modules = {name.split(".")[2] for name in names if name.startswith("tests.support.")}
    return [*(names & IMPURE), *(modules & NEEDS_MORE), *(n for n in names if n == "mesh.datapath.proxy.engine")]


def wrong(check, files: Iterator[Path]) -> list[str]:  # type: ignore[no-untyped-def]
    return [f"{path.relative_to(TESTS)}: {what}" for path in files for what in check(ast.parse(path.read_text()))]


def test_no_test_module_is_imported() -> None:
    assert wrong(between_tests, TESTS.rglob("*.py")) == []


def test_there_is_one_way_to_wait() -> None:
    assert wrong(own_polling, (path for path in TESTS.rglob("*.py") if path != POLLING)) == []
    assert own_polling(ast.parse(POLLING.read_text()))


def test_unit_tests_are_pure() -> None:
    assert wrong(impure, (path for path in TESTS.glob("unit/*.py") if path.name not in ONE_PROCESS)) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (between_tests, "from tests.unit.test_compose import of"),
        (between_tests, "from tests.unit import test_compose"),
        (between_tests, "def f():\n    import tests.bpf.test_tunnel"),
        (own_polling, "while not ready():\n    time.sleep(0.1)"),
        (own_polling, "async def f():\n    while True:\n        if x:\n            await asyncio.sleep(pause)"),
        (own_polling, "PATIENCE = 20"),
        (impure, "import subprocess"),
        (impure, "from tests.support.lab.netns import Lab"),
        (impure, "from mesh.datapath.proxy.engine import ProxyDatapath"),
    ],
)
def test_the_rules_refuse(check, text: str) -> None:  # type: ignore[no-untyped-def]
    assert check(ast.parse(text))


def test_the_rules_allow_a_step_of_the_event_loop() -> None:
    assert own_polling(ast.parse("while running:\n    await asyncio.sleep(0)")) == []
