# SPDX-License-Identifier: Apache-2.0
"""Nodes side by side: what differs is said in words, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

from mesh.cluster.agreement import differences
from tests.support.rows import DNS, ONE, TWO, WEB

THREE = replace(ONE, id="3", name="three", engine="kernel", age=0.2)


def test_equal_nodes_have_no_difference() -> None:
    assert differences([ONE, TWO, THREE]) == []
    assert differences([]) == []


def test_another_table_and_a_missing_one() -> None:
    other = replace(THREE, digests={WEB: "cc"})
    table, missing = sorted(differences([ONE, TWO, other]), key=lambda text: "not served" in text)
    assert table.startswith(f"{WEB}: three would choose other tasks than one, two (")
    assert missing == f"{DNS} is not served by three"


def test_nodes_that_say_nothing() -> None:
    assert differences([ONE, replace(TWO, up=False, digests={})]) == [
        "node two does not answer: its tasks get no new connections"
    ]
    (never,) = differences([ONE, replace(TWO, age=None, digests={})])
    assert never.startswith("node two: no agent there has called yet")
    assert differences([ONE, replace(TWO, age=12.4, digests={WEB: "old"})]) == [
        "node two: its agent was last heard of 12 s ago"
    ]


def test_versions() -> None:
    assert differences([ONE, replace(TWO, mesh="0.2")]) == [
        "the nodes run different versions of mesh: 0.1 on 1, 0.2 on 1"
    ]
