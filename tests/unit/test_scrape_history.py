# SPDX-License-Identifier: Apache-2.0
"""What is kept from one scrape to the next shows nothing that is old."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.agent_services import Services
from mesh.config import Config
from mesh.datapath.base import Applied, Counters, Stats
from mesh.datapath.memory import MemoryDatapath
from mesh.metrics.collector import Exposition, Snapshot
from mesh.model import HealthView, Inventory
from mesh.reconcile.compose import ComposeCache, Drained, compose
from mesh.reconcile.loop import Picture
from mesh.reconcile.plan import key_of, plan
from tests.unit.inventories import health_views, inventories
from tests.unit.metrics_samples import state as sample

histories = st.lists(st.tuples(inventories(), health_views(), st.booleans()), min_size=1, max_size=4)


def counted(applied: Applied) -> Stats:
    keys = [(f, key_of(e.state, t)) for f, e in applied.frontends.items() for t in e.state.targets]
    return Stats({f: Counters(opened=1) for f in applied.frontends}, {key: Counters(opened=1) for key in keys})


@settings(max_examples=40, deadline=None)
@given(histories)
def test_a_scrape_says_what_the_first_one_would(history: list[tuple[Inventory, HealthView, bool]]) -> None:
    engine, applied, cache = MemoryDatapath(), Applied(), ComposeCache()
    services, exposition = Services("proxy"), Exposition()
    for inventory, health, drains in history:
        drained = Drained(backends=frozenset({"s0.0"})) if drains else Drained()
        for known in (inventory, replace(inventory, backends=inventory.backends[:-1])):
            desired = compose(known, health, drained, Config(), cache)
            applied = engine.apply(plan(applied, desired))
            picture = Picture(known, health, drained, desired)
            shown, fresh = services.shown(picture, applied), Services("proxy").shown(picture, applied)
            assert shown == fresh
            now, first = (
                Snapshot(counted(applied), sample(0, 0) | {"services": which}, ready=True) for which in (shown, fresh)
            )
            assert exposition.collect(now) == Exposition().collect(first)
