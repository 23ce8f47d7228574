# SPDX-License-Identifier: Apache-2.0
"""What a node demands of others: never more than they are sure to give."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mesh._siphash import siphash
from mesh.cluster.keys import Keys
from mesh.cluster.proofs import GRACE, NAME_AFTER, SKEW, Proofs
from mesh.cluster.wire import Report
from mesh.datapath import proof
from mesh.datapath.proof import Proof
from mesh.model import EngineKind, Node, ProofLevel
from tests.oracle import siphash as oracle

NODES = [
    Node(n, f"name-{n}", ipaddress.ip_address(f"10.0.0.{i}"), engine=EngineKind.KERNEL) for i, n in enumerate("abc", 1)
]
B, C = (node.address for node in NODES[1:])


class Clock:
    now = 500.0

    def __call__(self) -> float:
        return self.now


def make(tmp_path: Path, *, require: bool = False) -> tuple[Proofs, Keys, Clock]:
    clock = Clock()
    keys = Keys(tmp_path / "keys.json")
    return Proofs(keys, require=require, clock=clock), keys, clock


def levelled(proofs: Proofs, own: str = "a") -> list[Node]:
    return [replace(node, proof=proofs.level(node, own, reads=True)) for node in NODES]


def test_a_node_has_to_prove_a_moment_after_it_said_that_it_does(tmp_path: Path) -> None:
    proofs, keys, clock = make(tmp_path)
    keys.make()
    assert proofs.own is ProofLevel.KNOWS
    proofs.holds = tuple(keys.entries)
    assert proofs.own is ProofLevel.PROVES
    assert proofs.heard("b", Report({}, proof=2, clock=1000.0), 1000.0)
    assert not proofs.heard("b", Report({}, proof=2, clock=1001.0), 1001.0)
    given_ = proofs.proof(levelled(proofs), "a")
    assert (given_.keys, given_.checking, given_.proving) == (keys.ring(), {B}, frozenset())
    clock.now += GRACE
    assert proofs.proof(levelled(proofs), "a").proving == {B}
    # A process that starts later demands it at once, and so does a manager that b has not called yet.
    later = Proofs(Keys(tmp_path / "keys.json"), require=False, clock=clock)
    assert later.proof([], "a") == Proof(keys.ring())  # it knows of no node yet, and forgets nothing
    later.holds = proofs.holds
    assert later.proof(levelled(later), "a").proving == {B}


def test_who_is_told_believes_a_manager(tmp_path: Path) -> None:
    """Of others, and of itself: a node whose clock a manager finds wrong demands nothing, for it could not check."""
    proofs, keys, clock = make(tmp_path)
    keys.make()
    proofs.holds = tuple(keys.entries)
    told = [replace(node, proof=ProofLevel.PROVES) for node in NODES[:2]]
    assert [proofs.level(node, "a", reads=False) for node in told] == [ProofLevel.PROVES] * 2
    proofs.proof(told, "a")
    clock.now += GRACE
    assert proofs.proof(told, "a").proving == {B}
    wrong = [replace(told[0], proof=ProofLevel.KNOWS), told[1]]
    assert proofs.proof(wrong, "a") == Proof(keys.ring())
    assert proofs.proof(told, "a").proving == {B}  # at once


def test_a_node_that_proves_by_an_unknown_key_need_not(tmp_path: Path) -> None:
    """As to a manager that has lost its keys, until all have its new one."""
    proofs, keys, _ = make(tmp_path)
    keys.make()
    proofs.heard("b", Report({}, proof=2, holds=("0badcafe", *keys.entries)), 0.0)
    assert proofs.level(NODES[1], "a", reads=True) is ProofLevel.KNOWS
    proofs.heard("b", Report({}, proof=2, holds=tuple(keys.entries)), 0.0)
    assert proofs.level(NODES[1], "a", reads=True) is ProofLevel.PROVES


def test_a_build_without_proofs_is_believed_that_it_has_none(tmp_path: Path) -> None:
    proofs, keys, clock = make(tmp_path)
    keys.make()
    proofs.holds = tuple(keys.entries)
    proofs.heard("b", Report({}, proof=2), 0.0)
    proofs.proof(levelled(proofs), "a")
    clock.now += GRACE
    assert proofs.proof(levelled(proofs), "a").proving == {B}
    assert proofs.heard("b", Report({}), 0.0)  # downgraded
    assert proofs.proof(levelled(proofs), "a").proving == frozenset()
    assert keys.proving == frozenset()
    assert list(proofs.problems(levelled(proofs), "a")) == []
    clock.now += NAME_AFTER
    lines = list(proofs.problems(levelled(proofs), "a"))
    assert [line.split(":")[0] for line in lines] == ["node name-b", "node name-c"]
    assert all("accepted without a proof" in line for line in lines)


def test_a_node_with_a_wrong_clock_need_not_prove(tmp_path: Path) -> None:
    """Its proofs would be refused: nothing is lost, and it is named."""
    proofs, keys, _ = make(tmp_path)
    keys.make()
    proofs.holds = tuple(keys.entries)
    proofs.heard("b", Report({}, proof=2, clock=1000.0 + SKEW + 1), 1000.0)
    assert proofs.level(NODES[1], "a", reads=True) is ProofLevel.KNOWS
    (line,) = proofs.problems(levelled(proofs), "a")
    assert line.startswith("node name-b: its clock is +31 s off")
    proofs.heard("b", Report({}, proof=2, clock=1000.0 - SKEW), 1000.0)
    assert proofs.level(NODES[1], "a", reads=True) is ProofLevel.PROVES
    assert list(proofs.problems(levelled(proofs), "a")) == []


def test_require_says_so(tmp_path: Path) -> None:
    proofs, _, clock = make(tmp_path, require=True)
    assert proofs.last.require and proofs.proof(levelled(proofs), "a").require
    list(proofs.problems(levelled(proofs), "a"))
    clock.now += NAME_AFTER
    assert all("refused" in line for line in proofs.problems(levelled(proofs), "a"))


def test_a_key_is_used_once_all_hold_it(tmp_path: Path) -> None:
    proofs, keys, _ = make(tmp_path)
    keys.make()
    name = keys.waiting()
    reports = {"b": Report({}, proof=1), "old": Report({})}
    assert proofs.ready(reports, reports.__getitem__) == ""  # not here
    proofs.holds = (name,)
    assert proofs.ready(reports, reports.__getitem__) == ""  # not on b
    reports["b"] = Report({}, proof=2, holds=(name,))
    assert proofs.ready(reports, reports.__getitem__) == name  # the old build counts for nothing
    keys.activate(name)
    assert proofs.ready(reports, reports.__getitem__) == ""


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.binary(max_size=64), st.integers(0, 2**33))
def test_a_proof_is_the_hash_of_all_that_it_is_for(secret: bytes, number: int, body: bytes, now: int) -> None:
    made = proof.write((number, secret), proof.UDP, body, now)
    head = number.to_bytes(4, "big") + (now % 2**32).to_bytes(4, "big")
    assert made[:8] == head
    assert int.from_bytes(made[8:], "little") == oracle.siphash(secret, b"\x02" + head + body)
    assert proof.write((number, secret), proof.TCP, body, now) != made
    assert siphash(secret, b"\x02" + head + body).to_bytes(8, "little") == made[8:]


def test_levels_of_later_builds_are_known_ones() -> None:
    assert [ProofLevel.told(n) for n in (-1, 0, 1, 2, 3, 99)] == [0, 0, 1, 2, 2, 2]
