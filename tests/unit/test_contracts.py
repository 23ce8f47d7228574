# SPDX-License-Identifier: Apache-2.0
"""Providers and engines are used by their Protocols only, and parts are given all they need at construction.

Read from the syntax trees of mesh.agent, mesh.api, mesh.cluster, mesh.reconcile and mesh.datapath.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("agent", "api", "cluster", "reconcile", "datapath")
PEERS = ("provider", "datapath", "engine", "source", "swarm", "relay", "cluster", "proxy", "kernel")
"""Names, or last parts of names, of variables and attributes that hold a provider or an engine."""
CLASSES = ("Provider", "Datapath")
"""Ends of the names of classes that are one."""
LOOKS = ("isinstance", "issubclass", "getattr", "hasattr", "setattr")


def named(node: ast.expr) -> str:
    """The last part of a dotted name, without leading underscores; empty for anything else."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.lstrip("_")
    return ""


def looks(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that look behind the Protocol of a provider or an engine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and named(node.func) in LOOKS and node.args:
            names = [named(part) for arg in node.args[1:2] for part in ast.walk(arg) if isinstance(part, ast.expr)]
            if named(node.args[0]).split("_")[-1] in PEERS or any(name.endswith(CLASSES) for name in names):
                yield node


def outside(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Assignments to an attribute of an object other than `self` or a class's own `cls`."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        match node:
            case ast.Assign(targets=found):
                targets = [part for target in found for part in ast.walk(target) if isinstance(part, ast.expr)]
            case ast.AugAssign(target=one) | ast.AnnAssign(target=one):
                targets = [one]
        for target in targets:
            match target:
                case ast.Attribute(value=ast.Name(id="self" | "cls")):
                    pass
                case ast.Attribute(ctx=ast.Store()):
                    yield target


def wrong(find: object, packages: tuple[str, ...]) -> list[str]:
    assert callable(find)
    files = [path for package in packages for path in sorted((ROOT / "mesh" / package).rglob("*.py"))]
    assert files
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in files
        for node in find(ast.parse(path.read_text()))
    ]


def test_nobody_looks_behind_a_provider_or_an_engine() -> None:
    assert not wrong(looks, PACKAGES)


def test_the_agent_assigns_nothing_on_other_objects() -> None:
    assert not wrong(outside, ("agent", "api"))


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(self._provider, ClusterProvider)",
        "isinstance(it, (str, mesh.SwarmProvider))",
        "hasattr(datapath, 'listeners')",
        "getattr(self._parts.datapath, 'stop_accepting', None)",
        "setattr(provider, 'engine', 'proxy')",
    ],
)
def test_the_rule_finds_looks(text: str) -> None:
    assert list(looks(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["isinstance(error, DatapathError)", "getattr(new, name)", "isinstance(message, dict)"]
)
def test_the_rule_allows_looks_at_other_things(text: str) -> None:
    assert not list(looks(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["self._view.refused = ''", "view.stopping = True", "a, self.b.c = 1, 2", "x.count += 1", "x.y: int = 1"]
)
def test_the_rule_finds_assignments_from_outside(text: str) -> None:
    assert list(outside(ast.parse(text)))


@pytest.mark.parametrize("text", ["self._view = view", "name = view.name", "values[view.name] = 1"])
def test_the_rule_allows_own_attributes(text: str) -> None:
    assert not list(outside(ast.parse(text)))
