# SPDX-License-Identifier: Apache-2.0
"""What is read from the eBPF sources is all that is there, and the verifier's table names it."""

from __future__ import annotations

import re

import pytest

from bench import verifier
from mesh import _abi, _bpf
from mesh.datapath.kernel.loader import OBJECTS
from tests.support import bpf_schema

PROGRAMS = {program.name: program for program in bpf_schema.programs()}
MAPS = {each.name: each for each in bpf_schema.maps()}


def test_every_program_and_map_of_the_objects_is_found() -> None:
    programs: dict[str, str] = {}
    maps: set[str] = set()
    for path in sorted(OBJECTS.glob("*.bpf.o")):
        opened = _bpf.Object(str(path))
        programs |= {name: f"{path.name} {section}" for name, section in opened.programs().items()}
        maps |= {name for name in opened.maps() if "." not in name}  # global data is in ".rodata" and the like
    assert {name: f"{each.object} {each.section}" for name, each in PROGRAMS.items()} == programs
    assert maps == MAPS.keys()


def test_each_has_a_purpose_and_maps_have_their_sizes() -> None:
    purposes = {name: each.purpose for name, each in PROGRAMS.items()} | {n: each.purpose for n, each in MAPS.items()}
    assert [name for name, purpose in purposes.items() if not purpose.endswith((".", ")"))] == []
    assert {name: MAPS[name].entries for name in ("mesh_ports", "mesh_recent", "mesh_backends", "mesh_verdicts")} == {
        "mesh_ports": 2 * 65536,
        "mesh_recent": 1 << 17,
        "mesh_backends": 65536,
        "mesh_verdicts": len(_abi.VERDICTS),
    }


def test_headers_hold_neither_programs_nor_tail_calls_and_maps_have_two_places() -> None:
    headers = {path.name: path.read_text() for path in bpf_schema.SOURCES.glob("lib/*.h")}
    assert [
        name for name, text in headers.items() if re.search(r'SEC\("(?!\.|license)', text) or "PROG_ARRAY" in text
    ] == []
    assert {each.file for each in MAPS.values() if each.type != "PROG_ARRAY"} == {"lib/maps.h", "lib/scratch.h"}


def test_where_programs_run() -> None:
    hooks = {name: each.hook for name, each in PROGRAMS.items()}
    assert {name for name, hook in hooks.items() if hook == "tail call"} == {
        "mesh_icmp",
        "mesh_tunnel_rx",
        "mesh_tunnel_tx",
        "mesh_tunnel_reply",
        "mesh_early",
        "mesh_task_early",
    }
    assert (hooks["mesh_ingress"], hooks["mesh_explain"], hooks["mesh_connect4"]) == (
        "tc ingress",
        "none",
        "cgroup connect4",
    )


def test_the_table_of_the_verifier_names_every_program() -> None:
    table = verifier.read(verifier.TABLE.read_text())
    assert table and all(rows.keys() == PROGRAMS.keys() for rows in table.values())
    assert verifier.write(table) == verifier.TABLE.read_text()


def test_statistics_are_read_from_the_log() -> None:
    log = "verification time 254207 usec\nstack depth 240+8+0\nprocessed 99242 insns (limit 1000000) peak_states 9\n"
    assert verifier.parse("p", log) == verifier.Statistics("p", 99242, (240, 8, 0), 254207)
    with pytest.raises(ValueError, match="p: no statistics"):
        verifier.parse("p", "")


def test_more_than_a_tenth_is_a_regression() -> None:
    before = {"a": 100, "b": 100, "gone": 1}
    now = [verifier.Statistics(name, n, (0,), 1) for name, n in (("a", 110), ("b", 111), ("new", 1))]
    assert verifier.regressions(now, before) == [
        "b takes 111 instructions, the table says 100",
        "new is not in the table",
        "gone of the table does not exist",
    ]
    assert verifier.regressions(now[:1], {"a": 100}) == []
