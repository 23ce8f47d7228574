# SPDX-License-Identifier: Apache-2.0
"""The contract has no copies in mesh/: no struct module, no number beside a name of abi.h, no positions of members.

Members are given and taken by name only: a record that is built or unpacked by position would break in silence when
members change places.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import _abi, _linux

ROOT = Path(__file__).parents[2]
PYTHON = sorted((ROOT / "mesh").rglob("*.py"))
CYTHON = sorted(path for pattern in ("*.pyx", "*.pxd", "*.pxi") for path in (ROOT / "mesh").rglob(pattern))
HOST_ORDER = {"netaddr.py", "codec.py", "netlink.py", "pins.py"}
"""Who turns bytes in host order into numbers: plain words of maps, of netlink and of socket options."""

CONSTANTS = {name for module in (_abi, _linux) for name, value in vars(module).items() if isinstance(value, int)}
CONSTANTS |= {"TABLE_SIZES", "VERDICTS"}
RECORDS = {layout.record.__name__ for module in (_abi, _linux) for layout in module.LAYOUTS.values()}
TELLING = {*_abi.TABLE_SIZES, _abi.TUNNEL_PORT, _abi.GENEVE_CLASS, _abi.NOTE_ASKED, _abi.PORT_TUNNEL, _abi.OWNER_MASK}
"""Numbers that mean nothing but what the contract means by them."""

STRUCT = re.compile(r"^\s*(import struct|from struct)\b|\bstruct\.(Struct|(un)?pack(_\w+)?|calcsize)\b", re.MULTILINE)


def copies(name: str, text: str) -> Iterator[str]:
    """What in a Python file is a copy of the contract."""
    tree = ast.parse(text)
    if STRUCT.search(text):
        yield "the struct module"
    if "byteorder" in text and name not in HOST_ORDER:
        yield "numbers in host order"
    short = {alias.asname or alias.name for alias in imported(tree, "mesh")} & {"_abi", "_linux", "nl"}
    direct = {alias.asname or alias.name for module in ("mesh._abi", "mesh._linux") for alias in imported(tree, module)}
    for node in ast.walk(tree):
        yield from (f"{what}, line {getattr(node, 'lineno', 0)}" for what in wrong(node, short, direct & RECORDS))


def imported(tree: ast.AST, module: str) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            yield from node.names


def wrong(node: ast.AST, modules: set[str], records: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        taken = {name for name in names if name.lstrip("_").removeprefix("MESH_") in CONSTANTS}
        if taken and not any(isinstance(part, ast.Name | ast.Attribute) for part in ast.walk(node.value)):
            yield f"{', '.join(sorted(taken))} defined anew"
        if any(re.search(r"(^|_)OFFSET", name) for name in names) and isinstance(node.value, ast.Constant):
            yield "an offset as a number"
        if is_unpacking(node.value) and any(isinstance(target, ast.Tuple) for target in targets):
            yield "a record taken apart by position"
    elif isinstance(node, ast.Subscript) and is_unpacking(node.value):
        yield "a member by position"
    elif isinstance(node, ast.Call) and node.args and makes_record(node.func, modules, records):
        yield "a record made by position"
    elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in TELLING:
        yield f"{node.value}, which the contract says"


def is_unpacking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("unpack", "unpack_from")
    )


def makes_record(made: ast.expr, modules: set[str], records: set[str]) -> bool:
    if isinstance(made, ast.Attribute):
        return isinstance(made.value, ast.Name) and made.value.id in modules and made.attr in RECORDS
    return isinstance(made, ast.Name) and made.id in records


def test_there_is_something_to_look_at() -> None:
    assert len(PYTHON) > 80 and len(CYTHON) > 5
    assert {"MAX_BACKENDS", "REVNAT_FIN_IN", "RTM_GETROUTE"} <= CONSTANTS
    assert {"Backend", "NdMsg"} <= RECORDS


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_has_no_copy(path: Path) -> None:
    assert list(copies(path.name, path.read_text())) == []


@pytest.mark.parametrize("path", CYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_cython_has_no_copy(path: Path) -> None:
    text = path.read_text()
    assert not STRUCT.search(text)
    defined = r"^\s*(?:DEF |#define |cdef \w+ )?_?(?:MESH_)?([A-Z][A-Z0-9_]+)\s*=?\s*[0-9(]"
    assert not CONSTANTS.intersection(re.findall(defined, text, re.MULTILINE))


@pytest.mark.parametrize(
    "text",
    [
        "import struct",
        "from struct import Struct",
        "HEAD = struct.Struct('=II')",
        "x = struct.unpack_from('=I', data)",
        "MAX_BACKENDS: Final = 65536",
        "_MESH_MAX_NODES = 4096",
        "ACL_ALLOW, ACL_DENY = 1, 2",
        "TABLE_SIZES = (1, 2)",
        "REVNAT_FIN_IN = 0x4 | 0x8",
        "STATE_OFFSET = 16",
        "port = 6084",
        "from mesh import _abi\n_abi.Backend(address, 80)",
        "from mesh import _linux as nl\nnl.NdMsg(2)",
        "from mesh._abi import Note\nNote(1, 2, 3, 4)",
        "owner, epoch, stamp, frontend = NOTE.unpack(data)",
        "epoch = NOTE.unpack(data)[1]",
        "int.from_bytes(data[16:20], sys.byteorder)",
    ],
)
def test_copies_are_found(text: str) -> None:
    assert list(copies("other.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "import structlog",
        "MAX_BACKENDS = _abi.MAX_BACKENDS",
        "from mesh import _abi\n_abi.Backend(address=address, port=80)",
        "from mesh.model import Backend\nBackend(1, 2)",
        "note = NOTE.unpack(data)",
    ],
)
def test_what_is_no_copy_is_let_be(text: str) -> None:
    assert not list(copies("other.py", text))
