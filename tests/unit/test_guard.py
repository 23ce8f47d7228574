# SPDX-License-Identifier: Apache-2.0
"""guard: a source's mistake is slowed, everybody's wish is followed at once."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config.keys import Config
from mesh.model import DesiredState, Health, HealthView, Intent, Inventory
from mesh.reconcile.compose import compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.guard import FOREVER, Guarded, guard
from tests.support.inventories import health_views, inventories
from tests.support.parts import ADDRESS, backend, of, service

CONFIG = Config(guard_max_removal=0.5, guard_hold=5.0)
CALM = HealthView()


def desired_of(inventory: Inventory, health: HealthView = CALM) -> DesiredState:
    return compose(inventory, health, Drained(), CONFIG)


def several(names: str, **changes: object) -> Inventory:
    return of(*(backend(n, address=ADDRESS + i, **changes) for i, n in enumerate(names)))


def after(before: Guarded, inventory: Inventory, now: float, health: HealthView = CALM) -> Guarded:
    desired = desired_of(inventory, health)
    return guard(before.desired, desired, before.held, health=health, now=now, config=CONFIG)


def start(inventory: Inventory) -> Guarded:
    return after(Guarded(DesiredState()), inventory, 0.0)


def served(guarded: Guarded) -> set[str]:
    return {t.backend for s in guarded.desired.frontends.values() for t in s.targets if t.weight}


def test_a_mass_loss_is_held_and_then_followed() -> None:
    first = start(several("abcdef"))
    lost = after(first, several("ab"), 1.0)
    assert served(lost) == set("abcdef")
    assert lost.due == 6.0
    assert "holding back" in lost.messages[0]
    still = after(lost, several("ab"), 3.0)
    assert served(still) == set("abcdef")
    assert not still.messages
    gone = after(still, several("ab"), 6.0)
    assert served(gone) == set("ab")
    assert gone.due == FOREVER
    assert "no longer holding back" in gone.messages[0]


def test_what_comes_back_is_no_longer_held() -> None:
    lost = after(start(several("abcdef")), several("a"), 1.0)
    assert not after(lost, several("abcdef"), 2.0).held


def test_a_scale_down_announced_by_draining_is_followed_at_once() -> None:
    names = "abcdefghijkl"
    first = start(several(names))
    draining = of(
        *(
            backend(n, address=ADDRESS + i, intent=Intent.DRAINING if i >= 3 else Intent.ACTIVE)
            for i, n in enumerate(names)
        )
    )
    scaled = after(first, draining, 1.0)
    assert served(scaled) == set("abc")
    gone = after(scaled, several("abc"), 1.1)
    assert not gone.held
    assert gone.desired == desired_of(several("abc"))


def test_a_single_death_is_followed_at_once() -> None:
    assert served(after(start(several("ab")), several("a"), 1.0)) == {"a"}


def test_the_last_backend_of_a_service_stays_until_another_comes() -> None:
    died = after(start(several("a")), several(""), 1.0)
    assert served(died) == {"a"}
    assert served(after(died, several(""), 100.0)) == {"a"}
    replaced = after(died, of(backend("b", address=ADDRESS + 9)), 101.0)
    assert served(replaced) == {"b"}


def test_the_last_backend_goes_when_drained_first_or_dead_by_our_probes() -> None:
    first = start(several("a"))
    drained = after(first, several("a", intent=Intent.DRAINING), 1.0)
    assert not after(drained, several(""), 2.0).held
    assert not after(first, several(""), 2.0, HealthView({"a": Health.DOWN})).held


def test_an_address_that_belongs_to_somebody_else_is_never_held() -> None:
    both = (service("web"), service("other", 9090))
    first = start(Inventory(both, (backend("a"),)))
    taken = after(first, Inventory(both, (backend("x", service="other"),)), 1.0)
    assert served(taken) == {"x"}


def test_one_removed_service_is_followed_at_once_and_many_are_not() -> None:
    pair = (service("web"), service("other", 9090))
    both = Inventory(pair, (backend("a"), backend("b", service="other", address=ADDRESS + 1)))
    first = start(both)
    assert not after(first, replace(both, services=pair[:1], backends=both.backends[:1]), 1.0).held
    nothing = after(first, Inventory(), 1.0)
    assert nothing.desired == first.desired
    assert not after(nothing, Inventory(), 6.0).desired.frontends


def test_another_service_may_take_a_held_port() -> None:
    pair = (service("web"), service("other", 9090))
    first = start(Inventory(pair, (backend("a"), backend("b", service="other", address=ADDRESS + 1))))
    new = replace(service("new", 9090))
    taken = after(first, Inventory((new,), (backend("n", service="new", address=ADDRESS + 5),)), 1.0)
    assert {f.port: s.service for f, s in taken.desired.frontends.items()} == {8080: "web", 9090: "new"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(inventories(), health_views(), st.floats(0.0, 10.0)), min_size=1, max_size=6))
def test_guard_only_ever_adds_and_always_gives_in(history: list[tuple[Inventory, HealthView, float]]) -> None:
    guarded, now = Guarded(DesiredState()), 0.0
    for inventory, health, pause in history:
        now += pause
        desired = desired_of(inventory, health)
        guarded = after(guarded, inventory, now, health)
        for frontend, state in desired.frontends.items():
            got = guarded.desired.frontends[frontend]
            assert got.service == state.service
            assert set(state.targets) <= set(got.targets)
            assert len({t.backend for t in got.targets}) == len(got.targets)
        if not guarded.held:
            assert guarded.desired == desired
        again = after(guarded, inventory, now, health)
        assert (again.desired, again.held) == (guarded.desired, guarded.held)
    inventory, health, _ = history[-1]
    later = after(guarded, inventory, now + CONFIG.guard_hold, health)
    assert all(until == FOREVER for until in later.held.values())
    extra = {s for s, b in later.held}
    assert all(any(sv.id == s for sv in inventory.services) for s in extra)
