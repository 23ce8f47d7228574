# SPDX-License-Identifier: Apache-2.0
"""What a node demands of others: never more than they are sure to give."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import _abi
from mesh._siphash import siphash
from mesh.cluster.keys import Keys
from mesh.cluster.proofs import GRACE, NAME_AFTER, SKEW, Proofs
from mesh.cluster.wire import Report
from mesh.datapath import proof, tunnel_proof
from mesh.datapath.proof import Proof
from mesh.model import EngineKind, Node, ProofLevel
from tests.oracle import siphash as oracle
from tests.oracle import tunnel_proof as tunnel_oracle

NODES = [
    Node(n, f"name-{n}", ipaddress.ip_address(f"10.0.0.{i}"), engine=EngineKind.KERNEL) for i, n in enumerate("abc", 1)
]
B, C = (node.address for node in NODES[1:])
ADDRESS = ipaddress.ip_address("192.0.2.1")


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
    assert proofs.own is ProofLevel.TUNNEL
    assert proofs.heard("b", Report({}, proof=2, clock=1000.0), 1000.0)
    assert not proofs.heard("b", Report({}, proof=2, clock=1001.0), 1001.0)
    given_ = proofs.proof(levelled(proofs), "a")
    assert (given_.keys, given_.checking, given_.proving) == (keys.ring(), {B}, frozenset())
    clock.now += GRACE
    assert proofs.proof(levelled(proofs), "a").proving == {B}
    # A process that starts later demands it at once, and so does a manager that b has not called yet.
    later = Proofs(Keys(tmp_path / "keys.json"), require=False, clock=clock)
    assert later.proof([], "a") == Proof(keys.ring(), known=False)  # it knows of no node yet, and forgets nothing
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
    assert proofs.proof(wrong, "a") == Proof(keys.ring(), own=NODES[0].address)
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
    assert [ProofLevel.told(n) for n in (-1, 0, 1, 2, 3, 4, 99)] == [0, 0, 1, 2, 3, 3, 3]


def test_the_tunnel_is_proven_to_who_understands_and_demanded_when_that_is_known(tmp_path: Path) -> None:
    """A node says so with its reports; what proves at the peer port only is named."""
    proofs, keys, clock = make(tmp_path)
    keys.make()
    proofs.holds = tuple(keys.entries)
    proofs.heard("b", Report({}, proof=3), 0.0)
    proofs.heard("c", Report({}, proof=2), 0.0)
    given_ = proofs.proof(levelled(proofs), "a")
    assert (given_.tunnel_checking, given_.tunnel_proving) == ({B}, frozenset())
    assert given_.checking == {B, C}
    list(proofs.problems(levelled(proofs), "a"))
    clock.now += max(GRACE, NAME_AFTER)
    given_ = proofs.proof(levelled(proofs), "a")
    assert (given_.tunnel_checking, given_.tunnel_proving) == ({B}, {B})
    (line,) = proofs.problems(levelled(proofs), "a")
    assert line.startswith("node name-c: ") and "through the tunnel is accepted without a proof" in line
    later = Proofs(Keys(tmp_path / "keys.json"), require=False, clock=clock)  # of the next process: at once
    later.holds = proofs.holds
    assert later.proof(levelled(later), "a").tunnel_proving == {B}
    proofs.heard("b", Report({}, proof=2), 0.0)  # an earlier build is back
    assert proofs.proof(levelled(proofs), "a").tunnel_proving == frozenset() == keys.tunnel


def test_nothing_is_demanded_before_others_know_that_this_node_understands(tmp_path: Path) -> None:
    """Also of nodes that had to prove to an earlier process: they prove to this node once they are told of it."""
    proofs, keys, clock = make(tmp_path)
    keys.make()
    proofs.holds = tuple(keys.entries)
    keys.remember(tunnel=frozenset("b"))
    told = [replace(node, proof=ProofLevel.TUNNEL) for node in NODES[:2]]
    wrong = [replace(told[0], proof=ProofLevel.KNOWS), told[1]]
    given_ = proofs.proof(wrong, "a")
    assert (given_.tunnel_checking, given_.tunnel_proving) == ({B}, frozenset())
    given_ = proofs.proof(told, "a")
    assert (given_.tunnel_checking, given_.tunnel_proving) == ({B}, frozenset())
    clock.now += GRACE
    assert proofs.proof(told, "a").tunnel_proving == {B}


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.binary(min_size=12, max_size=12),
    st.integers(0, 2**62),
)
def test_a_proof_in_the_tunnel_is_the_hash_of_what_decides(
    secret: bytes, number: int, six: bool, source_port: int, destination_port: int, ident: bytes, now: int
) -> None:
    ends = [ipaddress.ip_address(a) for a in (("fd00::1", "fd00::2") if six else ("192.0.2.1", "192.0.2.2"))]
    flow = _abi.Flow(ends[0], ends[1], source_port, destination_port, 6)
    made = tunnel_proof.write((number, secret), ends[0], ends[1], flow, ident, now)
    ports = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    length = 60 if six else 40
    head = bytes([0x60, 0, 0, 0, 0, 20, 6, 64]) if six else bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0])
    packet = (head + ends[0].packed + ends[1].packed + ports).ljust(length, b"\0")
    names = str(ends[0]), str(ends[1])
    assert made == tunnel_oracle.proof((number, secret), *names, packet, ident, now >> tunnel_oracle.EPOCH)


def test_keys_between_nodes_are_those_of_a_direction() -> None:
    b = ipaddress.ip_address("fd00::2")
    rows = _abi.NODE_KEY.unpack_rows(tunnel_proof.pack_keys([(0xABCD1234, b"x" * 16), (5, b"y" * 16)], ADDRESS, b))
    assert [(row.name, row.valid) for row in rows] == [(0x1234, 1), (5, 1), (0, 0)]
    for key, ends in ((rows[0].sent, (str(ADDRESS), "fd00::2")), (rows[0].taken, ("fd00::2", str(ADDRESS)))):
        halves = key.first.to_bytes(8, "little") + key.second.to_bytes(8, "little")
        assert halves == tunnel_oracle.key_between(b"x" * 16, *ends)


def test_the_tunnel_tells_all_keys_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last four digits of their names."""
    names = iter(["00000001", "0badc0de", "1111c0de", "2222c0de", "33330002"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    keys = Keys(tmp_path / "keys.json")
    for _ in range(3):
        keys.make()
        keys.activate(keys.waiting())
    assert list(keys.entries) == ["33330002", "0badc0de"]


def test_what_an_earlier_process_demanded_holds_until_the_engine_has_the_keys(tmp_path: Path) -> None:
    """So a restart opens nothing, and is not taken for a node that has just begun to prove."""
    proofs, keys, clock = make(tmp_path)
    keys.make()
    keys.remember(tunnel=frozenset("b"))
    assert not proofs.proof(levelled(proofs), "a").known
    proofs.holds = tuple(keys.entries)
    given_ = proofs.proof(levelled(proofs), "a")
    assert (given_.known, given_.tunnel_proving, clock.now) == (True, {B}, Clock.now)


def test_a_node_that_is_removed_is_noticed_once(tmp_path: Path) -> None:
    """It had to prove itself, so it has the keys."""
    proofs, keys, clock = make(tmp_path)
    keys.make()
    proofs.holds = tuple(keys.entries)
    for node in "bc":
        proofs.heard(node, Report({}, proof=3), 0.0)
    proofs.proof(levelled(proofs), "a")
    clock.now += GRACE
    proofs.proof(levelled(proofs), "a")
    assert (keys.removed, keys.tunnel) == (0, {"b", "c"})
    proofs.proof([], "a")  # nothing is known of nodes
    assert keys.removed == 0
    proofs.proof(levelled(proofs)[:2], "a")
    assert keys.removed > 0 and keys.tunnel == {"b"} == keys.proving
    noticed = keys.removed
    proofs.proof(levelled(proofs)[:2], "a")
    assert keys.removed == noticed


def test_keys_are_shown_without_secrets(tmp_path: Path) -> None:
    proofs, keys, _ = make(tmp_path)
    for _ in range(2):
        keys.make()
        keys.activate(keys.waiting())
    keys.make()
    names = list(keys.entries)
    reports = {"a": Report({}, proof=3, holds=tuple(names)), "b": Report({}, proof=3, holds=tuple(names[1:]))}
    rows = proofs.rows({**reports, "old": Report({})})
    assert [(row["id"], row["state"], row["missing"]) for row in rows] == [
        (names[0], "waiting", ["b"]),
        (names[1], "in use", []),
        (names[2], "accepted", []),
    ]
    assert all(0 <= row["age_seconds"] < 60 for row in rows)
    assert {len(row) for row in rows} == {4}
