# SPDX-License-Identifier: Apache-2.0
"""plan: the difference, in an order that never breaks, with ids and tables that stay."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh._abi import OWNER_FIRST, OWNER_PASS, SLOT_TRACKED
from mesh._maglev import SlotTable, backend_seed
from mesh.config.keys import Config
from mesh.datapath.base import Applied, Plan, key_of
from mesh.errors import DatapathError
from mesh.model import DesiredState, HealthView, Intent, Inventory
from mesh.reconcile import plan as plans
from mesh.reconcile.compose import ComposeCache, compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.plan import doubtful, plan, settle
from tests.support.inventories import inventories
from tests.support.memory import MemoryDatapath
from tests.support.parts import backend, of

histories = st.lists(inventories(), min_size=1, max_size=4)
thorough = settings(max_examples=30, deadline=None)


def owners(table: SlotTable) -> tuple[list[int], list[int]]:
    """Current and previous owners of all slots."""
    words = memoryview(table.to_bytes()).cast("I").tolist()
    return words[::2], [word & ~SLOT_TRACKED for word in words[1::2]]


def desired_of(inventory: Inventory) -> DesiredState:
    return compose(inventory, HealthView(), Drained(), Config())


def walk(history: list[Inventory]) -> list[tuple[Applied, DesiredState, Plan]]:
    """Plan after plan, each applied by an engine that refuses what a real one could not do."""
    engine, applied, steps = MemoryDatapath(), Applied(), []
    for inventory in history:
        desired = desired_of(inventory)
        step = plan(applied, desired)
        steps.append((applied, desired, step))
        applied = engine.apply(step)
    return steps


@thorough
@given(histories)
def test_the_result_is_what_is_desired_and_needs_no_further_step(history: list[Inventory]) -> None:
    for _, desired, step in walk(history):
        assert {f: e.state for f, e in step.result.frontends.items()} == dict(desired.frontends)
        assert plan(step.result, desired).empty
        for state in desired.frontends.values():
            for target in state.targets:
                assert step.result.backends[key_of(state, target)].target.address == target.address


def canonical(step: Plan) -> tuple[object, ...]:
    """All of a plan, whatever the order within a kind of step."""
    tables = [(e.state, e.table.to_bytes(), e.backends) for e in step.put_frontends]
    result = {f: (e.state, e.table.to_bytes(), e.backends) for f, e in step.result.frontends.items()}
    puts, drops = sorted(step.put_backends, key=lambda e: e.id), sorted(step.drop_backends, key=lambda e: e.id)
    return tables, puts, drops, step.drop_frontends, step.put_nodes, result, dict(step.result.backends)


@thorough
@given(histories, st.sets(st.integers(0, 7)), st.booleans())
def test_what_is_known_to_be_the_same_changes_no_plan(history: list[Inventory], parts: set[int], fails: bool) -> None:
    """States that are the same objects as before spare work and nothing else; also after a plan that has failed."""
    cache, applied = ComposeCache(), Applied()
    for number, known in enumerate(each for each in history for _ in range(2)):
        some = known.backends[: len(known.backends) // 2] if number in parts else known.backends
        desired = compose(replace(known, backends=some), HealthView(), Drained(), Config(), cache)
        copied = replace(desired, frontends={f: replace(state) for f, state in desired.frontends.items()})
        step = plan(applied, desired)
        assert canonical(step) == canonical(plan(applied, copied))
        applied = doubtful(applied, step) if fails and number % 3 == 0 else step.result


@thorough
@given(histories)
def test_current_owners_are_those_of_a_table_built_from_scratch(history: list[Inventory]) -> None:
    for _, desired, step in walk(history):
        for frontend, state in desired.frontends.items():
            fresh = SlotTable.build(
                state.options.table_size,
                [
                    (backend_seed(t.backend), step.result.backends[key_of(state, t)].id, t.weight)
                    for t in state.targets
                    if t.weight
                ],
            )
            table = step.result.frontends[frontend].table
            assert owners(table)[0] == owners(fresh)[0]


@thorough
@given(histories)
def test_flows_of_a_live_backend_stay(history: list[Inventory]) -> None:
    """A slot's un-noted flows belong to its previous owner before a step; while that one lives they do after it."""
    for applied, desired, step in walk(history):
        for frontend, entry in applied.frontends.items():
            after = step.result.frontends.get(frontend)
            if after is None or after.table.size != entry.table.size:
                continue
            names = {e.id: e.key.backend for e in applied.backends.values()}
            alive = {t.backend for t in desired.frontends[frontend].targets}
            currents, previouses = owners(entry.table)
            for before, now in set(zip(previouses, owners(after.table)[1], strict=True)):
                if before == OWNER_PASS or names.get(before) in alive:
                    assert now == before
            assert {owner for owner in currents if names.get(owner) in alive} <= set(after.backends)


@thorough
@given(histories)
def test_ids_are_stable_unique_and_not_dropped_while_named(history: list[Inventory]) -> None:
    for applied, _, step in walk(history):
        ids = [e.id for e in step.result.backends.values()]
        assert len(ids) == len(set(ids))
        assert all(number >= OWNER_FIRST for number in ids)
        for key, entry in step.result.backends.items():
            if key in applied.backends:
                assert entry.id == applied.backends[key].id
        named = {owner for e in step.result.frontends.values() for owner in e.table.owners() if owner >= OWNER_FIRST}
        assert named <= set(ids)
        assert not named & {e.id for e in step.drop_backends}


@thorough
@given(histories, st.sets(st.integers(2, 12)))
def test_reserved_ids_are_not_given_out(history: list[Inventory], reserved: set[int]) -> None:
    step = plan(Applied(), desired_of(history[0]), reserved)
    assert not {e.id for e in step.result.backends.values()} & reserved


@thorough
@given(histories)
def test_settled_tables_have_no_past_and_leave_nothing_behind(history: list[Inventory]) -> None:
    _, desired, step = walk(history)[-1]
    engine = MemoryDatapath(step.result)
    rest = settle(step.result, list(step.result.frontends), {})
    done = engine.apply(rest)
    assert not any(e.table.tracked for e in done.frontends.values())
    assert plan(done, desired).empty
    wanted = {key_of(s, t) for s in desired.frontends.values() for t in s.targets}
    assert set(done.backends) == wanted


def test_slots_with_live_flows_stay_in_transition() -> None:
    step = plan(Applied(), desired_of(of(backend("a"), backend("b"))))
    (frontend,) = step.result.frontends
    table = settle(step.result, [frontend], {frontend: frozenset({3, 5})}).result.frontends[frontend].table
    assert [i for i in range(table.size) if table.slot(i)[2]] == [3, 5]


def test_a_new_frontend_leads_from_pass() -> None:
    step = plan(Applied(), desired_of(of(backend("a"))))
    (entry,) = step.put_frontends
    assert entry.table.slot(0) == (OWNER_FIRST, OWNER_PASS, True)


def test_one_change_among_many_builds_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Inventory(
        tuple(replace(of().services[0], id=f"s{n}", name=f"s{n}", ports=_port(8000 + n)) for n in range(50)),
        tuple(backend(f"b{n}.{k}", service=f"s{n}") for n in range(50) for k in range(3)),
    )
    applied = plan(Applied(), desired_of(many)).result
    builds = []
    build = plans._build
    monkeypatch.setattr(plans, "_build", lambda *args: builds.append(1) or build(*args))
    changed = replace(many.backends[0], intent=Intent.DRAINING)
    step = plan(applied, desired_of(replace(many, backends=(changed, *many.backends[1:]))))
    assert len(builds) == 1
    assert [e.state.service for e in step.put_frontends] == ["s0"]
    others = [f for f, e in step.result.frontends.items() if e.state.service != "s0"]
    assert all(step.result.frontends[f].table is applied.frontends[f].table for f in others)


def _port(published: int, target: int = 80):  # type: ignore[no-untyped-def]
    port = of().services[0].ports[0]
    return (replace(port, published=published, target=target),)


def test_another_target_port_keeps_the_old_one_until_the_calm() -> None:
    before = of(backend("a"))
    after = replace(before, services=(replace(before.services[0], ports=_port(8080, 81)),))
    applied = plan(Applied(), desired_of(before)).result
    step = plan(applied, desired_of(after))
    assert {key.port for key in step.result.backends} == {80, 81}
    assert {key.port for key in settle(step.result, list(step.result.frontends), {}).result.backends} == {81}


def test_a_backend_that_is_gone_is_forgotten_at_once() -> None:
    applied = plan(Applied(), desired_of(of(backend("a"), backend("b")))).result
    step = plan(applied, desired_of(of(backend("b"))))
    assert [e.key.backend for e in step.drop_backends] == ["a"]
    (entry,) = step.result.frontends.values()
    assert entry.table.owners() <= {OWNER_PASS, step.result.backends[next(iter(step.result.backends))].id}


def test_too_many_backends_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_BACKENDS", 4)
    with pytest.raises(DatapathError, match="3 backends, but there is room for 2"):
        plan(Applied(), desired_of(of(*(backend(n) for n in "abc"))))


def test_who_may_hand_flows_over_is_a_step_of_its_own() -> None:
    nodes = (ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.0.0.2"))
    first = plan(Applied(), DesiredState(nodes=nodes))
    assert (first.put_nodes, first.result.nodes, first.empty) == (nodes, nodes, False)
    assert plan(first.result, DesiredState(nodes=nodes)).empty
    assert plan(first.result, DesiredState()).put_nodes == ()
    assert plan(doubtful(Applied(nodes=nodes), first), DesiredState(nodes=nodes)).put_nodes == nodes


def test_a_state_that_is_equal_is_put_no_more_and_known_from_then_on() -> None:
    desired = desired_of(of(backend("a"), backend("b")))
    applied = plan(Applied(), desired).result
    copied = replace(desired, frontends={f: replace(state) for f, state in desired.frontends.items()})
    step = plan(applied, copied)
    assert step.empty
    for frontend, state in copied.frontends.items():
        assert step.result.frontends[frontend].state is state
        assert step.result.frontends[frontend].table is applied.frontends[frontend].table
