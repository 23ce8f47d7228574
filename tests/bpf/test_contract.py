# SPDX-License-Identifier: Apache-2.0
"""Members that change places in abi.h change places on both sides, or nothing is built: tried on a copy of the tree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mesh import _abi

ROOT = Path(__file__).parents[2]
PARTS = ("setup.py", "pyproject.toml", "bpf", "LICENSE", "README.md")
MODULES = ("__init__.py", "netaddr.py", "_layout*", "_abi*")  # setup.py builds the extensions that are there
MINUTES = 5


def copied(target: Path) -> Path:
    """What the two sides of the contract are built from. Returns the header."""
    for name in PARTS:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    setup = target / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O0"'))  # what is built runs for a moment
    (target / "mesh/datapath/kernel").mkdir(parents=True)
    for pattern in MODULES:
        for source in (ROOT / "mesh").glob(pattern):
            if source.suffix != ".so":
                shutil.copy(source, target / "mesh")
    return target / "bpf/include/mesh/abi.h"


def swap(header: Path, struct: str, first: str, second: str) -> None:
    """Have two members of a struct change places."""
    text = header.read_text()
    body = re.search(rf"^struct {struct} \{{\n(.*?)^\}};", text, re.DOTALL | re.MULTILINE)
    assert body
    names = {first: second, second: first}
    changed = re.sub(rf"\b({first}|{second})(?=(\[\d+\])?;)", lambda found: names[found[1]], body[1])
    assert changed != body[1]
    header.write_text(text.replace(body[1], changed))


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, check=False, cwd=tree, capture_output=True, text=True, timeout=60 * MINUTES)


def ask(tree: Path, code: str) -> str:
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.')\n{code}"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def fast_suite(tree: Path) -> subprocess.CompletedProcess[str]:
    """What the fast suite says of the contract."""
    (tree / "tests/unit").mkdir(parents=True)
    shutil.copy(ROOT / "tests/unit/test_abi.py", tree / "tests/unit")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_abi.py"]
    return subprocess.run(command, check=False, cwd=tree, capture_output=True, text=True, timeout=60 * MINUTES)


def without_programs(tree: Path) -> None:
    """Have nothing but Python's side built."""
    for program in (tree / "bpf").glob("*.c"):
        program.unlink()


def test_members_that_change_places_do_so_on_both_sides(tmp_path: Path) -> None:
    header = copied(tmp_path)
    pairs = (("ifindex", "bridge"), ("protocol", "state"))
    for first, second in pairs:
        swap(header, "mesh_backend", first, second)
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    code = "import json; from mesh import _abi; print(json.dumps([_abi.ABI_DIGEST, dict(_abi.BACKEND.offsets)]))"
    digest, offsets = json.loads(ask(tmp_path, code))
    for first, second in pairs:
        assert offsets[first] == _abi.BACKEND.offsets[second] != offsets[second] == _abi.BACKEND.offsets[first]
    assert digest != _abi.ABI_DIGEST  # neither side takes anything from the other build
    known = fast_suite(tmp_path)
    assert known.returncode == 0, known.stdout  # known answers: header, Python and programs say the same


def test_a_side_that_was_not_built_again_is_found(tmp_path: Path) -> None:
    """The fast suite fails where abi.h has changed and the extensions have not."""
    header = copied(tmp_path)
    swap(header, "mesh_backend", "ifindex", "bridge")
    for extension in (ROOT / "mesh").glob("_[la]*.so"):
        shutil.copy(extension, tmp_path / "mesh")
    known = fast_suite(tmp_path)
    assert "test_packed_as_c_has_it[mesh_backend]" in known.stdout


@pytest.mark.parametrize(
    ("struct", "first", "second", "why"),
    [("mesh_backend", "epoch", "ifindex", "mesh_backend.epoch"), ("mesh_acl_key", "bits", "acl", "LPM_TRIE")],
)
def test_what_may_not_change_places_is_not_built(
    tmp_path: Path, struct: str, first: str, second: str, why: str
) -> None:
    header = copied(tmp_path)
    without_programs(tmp_path)
    swap(header, struct, first, second)
    built = build(tmp_path)
    assert built.returncode != 0
    assert why in built.stderr


def test_a_member_of_another_name_or_type_is_not_built(tmp_path: Path) -> None:
    header = copied(tmp_path)
    without_programs(tmp_path)
    text = header.read_text()
    at = text.index("struct mesh_backend {")
    for old, new in (("__u32 bridge;", "__u32 interface;"), ("struct mesh_addr address;", "__u8 address[16];")):
        assert old in text[at:]
        text = text[:at] + text[at:].replace(old, new, 1)
    header.write_text(text)
    built = build(tmp_path)
    assert built.returncode != 0
    assert re.search(r"no member named .bridge", built.stderr)
    assert re.search(r"size of .*array is negative", built.stderr)
