# SPDX-License-Identifier: Apache-2.0
"""What the kernel's verifier says of each program, against a committed table. `python -m bench.verifier [--update]`.

Needs root. Verifiers differ from kernel to kernel, so the table (bpf/verifier.tsv) has rows for each kernel on which
it was written; time and stack are shown, and only the number of processed instructions is compared.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tabulate import tabulate

ROOT: Final = Path(__file__).parents[1]
OBJECTS: Final = ROOT / "mesh/datapath/kernel/objects"
TABLE: Final = ROOT / "bpf/verifier.tsv"
TOLERANCE: Final = 1.1
LOG_STATS, LOG_SIZE = 4, 1 << 16  # BPF_LOG_STATS, kernel/bpf/verifier.c
LRU_HASH, FEW = 9, 1024  # BPF_MAP_TYPE_LRU_HASH; its size does not matter to the verifier


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one program. `stack`: bytes of each function's frame, the program's first."""

    program: str
    instructions: int
    stack: tuple[int, ...]
    microseconds: int


def parse(program: str, log: str) -> Statistics:
    """The statistics at the end of a verifier log.

    Raises:
        ValueError: it has none.
    """
    found = re.search(r"processed (\d+) insns", log)
    stack, time = re.search(r"stack depth ([\d+]+)", log), re.search(r"verification time (\d+) usec", log)
    if found is None or stack is None or time is None:
        raise ValueError(f"{program}: no statistics in the verifier log")
    return Statistics(program, int(found[1]), tuple(map(int, stack[1].split("+"))), int(time[1]))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("bpf_object__open_file", pointer, [ctypes.c_char_p, pointer]),
        ("bpf_object__load", ctypes.c_int, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__next_map", pointer, [pointer, pointer]),
        ("bpf_map__type", ctypes.c_int, [pointer]),
        ("bpf_map__set_max_entries", ctypes.c_int, [pointer, ctypes.c_uint32]),
        ("bpf_object__next_program", pointer, [pointer, pointer]),
        ("bpf_program__name", ctypes.c_char_p, [pointer]),
        ("bpf_program__set_log_level", ctypes.c_int, [pointer, ctypes.c_uint32]),
        ("bpf_program__set_log_buf", ctypes.c_int, [pointer, ctypes.c_char_p, ctypes.c_size_t]),
        ("libbpf_set_print", pointer, [pointer]),
    ):
        call = getattr(library, name)
        call.restype, call.argtypes = result, arguments
    library.libbpf_set_print(None)
    return library


def verify(path: Path) -> list[Statistics]:
    """Load an object, which pins and attaches nothing, and let go of it again.

    Raises:
        OSError: the kernel, or libbpf, refuses it.
    """
    library = _library()
    opened = library.bpf_object__open_file(os.fsencode(path), None)
    if not opened:
        raise OSError(ctypes.get_errno(), "is no object", str(path))
    logs: dict[str, ctypes.Array[ctypes.c_char]] = {}
    try:
        item = None
        while item := library.bpf_object__next_map(opened, item):
            if library.bpf_map__type(item) == LRU_HASH:
                library.bpf_map__set_max_entries(item, FEW)
        item = None
        while item := library.bpf_object__next_program(opened, item):
            log = logs[library.bpf_program__name(item).decode()] = ctypes.create_string_buffer(LOG_SIZE)
            library.bpf_program__set_log_level(item, LOG_STATS)
            library.bpf_program__set_log_buf(item, log, LOG_SIZE)
        if library.bpf_object__load(opened):
            said = "\n".join(log.value.decode(errors="replace") for log in logs.values())
            raise OSError(ctypes.get_errno(), f"the kernel refuses it (root is needed)\n{said.strip()}", str(path))
        return [parse(name, log.value.decode()) for name, log in logs.items()]
    finally:
        library.bpf_object__close(opened)


def kernel() -> str:
    """Release of the running kernel, without what does not matter to the verifier: "6.12"."""
    return ".".join(re.findall(r"\d+", os.uname().release)[:2])


def read(text: str) -> dict[str, dict[str, int]]:
    """kernel -> program -> instructions of a table."""
    found: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            release, program, instructions = line.split("\t")
            found.setdefault(release, {})[program] = int(instructions)
    return found


def write(table: Mapping[str, Mapping[str, int]]) -> str:
    """The text of a table."""
    lines = ["# SPDX-License-Identifier: Apache-2.0", "# kernel\tprogram\tinstructions that its verifier processes"]
    for release in sorted(table, key=lambda each: [int(n) for n in each.split(".")]):
        lines += [f"{release}\t{program}\t{n}" for program, n in sorted(table[release].items())]
    return "\n".join(lines) + "\n"


def regressions(now: Iterable[Statistics], before: Mapping[str, int]) -> list[str]:
    """What is wrong, a line each: programs without a row, rows without a program, and more than 10 % more work."""
    found, seen = [], set()
    for each in now:
        seen.add(each.program)
        held = before.get(each.program)
        if held is None:
            found.append(f"{each.program} is not in the table")
        elif each.instructions > held * TOLERANCE:
            found.append(f"{each.program} takes {each.instructions} instructions, the table says {held}")
    return found + [f"{program} of the table does not exist" for program in sorted(before.keys() - seen)]


def main(argv: Sequence[str]) -> int:
    """Show, and compare or write the table."""
    parser = argparse.ArgumentParser(prog="bench.verifier", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write this kernel's rows of the table")
    update = parser.parse_args(argv).update
    now = [each for path in sorted(OBJECTS.glob("*.bpf.o")) for each in verify(path)]
    table = read(TABLE.read_text()) if TABLE.exists() else {}
    before = table.get(kernel(), {})
    rows = [(s.program, s.instructions, before.get(s.program), max(s.stack), s.microseconds / 1000) for s in now]
    print(tabulate(rows, ["program", "instructions", "table", "largest frame, bytes", "ms"], floatfmt=".1f"))
    if update:
        TABLE.write_text(write(table | {kernel(): {each.program: each.instructions for each in now}}))
        return 0
    if not before:
        print(f"bpf/verifier.tsv has no rows for kernel {kernel()}: make verifier UPDATE=1", file=sys.stderr)
        return 1
    problems = regressions(now, before)
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
