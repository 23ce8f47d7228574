# SPDX-License-Identifier: Apache-2.0
"""compose: who is served, and by whom."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.config.keys import Config
from mesh.model import (
    DesiredState,
    EngineKind,
    Health,
    HealthView,
    Intent,
    Inventory,
    Locality,
    Node,
)
from mesh.reconcile.compose import ComposeCache, compose
from mesh.reconcile.eligibility import SERVING, Drained, standing
from tests.support.inventories import health_views, inventories
from tests.support.parts import ADDRESS, backend, of, service

CONFIG = Config()


def weights(desired: DesiredState) -> dict[str, int]:
    (state,) = desired.frontends.values()
    return {target.backend: target.weight for target in state.targets}


def test_a_backend_without_new_flows_stays_with_weight_0() -> None:
    inventory = of(
        backend("a"),
        backend("b", intent=Intent.DRAINING),
        backend("c", ready=False),
        backend("d"),
        backend("e"),
        backend("f", weight=5),
    )
    desired = compose(inventory, HealthView({"d": Health.DOWN}), Drained(frozenset({"e"})), CONFIG)
    assert weights(desired) == {"a": 1, "b": 0, "c": 0, "d": 0, "e": 0, "f": 5}


def test_weights_of_node_and_backend_multiply_within_bounds() -> None:
    inventory = of(backend("a", weight=2), backend("b", weight=65535), node=Node("n", "n", weight=3))
    assert weights(compose(inventory, HealthView(), Drained(), CONFIG)) == {"a": 6, "b": 65535}


def test_a_node_that_is_down_drained_or_weightless_gets_no_new_flows() -> None:
    for node, drained in (
        (Node("n", "n", up=False), Drained()),
        (Node("n", "n", weight=0), Drained()),
        (Node("n", "n"), Drained(nodes=frozenset({"n"}))),
    ):
        inventory = replace(of(backend("a"), backend("b", node="m")), nodes=(Node("m", "m"), node))
        assert weights(compose(inventory, HealthView(), drained, CONFIG)) == {"a": 0, "b": 1}


def test_where_all_nodes_are_down_it_may_be_this_one_that_is_cut_off() -> None:
    nodes = (Node("m", "m", up=False), Node("n", "n", up=False))
    inventory = replace(of(backend("a"), backend("b", node="m", weight=0)), nodes=nodes)
    desired = compose(inventory, HealthView(), Drained(), CONFIG)
    assert weights(desired) == {"a": 1, "b": 0}
    assert ["down or silent" in str(problem) for problem in desired.problems] == [True]
    ill = HealthView({"a": Health.DOWN})
    assert weights(compose(inventory, ill, Drained(), replace(CONFIG, panic_threshold=0.0))) == {"a": 1, "b": 0}


def test_a_backend_of_another_node_is_reached_by_way_of_it() -> None:
    there = ipaddress.IPv4Address("10.0.0.2")
    away = backend("b", node="m", address=None, local=False, weight=3)
    nodes = (Node("m", "m", there, engine=EngineKind.PROXY), Node("n", "n", ipaddress.IPv4Address("10.0.0.1")))
    desired = compose(replace(of(backend("a"), away), nodes=nodes), HealthView(), Drained(), CONFIG)
    (state,) = desired.frontends.values()
    here, target = state.targets
    assert (here.via, here.address, here.engine) == (None, ADDRESS, "")
    assert (target.via, target.address, target.port) == (there, there, 80)
    assert (target.weight, target.local, target.engine) == (3, False, "proxy")
    assert desired.nodes == tuple(sorted(n.address for n in nodes if n.address is not None))  # type: ignore[type-var]


def test_every_node_composes_the_same_weights() -> None:
    """What a table is drawn from must not depend on where it is drawn."""
    nodes = tuple(Node(n, n, ipaddress.IPv4Address(f"10.0.0.{i}")) for i, n in enumerate("mn", 1))
    seen = []
    for here in "mn":
        backends = [
            backend(f"{n}{i}", node=n, local=n == here, address=ADDRESS + i if n == here else None)
            for n in "mn"
            for i in range(3)
        ]
        inventory = replace(of(*backends), nodes=nodes)
        seen.append(weights(compose(inventory, HealthView({"m1": Health.DOWN}), Drained(), CONFIG)))
    assert seen[0] == seen[1]


def test_local_first_prefers_this_node_while_it_has_one() -> None:
    nodes = (Node("m", "m", ipaddress.IPv4Address("10.0.0.2")),)
    away = backend("b", node="m", address=None, local=False)
    inventory = replace(of(backend("a"), away, locality=Locality.LOCAL_FIRST), nodes=nodes)
    assert weights(compose(inventory, HealthView(), Drained(), CONFIG)) == {"a": 1, "b": 0}
    assert weights(compose(inventory, HealthView({"a": Health.DOWN}), Drained(), CONFIG)) == {"a": 0, "b": 1}


def test_a_backend_without_address_is_left_out() -> None:
    assert weights(compose(of(backend("a"), backend("b", address=None)), HealthView(), Drained(), CONFIG)) == {"a": 1}


def test_all_down_means_all_used_and_a_problem() -> None:
    down = HealthView({"a": Health.DOWN, "b": Health.DOWN})
    desired = compose(of(backend("a"), backend("b"), backend("c", intent=Intent.DRAINING)), down, Drained(), CONFIG)
    assert weights(desired) == {"a": 1, "b": 1, "c": 0}
    assert next(iter(desired.frontends.values())).panic
    assert "all are used again" in desired.problems[0].message


def test_the_panic_threshold_is_a_share_of_the_eligible() -> None:
    down = HealthView({"a": Health.DOWN, "b": Health.DOWN})
    inventory = of(*(backend(n) for n in "abcd"))
    assert weights(compose(inventory, down, Drained(), CONFIG)) == {"a": 0, "b": 0, "c": 1, "d": 1}
    panicky = compose(inventory, down, Drained(), replace(CONFIG, panic_threshold=0.5))
    assert weights(panicky) == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_no_panic_where_the_orchestrator_took_everything_away() -> None:
    desired = compose(of(backend("a", intent=Intent.DRAINING)), HealthView({"a": Health.DOWN}), Drained(), CONFIG)
    assert weights(desired) == {"a": 0}
    assert not desired.problems


def test_two_services_on_one_port_the_first_by_id_keeps_it() -> None:
    desired = compose(Inventory((service("b"), service("a"))), HealthView(), Drained(), CONFIG)
    (state,) = desired.frontends.values()
    assert state.service == "a"
    (problem,) = desired.problems
    assert "service b" in problem.where
    assert "published by service a" in problem.message


def test_local_first_uses_remote_backends_only_without_local_ones() -> None:
    backends = (backend("a"), backend("b", local=False))
    inventory = of(*backends, locality=Locality.LOCAL_FIRST)
    assert weights(compose(inventory, HealthView(), Drained(), CONFIG)) == {"a": 1, "b": 0}
    assert weights(compose(inventory, HealthView({"a": Health.DOWN}), Drained(), CONFIG)) == {"a": 0, "b": 1}


def test_a_table_too_small_is_replaced_by_one_that_fits() -> None:
    backends = (backend(f"b{n}", address=ADDRESS + n) for n in range(1100))
    desired = compose(of(*backends, table_size=1021), HealthView(), Drained(), CONFIG)
    (state,) = desired.frontends.values()
    assert state.options.table_size == 4093
    assert "1100 backends do not fit" in desired.problems[0].message


def test_a_disabled_service_is_not_served() -> None:
    assert not compose(of(backend("a"), enable=False), HealthView(), Drained(), CONFIG).frontends


@given(inventories(), health_views(), st.randoms())
def test_the_order_of_things_does_not_matter(inventory: Inventory, health: HealthView, random: object) -> None:
    def shuffled(items: tuple[object, ...]) -> tuple[object, ...]:
        mixed = list(items)
        random.shuffle(mixed)  # type: ignore[attr-defined]
        return tuple(mixed)

    other = replace(
        inventory,
        services=shuffled(inventory.services),  # type: ignore[arg-type]
        backends=shuffled(inventory.backends),  # type: ignore[arg-type]
    )
    one, two = (compose(i, health, Drained(), CONFIG) for i in (inventory, other))
    assert one == two
    assert list(one.frontends) == sorted(one.frontends)


@given(inventories(), health_views())
def test_new_flows_only_where_everybody_agrees(inventory: Inventory, health: HealthView) -> None:
    desired = compose(inventory, health, Drained(), CONFIG)
    backends = {b.id: b for b in inventory.backends}
    nodes = {n.id: n for n in inventory.nodes}
    for state in desired.frontends.values():
        assert [t.backend for t in state.targets] == sorted(t.backend for t in state.targets)
        reasons = {}
        for target in state.targets:
            known = backends[target.backend]
            reasons[known.id] = standing(known, nodes.get(known.node), health.of(known.id), Drained())
        for target in state.targets:
            why = reasons[target.backend]
            if target.weight and why == "node down":
                assert not {SERVING, "down"} & set(reasons.values())
            elif target.weight:
                assert why == SERVING or (why == "down" and state.panic)
            elif state.options.locality is Locality.CLUSTER:
                assert why != SERVING


@given(st.lists(st.tuples(inventories(), health_views(), st.booleans()), min_size=2, max_size=4))
def test_what_is_remembered_changes_nothing(steps: list[tuple[Inventory, HealthView, bool]]) -> None:
    """Any sequence of inputs through one cache, each twice, composes what each does by itself."""
    cache = ComposeCache()
    for inventory, health, drain in steps:
        drained = Drained(frozenset(b.id for b in inventory.backends[:1])) if drain else Drained()
        alone = compose(inventory, health, drained, Config())
        first = compose(inventory, health, drained, Config(), cache)
        again = compose(inventory, health, drained, Config(), cache)
        assert first == again == alone
        assert list(first.frontends) == list(alone.frontends)
        assert all(again.frontends[f] is state for f, state in first.frontends.items())


@given(inventories(), health_views(), st.data())
def test_one_change_is_composed_as_if_it_were_new(
    inventory: Inventory, health: HealthView, data: st.DataObject
) -> None:
    cache = ComposeCache()
    compose(inventory, health, Drained(), Config(), cache)
    for _ in range(3):
        if inventory.backends:
            i = data.draw(st.integers(0, len(inventory.backends) - 1))
            new = replace(inventory.backends[i], ready=data.draw(st.booleans()), weight=data.draw(st.integers(0, 3)))
            inventory = replace(inventory, backends=(*inventory.backends[:i], new, *inventory.backends[i + 1 :]))
            verdict = data.draw(st.sampled_from(Health))
            health = HealthView({**health.verdicts, new.id: verdict})
        assert compose(inventory, health, Drained(), Config(), cache) == compose(inventory, health, Drained(), Config())


def test_a_backend_whose_first_probe_is_awaited_gets_nothing_and_counts_for_nothing() -> None:
    """Not among those that are down either: no panic because of it."""
    health = HealthView({"a": Health.PENDING, "b": Health.UP})
    assert weights(compose(of(backend("a"), backend("b")), health, Drained(), CONFIG)) == {"a": 0, "b": 1}
    alone = compose(of(backend("a")), health, Drained(), CONFIG)
    (state,) = alone.frontends.values()
    assert (weights(alone), state.panic, alone.problems) == ({"a": 0}, False, ())
    down = HealthView({"a": Health.PENDING, "b": Health.DOWN})
    panic = compose(of(backend("a"), backend("b")), down, Drained(), CONFIG)
    assert weights(panic) == {"a": 0, "b": 1}
    assert standing(backend("a"), None, Health.PENDING, Drained()) == "first probe pending"


def test_rules_that_merge_into_few_are_merged() -> None:
    deny = tuple(ipaddress.ip_network(f"10.{n >> 8}.{n & 255}.0/24") for n in range(1 << 15))
    inventory = of(backend("a"), deny=deny)
    (state,) = compose(inventory, HealthView(), Drained(), CONFIG).frontends.values()
    assert state.options.deny == (ipaddress.ip_network("10.0.0.0/9"),)
