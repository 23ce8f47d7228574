# SPDX-License-Identifier: Apache-2.0
"""Programs and maps as the eBPF sources declare them, for docs/DATAPATH.md (`make docs`) and for tests. Pure.

A program's or map's purpose is the first paragraph of the comment in front of it. The sources are read as clang-format
leaves them, and tests hold what is found against the compiled objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parents[2] / "bpf"
COMMENT: Final = r"/\*(?P<comment>(?:[^*]|\*(?!/))*)\*/\n"
PROGRAM: Final = re.compile(rf'(?:{COMMENT})?SEC\("(?P<section>[^"]+)"\)\nint (?P<name>\w+)\(')
MAP: Final = re.compile(rf'(?:{COMMENT})?struct \{{\n(?P<body>[^}}]*)\}} (?P<name>\w+) SEC\("\.maps"\)')
FIELD: Final = re.compile(r"__(?:uint|type|array)\((\w+), ([^;]*)\);")
DEFINE: Final = re.compile(r"^#define (\w+) +([^\n/\\]+)", re.MULTILINE)
HOOKS: Final = {"tc": "tc ingress", "xdp.frags": "native XDP"}
ATTACHED: Final = {"mesh_ingress", "mesh_guard"}  # although they have a slot
TEST_RUN: Final = "Test run only: "


@dataclass(frozen=True, slots=True)
class Program:
    """`slot`: its index in a PROG_ARRAY, for programs that others continue in by a tail call."""

    name: str
    object: str
    section: str
    purpose: str
    slot: str = ""

    @property
    def hook(self) -> str:
        """Where it runs. A program with a slot is attached as well if ATTACHED has it."""
        if self.purpose.startswith(TEST_RUN):
            return "none"
        if self.slot and self.name not in ATTACHED:
            return "tail call"
        return HOOKS.get(self.section, self.section.replace("/", " "))


@dataclass(frozen=True, slots=True)
class Map:
    """`key` and `value` are C types, empty for maps without; `entries` as declared: some are changed at load."""

    name: str
    file: str
    type: str
    key: str
    value: str
    entries: int
    purpose: str

    @property
    def pinned(self) -> bool:
        """The rule of mesh.datapath.kernel.loader."""
        return self.name.startswith("mesh_")


def _text(comment: str | None) -> str:
    lines = [line.strip(" *\t") for line in (comment or "").splitlines()]
    return " ".join(takewhile(bool, lines))


def programs() -> list[Program]:
    """Every SEC() program, by source file and order."""
    found = []
    for path in sorted(SOURCES.glob("*.bpf.c")):
        source = path.read_text()
        slots = {name: slot for slot, name in re.findall(r"\[(CALL_\w+)\] = \(void \*\)&(\w+)", source)}
        for match in PROGRAM.finditer(source):
            name = match["name"]
            purpose = _text(match["comment"])
            found.append(Program(name, path.stem + ".o", match["section"], purpose, slots.get(name, "")))
    return found


def maps() -> list[Map]:
    """Every map, shared ones first."""
    values = _constants()
    found = []
    for path in [*sorted(SOURCES.glob("lib/*.h")), *sorted(SOURCES.glob("*.bpf.c"))]:
        for match in MAP.finditer(path.read_text()):
            fields = dict(FIELD.findall(match["body"]))
            key, value = fields.get("key", ""), fields.get("value", "")
            if "values" in fields:
                key, value = "__u32", fields["values"].replace("int(void *)", "program")
            kind = fields["type"].removeprefix("BPF_MAP_TYPE_")
            entries = _number(fields.get("max_entries", "0"), values)
            found.append(
                Map(match["name"], str(path.relative_to(SOURCES)), kind, key, value, entries, _text(match["comment"]))
            )
    return sorted(found, key=lambda each: not each.pinned)


def _constants() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in [*SOURCES.glob("include/mesh/*.h"), *SOURCES.glob("lib/*.h"), *SOURCES.glob("*.bpf.c")]:
        found |= {name: value.strip() for name, value in DEFINE.findall(path.read_text())}
    verdicts = (SOURCES / "include/mesh/abi.h").read_text().partition("#define MESH_VERDICTS(X)")[2]
    found["MESH_VERDICT_COUNT"] = str(len(re.findall(r"\bX\(\w+, *\\?\s*\"", verdicts.partition("#define")[0])))
    return found


def _number(expression: str, values: dict[str, str]) -> int:
    """A C constant expression: a number, a name, a product or a shift."""
    text = expression.strip().strip("()")
    for operator in ("<<", "*"):
        left, found, right = text.partition(operator)
        if found:
            a, b = _number(left, values), _number(right, values)
            return a << b if operator == "<<" else a * b
    digits = re.fullmatch(r"(0x[0-9a-fA-F]+|\d+)u?", text)
    return int(digits[1], 0) if digits else _number(values[text], values)


def _rows(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def program_table() -> str:
    """The programs as Markdown."""

    rows = []
    for purpose, each in groupby(programs(), lambda each: each.purpose):
        same = list(each)  # those for IPv4 and IPv6
        rows.append((", ".join(f"`{p.name}`" for p in same), ", ".join(p.hook for p in same), purpose))
    return _rows(("program", "hook", "purpose"), iter(rows))


def map_table() -> str:
    """The map schema as Markdown."""

    def rows() -> Iterator[tuple[str, ...]]:
        for each in maps():
            key = f"`{each.key.removeprefix('struct ')}`" if each.key else ""
            value = f"`{each.value.removeprefix('struct ')}`" if each.value else ""
            entries = f"{each.entries:,}" if each.entries else "per socket"
            pinned = "yes" if each.pinned else "no"
            yield f"`{each.name}`", each.type.lower(), key, value, entries, pinned, each.purpose

    return _rows(("map", "type", "key", "value", "entries", "pinned", "purpose"), rows())
