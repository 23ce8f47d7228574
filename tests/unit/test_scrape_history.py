# SPDX-License-Identifier: Apache-2.0
"""What is kept from one scrape to the next shows nothing that is old."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.api.services import Services
from mesh.config.keys import Config
from mesh.datapath.base import Applied, Stats, key_of
from mesh.datapath.counters import Counters
from mesh.metrics.exposition import Exposition, Snapshot
from mesh.model import Backend, EngineKind, HealthView, Inventory, Node, Protocol, PublishedPort, Service
from mesh.reconcile.compose import ComposeCache, compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Picture
from mesh.reconcile.plan import plan
from tests.support.inventories import health_views, inventories
from tests.support.memory import MemoryDatapath
from tests.support.metrics_samples import state as sample

histories = st.lists(st.tuples(inventories(), health_views(), st.booleans()), min_size=1, max_size=4)


def counted(applied: Applied) -> Stats:
    keys = [(f, key_of(e.state, t)) for f, e in applied.frontends.items() for t in e.state.targets]
    return Stats({f: Counters(opened=1) for f in applied.frontends}, {key: Counters(opened=1) for key in keys})


@settings(max_examples=40, deadline=None)
@given(histories)
def test_a_scrape_says_what_the_first_one_would(history: list[tuple[Inventory, HealthView, bool]]) -> None:
    engine, applied, cache = MemoryDatapath(), Applied(), ComposeCache()
    services, exposition = Services(EngineKind.PROXY), Exposition()
    for inventory, health, drains in history:
        drained = Drained(backends=frozenset({"s0.0"})) if drains else Drained()
        for known in (inventory, replace(inventory, backends=inventory.backends[:-1])):
            desired = compose(known, health, drained, Config(), cache)
            applied = engine.apply(plan(applied, desired))
            picture = Picture(known, health, drained, desired=desired)
            shown, fresh = services.shown(picture, applied), Services(EngineKind.PROXY).shown(picture, applied)
            assert shown == fresh
            now, first = (
                Snapshot(counted(applied), sample(0, 0) | {"services": which}, ready=True) for which in (shown, fresh)
            )
            assert exposition.collect(now) == Exposition().collect(first)


def test_targets_that_stay_are_shown_by_the_same_objects() -> None:
    """Also where the drained ones are told anew, as long as they are the same ones."""
    published = (PublishedPort(8080, 80, Protocol.TCP),)
    backends = tuple(Backend(f"b{n}", "s", "n", IPv4Address(f"172.18.0.{n + 2}")) for n in range(3))
    before = Inventory((Service("s", "web", published),), backends, (Node("n", "n"),), source="static")
    after = replace(before, backends=(*backends[1:], replace(backends[0], id="new")))
    engine, applied, cache = MemoryDatapath(), Applied(), ComposeCache()
    services = Services(EngineKind.PROXY)
    shown = []
    for inventory, drained in (
        (before, frozenset({"b1"})),
        (after, frozenset({"b1"})),
        (after, frozenset({"b2"})),
    ):
        picture = Picture(
            inventory,
            HealthView(),
            Drained(drained),
            desired=compose(inventory, HealthView(), Drained(drained), Config(), cache),
        )
        applied = engine.apply(plan(applied, picture.desired))
        (service,) = services.shown(picture, applied)
        shown.append({target["backend"]: target for target in service["frontends"][0]["targets"]})
    same = ("b1", "b2")
    assert shown[0].keys() == {"b0", *same} and shown[1].keys() == {"new", *same}
    assert shown[1]["b1"] is shown[0]["b1"]
    assert [shown[2][name]["taking"] for name in same] == ["yes", "no: drained"]
