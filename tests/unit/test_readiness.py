# SPDX-License-Identifier: Apache-2.0
"""New backends get no flows before their own node has found that they answer, within a bound."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from mesh.cluster.readiness import HOLD, ReadinessGate
from mesh.cluster.wire import HealthReport, Report
from mesh.model import (
    Backend,
    Health,
    HealthCheck,
    HealthView,
    Intent,
    Inventory,
    Node,
    ProbeKind,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
)
from tests.support.cluster_provider import Server, make_provider
from tests.support.polling import until

UP, DOWN = HealthReport("up"), HealthReport("down", "refused")
PENDING = HealthReport("awaited")  # the word on the wire
TCP, UDP = PublishedPort(80, 8080, Protocol.TCP), PublishedPort(53, 53, Protocol.UDP)
SERVICES = (
    Service("web", "web", (TCP,)),
    Service("off", "off", (TCP,), ServiceOptions(health=HealthCheck(ProbeKind.OFF))),
    Service("dns", "dns", (UDP,)),
)
NODES = tuple(Node(n, n, ipaddress.ip_address(f"10.0.0.{i}")) for i, n in enumerate(("n1", "n2", "deaf"), 1))


def backend(name: str, node: str = "n2", service: str = "web", **changes: object) -> Backend:
    return replace(Backend(name, service, node, None, local=False), **changes)  # type: ignore[arg-type]


def inventory(*backends: Backend) -> Inventory:
    return Inventory(SERVICES, backends, NODES, source="swarm")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def newcomers() -> tuple[ReadinessGate, Clock]:
    clock = Clock()
    return ReadinessGate(lambda node: node != "deaf", clock=clock), clock


def test_only_what_is_new_and_will_be_told_of_is_awaited() -> None:
    new, _ = newcomers()
    old = backend("old")
    new.take(inventory(old), hold=True)
    assert (new.apply({}), new.due) == ({}, None)  # the first inventory: all of it may have served for long
    new.take(
        inventory(
            old,
            backend("a"),
            backend("b", "deaf"),
            backend("c", service="off"),
            backend("d", service="dns"),
            backend("e", ready=False),
            backend("f", intent=Intent.DRAINING),
            backend("g", "deaf", local=True),
        ),
        hold=True,
    )
    assert new.apply({"old": DOWN}) == {"old": DOWN, "a": PENDING, "g": PENDING}
    assert new.due == HOLD


def test_a_good_probe_ends_it_and_a_bad_one_does_not() -> None:
    new, _ = newcomers()
    new.take(inventory(), hold=True)
    new.take(inventory(backend("a"), backend("b")), hold=True)
    assert new.apply({"a": UP, "b": DOWN}) == {"a": UP, "b": HealthReport("awaited", "refused")}
    assert new.apply({"a": DOWN, "b": UP}) == {"a": DOWN, "b": UP}  # once and for all
    assert new.due is None


def test_time_ends_it() -> None:
    new, clock = newcomers()
    new.take(inventory(), hold=True)
    new.take(inventory(backend("a")), hold=True)
    clock.now = HOLD / 2
    new.take(inventory(backend("a"), backend("b")), hold=True)
    assert (new.due, new.apply({})) == (HOLD / 2, {"a": PENDING, "b": PENDING})
    clock.now = HOLD
    assert (new.due, new.apply({"a": DOWN})) == (0, {"a": DOWN, "b": PENDING})
    assert new.due == HOLD / 2
    new.take(inventory(backend("a")), hold=True)
    assert (new.due, new.apply({})) == (None, {})


def test_who_was_ready_once_is_not_new_again() -> None:
    """A container that was paused; one that begins is new when it is ready for the first time."""
    new, _ = newcomers()
    a, b = backend("a"), backend("b", ready=False)
    new.take(inventory(a, b), hold=True)
    new.take(inventory(replace(a, ready=False), b), hold=True)
    new.take(inventory(a, replace(b, ready=True)), hold=True)
    assert new.apply({}) == {"b": PENDING}


def test_a_node_that_is_told_holds_nobody_back_and_knows_whom_it_was_told_of() -> None:
    """A worker that is promoted, a manager that is demoted."""
    new, _ = newcomers()
    new.take(inventory(backend("a")), hold=False)
    new.take(inventory(backend("a"), backend("b")), hold=False)
    assert (new.apply({}), new.due) == ({}, None)
    new.take(inventory(backend("a"), backend("b"), backend("c")), hold=True)
    assert new.apply({}) == {"c": PENDING}
    new.take(inventory(backend("a"), backend("b"), backend("c"), backend("d")), hold=False)
    assert (new.apply({}), new.due) == ({}, None)


async def test_a_manager_tells_the_others_who_is_pending() -> None:
    seen: list[HealthView] = []
    published: list[Inventory] = []
    provider = make_provider(on_health=seen.append)
    provider._roles.server, provider._roles.reads = (server := Server("n2")), True
    provider._publish = published.append
    provider._take(inventory(backend("old")))
    assert server.told[-1] == {}
    provider._take(inventory(backend("a"), backend("b"), backend("old")))
    assert server.told[-1] == {"a": PENDING, "b": PENDING}  # with the very inventory that names them first
    assert [seen[-1].of(b) for b in ("a", "b", "old")] == [Health.PENDING, Health.PENDING, Health.UNKNOWN]
    assert len(published) == 2
    provider._verdicts.reports.take("n2", Report({"a": UP}))
    await until(lambda: server.told[-1] == {"a": UP, "b": PENDING})
    await until(lambda: server.told[-1] == {"a": UP})  # b's node never told
    assert seen[-1].verdicts == {"a": Health.UP}


def test_a_node_takes_its_own_good_probe_for_it_at_once() -> None:
    """A worker; a bad one changes nothing while the managers wait."""
    seen: list[HealthView] = []
    provider = make_provider(on_health=seen.append)
    provider._on_verdicts(HealthView({"a": Health.PENDING, "b": Health.PENDING}))
    provider.own_health(HealthView({"a": Health.UP, "b": Health.DOWN}, {"b": "refused"}))
    assert seen[-1] == HealthView({"a": Health.UP, "b": Health.PENDING}, {"b": "refused"})
    provider._on_verdicts(HealthView({"a": Health.UP}))
    assert seen[-1] == HealthView({"a": Health.UP, "b": Health.DOWN}, {"b": "refused"})
