# SPDX-License-Identifier: Apache-2.0
"""The import rule of docs/ARCHITECTURE.md, read from the syntax trees: imports point one way, by directory."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mesh"

LAYERS = (
    {"model", "errors", "netaddr", "text", "_layout", "_abi", "_linux", "_siphash", "__init__"},
    {
        "config",
        "supervisor",
        "incremental",
        "listener",
        "options",
        "rules",
        "_maglev",
        "_bpf",
        "_libbpf",
        "_fastpath",
        "fastpath",
    },
    {"providers", "datapath"},
    {"cluster", "health", "reconcile", "metrics"},
    {"api"},
    {"agent"},
    {"trace"},
    {"cli"},
    {"__main__"},
)
"""What stands at the same height, from the ground up. A package imports itself and what is below it."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
CONTRACTS = {
    "mesh.providers.base",
    "mesh.datapath.base",
    "mesh.datapath.counters",
    "mesh.datapath.proof",
    "mesh.api.view",
}
"""Modules that a layer may know of its neighbours, and that `mesh.metrics` may know of `mesh.api`."""
ENGINES = {"mesh._bpf": "mesh.datapath.kernel", "mesh._fastpath": "mesh.datapath.proxy"}
EXTENSIONS = {"_layout", "_abi", "_linux", "_siphash", "_maglev", "_bpf", "_libbpf", "_fastpath", "fastpath"}
STDLIB_ONLY = {"mesh.model", "mesh.errors", "mesh.text"}


def part(module: str) -> str:
    """The file or package at the top of `mesh` that a module belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def name_of(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything in the package that a file imports, wherever in the file it does."""
    if path.suffix != ".py":
        for line in path.read_text().splitlines():
            if match := re.match(r"\s*(?:from\s+(mesh[\w.]*)\s+c?import\s+([\w]+)|c?import\s+(mesh[\w.]*))", line):
                yield from expand(match[3] or match[1], [match[2]] if match[2] else [])
        return
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from expand(module, [alias.name for alias in node.names])


def expand(module: str, names: list[str]) -> Iterator[str]:
    """`from mesh.swarm import api` imports mesh.swarm.api if there is such a module, else something of mesh.swarm."""
    for name in names or [""]:
        inner = PACKAGE.parent.joinpath(*module.split("."), name) if name else None
        is_module = inner is not None and (inner.is_dir() or list(inner.parent.glob(f"{name}.*")))
        yield f"{module}.{name}" if is_module else module


@cache
def edges() -> list[tuple[str, str]]:
    files = [path for pattern in ("*.py", "*.pyx", "*.pxd") for path in sorted(PACKAGE.rglob(pattern))]
    found = {(name_of(path), to) for path in files for to in imported(path)}
    return sorted((a, b) for a, b in found if a != b)


def inside(pairs):
    return [(a, b) for a, b in pairs if b.split(".")[0] == "mesh"]


def breaks(importer: str, module: str) -> str | None:
    """Why an import is against the rule, or None."""
    if module in ENGINES and not importer.startswith(ENGINES[module]):
        return f"only {ENGINES[module]} imports {module}"
    if part(module) == "fastpath" and part(importer) not in {"fastpath", "_fastpath"}:
        return "the proxy engine's Python API is mesh._fastpath"
    if part(importer) == part(module):
        return "a contract knows no implementation" if importer in CONTRACTS and module not in CONTRACTS else None
    if part(importer) in EXTENSIONS:
        below = part(module) in EXTENSIONS or RANK[part(module)] == 0
        return None if below else "extensions know the ground and one another only"
    if module in CONTRACTS and (RANK[part(module)] <= RANK[part(importer)] or part(importer) == "metrics"):
        return None
    if RANK[part(module)] > RANK[part(importer)]:
        return "imports point from cli to agent, api, the parts, the contracts and the ground, never back"
    if RANK[part(module)] == RANK[part(importer)] and RANK[part(module)] > 1:
        return "packages of one layer do not import each other"
    return None


def test_there_is_something_to_look_at():
    assert ("mesh.datapath.base", "mesh._maglev") in edges()
    assert ("mesh.api.view", "mesh.datapath.base") in edges()


def test_every_part_has_a_layer():
    assert {part(name_of(path)) for path in PACKAGE.rglob("*.py*") if "__pycache__" not in path.parts} <= set(RANK)


@pytest.mark.parametrize("init", sorted(PACKAGE.rglob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_every_package_says_what_is_in_it_and_what_it_imports(init):
    said = ast.get_docstring(ast.parse(init.read_text())) or ""
    assert len(said.splitlines()) > 2 and re.search(r"\b[Ii]mports?\b", said), said


def test_imports_point_one_way():
    wrong = [f"{a} imports {b}: {why}" for a, b in inside(edges()) if (why := breaks(a, b))]
    assert not wrong, "\n".join(wrong)


def test_foundation_needs_the_standard_library_only():
    wrong = [
        (a, b) for a, b in edges() if a in STDLIB_ONLY and b.split(".")[0] not in {"mesh", *sys.stdlib_module_names}
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        ("mesh.providers.swarm.engine", "mesh.health"),
        ("mesh.reconcile.plan", "mesh._fastpath"),
        ("mesh.datapath.proxy.engine", "mesh._bpf"),
        ("mesh.agent.agent", "mesh._bpf"),
        ("mesh.agent.agent", "mesh.cli"),
        ("mesh.agent.agent", "mesh.trace"),
        ("mesh.api.state", "mesh.agent.agent"),
        ("mesh.model", "mesh.providers.base"),
        ("mesh.datapath.base", "mesh.datapath.proxy.engine"),
        ("mesh.metrics.series", "mesh.api.state"),
        ("mesh.cluster.provider", "mesh.health.monitor"),
        ("mesh.providers.static", "mesh.datapath.lookup"),
        ("mesh._fastpath", "mesh.datapath.proxy.engine"),
        ("mesh.datapath.proxy.engine", "mesh.fastpath.tcp"),
    ],
)
def test_the_rule_refuses(importer, module):
    assert breaks(importer, module)


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        ("mesh.cli.run", "mesh.agent.agent"),
        ("mesh.agent.agent", "mesh.providers.swarm"),
        ("mesh.datapath.kernel.engine", "mesh._bpf"),
        ("mesh.reconcile.plan", "mesh._maglev"),
        ("mesh.reconcile.plan", "mesh.datapath.base"),
        ("mesh._fastpath", "mesh._maglev"),
        ("mesh.providers.swarm.provider", "mesh.providers.swarm.engine"),
        ("mesh.metrics.exposition", "mesh.api.view"),
        ("mesh.cluster.provider", "mesh.providers.base"),
        ("mesh.config.load", "mesh.errors"),
    ],
)
def test_the_rule_allows(importer, module):
    assert breaks(importer, module) is None
