# SPDX-License-Identifier: Apache-2.0
"""How the extensions are cut: `.pxd` files declare, `.pyx` files implement, C is in headers, and there is no circle."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECLARATIONS = sorted((ROOT / "mesh").rglob("*.pxd"))
SOURCES = sorted((ROOT / "mesh").rglob("*.pyx"))
CIMPORT = re.compile(r"^from (mesh\.fastpath\.\w+) cimport", re.MULTILINE)


def implements(text: str) -> list[str]:
    """The lines with which a declaration file would implement something: function bodies, C in strings."""
    function = re.compile(r"^\s*c?p?def [^\n]*\([^)]*\)[^:\n]*:[ \t]*$", re.MULTILINE)
    verbatim = re.compile(r'^cdef extern from [^\n]*:\n\s+"""', re.MULTILINE)
    return [found[0] for pattern in (function, verbatim) for found in pattern.finditer(text)]


@pytest.mark.parametrize(
    "text",
    [
        "cdef inline int half(int n) noexcept nogil:\n    return n // 2\n",
        "cdef int half(int n,\n              int more) noexcept nogil:\n    return n // 2\n",
        'cdef extern from * nogil:\n    """\n    static int half(int n);\n    """\n',
    ],
)
def test_an_implementation_is_recognised(text):
    assert implements(text)


def test_declarations_implement_nothing():
    assert DECLARATIONS
    assert not {path.name: found for path in DECLARATIONS if (found := implements(path.read_text()))}


def test_nothing_is_included_as_text():
    assert SOURCES
    assert not [path.name for path in SOURCES if re.search(r"^include ", path.read_text(), re.MULTILINE)]


def test_modules_of_the_proxy_engine_form_no_circle():
    graph: dict[str, set[str]] = {}
    for path in (ROOT / "mesh/fastpath").glob("*.p[xy][dx]"):
        name = f"mesh.fastpath.{path.stem}"
        graph.setdefault(name, set()).update(set(CIMPORT.findall(path.read_text())) - {name})
    assert len(graph) > 10
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_warning_is_switched_off():
    assert "-Wno-" not in (ROOT / "setup.py").read_text()
