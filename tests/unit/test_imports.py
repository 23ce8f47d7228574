# SPDX-License-Identifier: Apache-2.0
"""The import rule of docs/ARCHITECTURE.md, read from the syntax trees: imports point one way.

cli -> agent -> {siblings} -> support -> contracts -> foundation. Siblings never import each other.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mesh"

FOUNDATION = {"mesh", "mesh.model", "mesh.errors", "mesh.config"}
CONTRACTS = {"mesh._maglev", "mesh.datapath.base", "mesh.provider", "mesh.metrics.view"}
SIBLINGS = {"swarm", "static", "demo", "cluster", "health", "reconcile", "datapath", "metrics", "trace"}
ENGINES = {"mesh._bpf", "mesh._fastpath"}
STDLIB_ONLY = {"mesh.model", "mesh.errors"}


def part(module: str) -> str:
    """What a module belongs to: `mesh.swarm.api` to swarm, `mesh.agent_socket` to agent, `mesh.log` to log."""
    names = module.split(".")
    if names[-1] == "__main__":
        return names[-1]
    return re.split(r"(?<=.)_", names[1])[0] if len(names) > 1 else ""


def layer(module: str) -> int:
    if module in FOUNDATION:
        return 0
    if module in CONTRACTS:
        return 1
    return {"agent": 4, "cli": 5, "__main__": 5}.get(part(module), 3 if part(module) in SIBLINGS else 2)


def is_extension(module: str) -> bool:
    """Of the compiled part: `mesh._bpf`, `mesh._libbpf`, `mesh.fastpath.*`."""
    return module.split(".")[1:2] == ["fastpath"] or bool(re.match(r"mesh\._[a-z]", module))


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


def edges() -> list[tuple[str, str]]:
    files = [path for pattern in ("*.py", "*.pyx", "*.pxi", "*.pxd") for path in sorted(PACKAGE.rglob(pattern))]
    found = {(name_of(path), to) for path in files for to in imported(path)}
    return sorted((a, b) for a, b in found if a != b)


def inside(pairs):
    return [(a, b) for a, b in pairs if b.split(".")[0] == "mesh"]


def breaks(importer: str, module: str) -> str | None:
    """Why an import is against the rule, or None."""
    if module in ENGINES and part(importer) != "datapath":
        return "only mesh.datapath imports the engines' extensions"
    if is_extension(importer):
        known = layer(module) <= 1 or is_extension(module)
        return None if known else "extensions know the contracts and one another only"
    if module in ENGINES:
        return None
    if part(importer) == part(module) and importer not in CONTRACTS:
        return None
    if layer(module) > layer(importer):
        return "imports point from cli to agent to the parts to the contracts, never back"
    if layer(module) == layer(importer) == 3:
        return "siblings do not import each other"
    if part(module) == "trace" and layer(importer) == 4:
        return "the agent never imports mesh.trace"
    return None


def test_there_is_something_to_look_at():
    assert ("mesh.datapath.base", "mesh._maglev") in edges()
    assert ("mesh.metrics.view", "mesh.datapath.base") in edges()


def test_imports_point_one_way():
    wrong = [f"{a} imports {b}: {why}" for a, b in inside(edges()) if (why := breaks(a, b))]
    assert not wrong, "\n".join(wrong)


def test_foundation_needs_the_standard_library_only():
    import sys

    wrong = [
        (a, b) for a, b in edges() if a in STDLIB_ONLY and b.split(".")[0] not in {"mesh", *sys.stdlib_module_names}
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        ("mesh.swarm.api", "mesh.health"),
        ("mesh.health.monitor", "mesh.datapath.proxy"),
        ("mesh.reconcile.plan", "mesh._fastpath"),
        ("mesh.agent", "mesh._bpf"),
        ("mesh.agent", "mesh.cli"),
        ("mesh.agent", "mesh.trace"),
        ("mesh.model", "mesh.provider"),
        ("mesh.datapath.base", "mesh.datapath.proxy"),
        ("mesh.metrics.view", "mesh.metrics.collector"),
        ("mesh.static", "mesh.swarm"),
        ("mesh.log", "mesh.agent"),
        ("mesh._fastpath", "mesh.datapath.proxy"),
    ],
)
def test_the_rule_refuses(importer, module):
    assert breaks(importer, module)


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        ("mesh.cli.run", "mesh.agent"),
        ("mesh.agent", "mesh.swarm"),
        ("mesh.agent_loop", "mesh.agent"),
        ("mesh.datapath.kernel", "mesh._bpf"),
        ("mesh.reconcile.plan", "mesh._maglev"),
        ("mesh.reconcile.plan", "mesh.datapath.base"),
        ("mesh._fastpath", "mesh._maglev"),
        ("mesh.swarm.provider", "mesh.swarm.api"),
        ("mesh.metrics.http", "mesh.metrics.view"),
        ("mesh.config_load", "mesh.errors"),
    ],
)
def test_the_rule_allows(importer, module):
    assert breaks(importer, module) is None
