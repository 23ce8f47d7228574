# SPDX-License-Identifier: Apache-2.0
"""The loop: one writer, one apply a burst, never on the event loop, and nothing that goes wrong ends it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config.keys import Config
from mesh.datapath.base import Applied, Plan, key_of
from mesh.errors import DatapathError
from mesh.model import DesiredState, Health, HealthView, Inventory
from mesh.reconcile import loop as loops
from mesh.reconcile.compose import compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Picture, Reconciler
from mesh.reconcile.plan import doubtful, plan
from tests.support.inventories import inventories
from tests.support.memory import MemoryDatapath
from tests.support.parts import ADDRESS, backend, of
from tests.support.polling import PATIENCE, until


@contextlib.asynccontextmanager
async def running(engine: MemoryDatapath, config: Config | None = None) -> AsyncIterator[Reconciler]:
    reconciler = Reconciler(engine, config or Config())
    await reconciler.open()
    task = asyncio.create_task(reconciler.run())
    try:
        yield reconciler
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await reconciler.close(release=False)


def weights(applied: Applied) -> dict[str, int]:
    return {t.backend: t.weight for e in applied.frontends.values() for t in e.state.targets}


async def test_a_burst_costs_one_apply() -> None:
    engine = MemoryDatapath()
    async with running(engine) as reconciler:
        for n in range(1000):
            reconciler.publish(of(*(backend(f"b{k}", address=ADDRESS + k) for k in range(n % 7))))
            reconciler.set_health(HealthView({"b0": Health.UP}))
        reconciler.publish(of(backend("last")))
        await until(lambda: reconciler.in_step)
        assert reconciler.counts.count == len(engine.plans) == 1
        assert weights(reconciler.applied) == {"last": 1}
        reconciler.publish(of(backend("last")))
        await until(lambda: reconciler.in_step)
        assert len(engine.plans) == 1


async def test_a_state_that_changes_nothing_in_the_engine_is_applied() -> None:
    engine = MemoryDatapath()
    async with running(engine) as reconciler:
        reconciler.publish(of(backend("a")))
        await until(lambda: reconciler.in_step)
        picture = reconciler.picture  # what a next process adopts need not have all that is desired, like nodes
        reconciler.picture = replace(picture, desired=replace(picture.desired, nodes=(ADDRESS,)))
        reconciler.publish(of(backend("a")))
        await until(lambda: reconciler.in_step)
        assert len(engine.plans) == 1
        assert reconciler.applied.generation == reconciler.picture.desired.generation > engine.plans[0].generation


async def test_the_event_loop_runs_while_an_apply_blocks() -> None:
    engine, release, entered = MemoryDatapath(), threading.Event(), threading.Event()

    def block(_: Plan) -> None:
        entered.set()
        assert release.wait(PATIENCE)

    engine.before_apply = block
    async with running(engine) as reconciler:
        reconciler.publish(of(backend("a")))
        await until(entered.is_set)  # this very loop ticks while the apply is stuck
        ticks = 0
        while ticks < 100:
            await asyncio.sleep(0)
            ticks += 1
        for _ in range(500):
            reconciler.publish(of(backend("b")))
        release.set()
        await until(lambda: reconciler.in_step)
        assert len(engine.plans) == 2  # what came during the first one is one more
        assert threading.get_ident() not in engine.threads
        assert len(engine.threads) == 1


async def test_an_error_is_shown_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "BACKOFF", (0.01, 0.02))
    engine, failures, room = MemoryDatapath(), [], threading.Event()

    def fail(plan: Plan) -> None:
        if not room.is_set():
            failures.append(plan)
            raise DatapathError("no room", where="engine")

    engine.before_apply = fail
    async with running(engine) as reconciler:
        reconciler.publish(of(backend("a")))
        await until(lambda: reconciler.counts.last_error == "engine: no room" and len(failures) > 2)
        room.set()
        await until(lambda: bool(engine.plans))
        await until(lambda: reconciler.counts.last_error == "")
        assert (reconciler.counts.count, reconciler.counts.failed) == (len(failures) + 1, len(failures))
        assert weights(reconciler.applied) == {"a": 1}


async def test_even_a_bug_in_the_engine_does_not_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "BACKOFF", (0.01, 0.02))
    engine = MemoryDatapath()
    engine.before_apply = lambda plan: (_ for _ in ()).throw(ZeroDivisionError("oh"))
    async with running(engine) as reconciler:
        reconciler.publish(of(backend("a")))
        await until(lambda: "ZeroDivisionError: oh" in reconciler.counts.last_error)
        engine.before_apply = lambda plan: None
        await until(lambda: weights(reconciler.applied) == {"a": 1})


async def test_nothing_is_removed_before_the_first_inventory() -> None:
    survived = plan(Applied(), desired_of(of(backend("a")))).result
    engine = MemoryDatapath(survived)
    async with running(engine) as reconciler:
        reconciler.set_health(HealthView({"a": Health.UP}))
        reconciler.set_drained(Drained())
        await asyncio.sleep(5 * loops.COALESCE)
        assert not engine.plans
        assert reconciler.applied is survived
        reconciler.publish(of(backend("a")))
        await until(lambda: reconciler.in_step)
        assert not engine.plans  # adopted as it was


async def test_a_port_that_is_taken_is_retried_and_the_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "BACKOFF", (0.01, 0.02))
    engine = MemoryDatapath()
    (port,) = of().services[0].ports
    both = replace(of(backend("a")), services=(replace(of().services[0], ports=(port, replace(port, published=81))),))
    engine.refused = {replace(port, published=81).frontend}
    async with running(engine) as reconciler:
        reconciler.publish(both)
        await until(lambda: len(engine.plans) > 2)
        assert list(reconciler.applied.frontends) == [port.frontend]
        assert "taken" in reconciler.problems[0]
        engine.refused = set()
        await until(lambda: len(reconciler.applied.frontends) == 2)
        await until(lambda: not reconciler.problems)


async def test_health_and_drain_reach_the_engine() -> None:
    engine = MemoryDatapath()
    async with running(engine) as reconciler:
        reconciler.publish(of(backend("a"), backend("b"), backend("c")))
        reconciler.set_health(HealthView({"a": Health.DOWN}))
        reconciler.set_drained(Drained(frozenset({"b"})))
        await until(lambda: weights(reconciler.applied) == {"a": 0, "b": 0, "c": 1})


async def test_what_the_guard_holds_goes_when_its_time_has_come() -> None:
    engine = MemoryDatapath()
    async with running(engine, Config(guard_hold=0.05)) as reconciler:
        reconciler.publish(of(*(backend(n) for n in "abcd")))
        await until(lambda: len(weights(reconciler.applied)) == 4)
        reconciler.publish(of(backend("a")))
        await until(lambda: weights(reconciler.applied) == {"a": 1})
        assert reconciler.picture.desired.generation == 2


async def test_tables_settle_after_the_calm_without_any_event() -> None:
    engine = MemoryDatapath()
    async with running(engine, Config(transition_calm=0.05)) as reconciler:
        reconciler.publish(of(backend("a")))
        await until(lambda: bool(engine.plans))
        await until(lambda: len(engine.plans) > 1)
        await until(lambda: not any(e.table.tracked for e in reconciler.applied.frontends.values()))
        assert len(engine.plans) == 2


async def test_changes_are_told_with_before_and_after() -> None:
    seen: list[tuple[Picture, Picture]] = []
    reconciler = Reconciler(MemoryDatapath(), Config(), on_change=lambda *pair: seen.append(pair))
    await reconciler.open()
    task = asyncio.create_task(reconciler.run())
    reconciler.publish(of(backend("a")))
    await until(lambda: bool(seen))
    task.cancel()
    before, after = seen[0]
    assert not before.desired.frontends
    assert after.desired.frontends
    await reconciler.close(release=True)


def desired_of(inventory: Inventory) -> DesiredState:
    return compose(inventory, HealthView(), Drained(), Config())


def part_of(applied: Applied, step: Plan, done: int) -> Applied:
    """What an engine holds that carried out the first `done` single steps of a plan."""
    frontends, backends = dict(applied.frontends), dict(applied.backends)
    steps: list[Callable[[], object]] = []
    steps += [lambda e=e: backends.update({e.key: e}) for e in step.put_backends]
    steps += [lambda e=e: frontends.update({e.state.frontend: e}) for e in step.put_frontends]
    steps += [lambda f=f: frontends.pop(f) for f in step.drop_frontends]
    steps += [lambda e=e: backends.pop(e.key) for e in step.drop_backends]
    for single in steps[:done]:
        single()
    return Applied(applied.generation, frontends, backends)


@settings(max_examples=100, deadline=None)
@given(inventories(), inventories(), inventories(), st.integers(0, 60))
def test_after_a_plan_half_done_the_next_one_mends_everything(
    one: Inventory, two: Inventory, three: Inventory, done: int
) -> None:
    applied = plan(Applied(), desired_of(one)).result
    failed = plan(applied, desired_of(two))
    held = part_of(applied, failed, done)
    mending = plan(doubtful(applied, failed), desired_of(three))
    drops = {e.key for e in mending.drop_backends}
    frontends = {f: e for f, e in held.frontends.items() if f not in mending.drop_frontends}
    frontends |= {e.state.frontend: e for e in mending.put_frontends}
    backends = {k: e for k, e in held.backends.items() if k not in drops} | {e.key: e for e in mending.put_backends}
    assert backends == mending.result.backends
    assert {f: e.state for f, e in frontends.items()} == dict(desired_of(three).frontends)
    assert all(e.table == mending.result.frontends[f].table for f, e in frontends.items())
    for state in desired_of(three).frontends.values():
        assert {key_of(state, t) for t in state.targets} <= set(backends)
