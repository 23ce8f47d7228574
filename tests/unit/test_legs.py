# SPDX-License-Identifier: Apache-2.0
"""Tasks that Docker has given no place on docker_gwbridge: where their node reaches them, or that it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from mesh.config.keys import Config
from mesh.errors import ProviderError
from mesh.model import EngineKind, Health, HealthView, PathView
from mesh.providers.swarm import schema
from mesh.providers.swarm.decode import NO_GATEWAY, decode
from mesh.providers.swarm.events import Overlay
from mesh.providers.swarm.legs import Kind, Leg, Legs, leg_of
from mesh.reconcile.compose import compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.guard import guard
from mesh.reconcile.masking import mask
from tests.support.engine_answers import answers, task
from tests.support.parts import backend, of

KINDS = {
    "ingress": Kind("overlay"),
    "bridge": Kind("bridge"),
    "own": Kind("bridge"),
    "inner": Kind("bridge", internal=True),
    "lan": Kind("macvlan"),
}


def at(network: str, address: str = "", gateway: str = "", **more: Any) -> dict[str, Any]:
    return {"NetworkID": network, "EndpointID": f"e-{network}", "IPAddress": address, "Gateway": gateway, **more}


INGRESS = at("ingress", "10.0.0.7")
OWN = at("own", "172.30.0.2", "172.30.0.1")
BRIDGE = at("bridge", "172.17.0.2", "172.17.0.1")
LAN = at("lan", "192.0.2.77", "192.0.2.1")


def leg(*attached: dict[str, Any]) -> Leg | None:
    parsed = {each["NetworkID"]: schema.parse(json.dumps(each).encode(), schema.Attachment, "") for each in attached}
    return leg_of(parsed, KINDS)


def reached(*attached: dict[str, Any]) -> str:
    """Where; "no" if nowhere."""
    found = leg(*attached)
    assert found is not None
    return str(found.address or "no")


def test_a_task_without_a_network_that_leads_out_has_its_place_on_the_gateway() -> None:
    assert leg(INGRESS) is None
    assert leg(INGRESS, at("inner", "172.31.0.2", "172.31.0.1")) is None


def test_a_task_is_reached_by_the_network_that_it_leaves_by() -> None:
    """Its answers to clients take that way, whatever else it has."""
    assert reached(INGRESS, OWN) == "172.30.0.2"
    assert reached(INGRESS, OWN, BRIDGE) == "172.17.0.2"  # the first by name
    assert reached(INGRESS, {**OWN, "GwPriority": 1}, BRIDGE) == "172.30.0.2"
    assert reached(INGRESS, {**OWN, "IPv6Gateway": "fd00::1"}, BRIDGE) == "172.30.0.2"
    six = at("own", GlobalIPv6Address="fd00::2", IPv6Gateway="fd00::1")
    assert reached(INGRESS, six) == "fd00::2"
    assert reached(INGRESS, six, BRIDGE) == "172.17.0.2"


def test_a_task_that_leaves_by_macvlan_is_not_reached() -> None:
    assert reached(INGRESS, LAN) == "no"
    assert reached(INGRESS, LAN, OWN) == "no"  # its answers would leave by `lan`
    assert reached(INGRESS, LAN, BRIDGE) == "172.17.0.2"
    found = leg(INGRESS, LAN)
    assert found is not None
    assert "network lan (macvlan)" in found.why


class Docker:
    """Answers for containers by id, and counts."""

    def __init__(self, **containers: Any) -> None:
        self.containers: dict[str, Any] = containers
        self.asked: list[str] = []

    async def get(self, path: str) -> bytes:
        self.asked.append(path)
        if path == "/networks":
            return json.dumps(
                [{"Id": n, "Driver": k.driver, "Internal": k.internal} for n, k in KINDS.items()]
            ).encode()
        name = path.split("/")[2]
        if name not in self.containers:
            raise ProviderError("no such container")
        return json.dumps({"NetworkSettings": {"Networks": self.containers[name]}}).encode()


def listed(**containers: Mapping[str, Any]) -> bytes:
    return json.dumps([{"Id": c, "NetworkSettings": {"Networks": n}} for c, n in containers.items()]).encode()


async def test_a_container_is_asked_for_once_until_its_networks_change() -> None:
    docker, legs = Docker(c={"ingress": INGRESS, "own": OWN}), Legs()
    for _ in range(3):  # the list shows what was connected only later
        assert await legs.find(listed(c={"ingress": INGRESS}), NO_GATEWAY, docker.get) == {"c": leg(INGRESS, OWN)}
    assert docker.asked == ["/containers/c/json", "/networks"]
    docker.containers["c"] = {"ingress": INGRESS, "lan": LAN}
    both = listed(c={"ingress": INGRESS, "lan": LAN})
    assert await legs.find(both, NO_GATEWAY, docker.get) == {"c": leg(INGRESS, LAN)}
    assert docker.asked[2:] == ["/containers/c/json"]


async def test_who_is_on_the_gateway_or_publishes_nothing_is_not_asked_for() -> None:
    docker = Docker()
    gateway = b'{"Name": "docker_gwbridge", "Containers": {"c": {"IPv4Address": "172.18.0.3/16"}}}'
    plain = listed(c={"ingress": INGRESS}, d={"bridge": BRIDGE}, e={"host": at("host")})
    assert await Legs().find(plain, gateway, docker.get) == {}
    assert docker.asked == []


async def test_a_container_that_cannot_be_asked_keeps_what_was_known_of_it() -> None:
    docker, legs = Docker(c={"ingress": INGRESS, "own": OWN}), Legs()
    await legs.find(listed(c={"ingress": INGRESS}), NO_GATEWAY, docker.get)
    del docker.containers["c"]
    changed = listed(c={"ingress": INGRESS, "own": OWN}, d={"ingress": INGRESS})
    assert await legs.find(changed, NO_GATEWAY, docker.get) == {"c": leg(INGRESS, OWN)}
    docker.containers["c"] = {"ingress": INGRESS, "lan": LAN}
    assert await legs.find(changed, NO_GATEWAY, docker.get) == {"c": leg(INGRESS, LAN)}


def test_a_task_elsewhere_than_on_the_gateway_is_a_backend_there() -> None:
    given = answers(tasks=[task("t1"), task("t2")], running=["c-t1", "c-t2"])
    gateway = json.dumps({"Name": "docker_gwbridge", "Containers": {}}).encode()
    object.__setattr__(given, "gateway", gateway)
    object.__setattr__(given, "legs", {"c-t1": leg(INGRESS, OWN), "c-t2": leg(INGRESS, LAN)})
    one, two = decode(given).inventory.backends
    assert (str(one.address), one.unreached) == ("172.30.0.2", "")
    assert (two.address, "macvlan" in two.unreached) == (None, True)


@pytest.mark.parametrize(("kind", "rings"), [("bridge", True), ("macvlan", True), ("overlay", False)])
def test_a_change_of_a_containers_networks_is_read(kind: str, rings: bool) -> None:
    told = {"container": "c", "name": "x", "type": kind}
    for action in ("connect", "disconnect"):
        assert Overlay().hear(schema.Event("network", action, schema.Actor("n", told)), 1) == (False, rings)
    assert Overlay().hear(schema.Event("network", "create", schema.Actor("n", {"type": kind})), 1) == (False, False)


UNREACHED = HealthView({"a": Health.UNREACHED})


def test_where_no_node_reaches_a_task_its_ports_are_left_to_docker() -> None:
    """On its own node, which knows of no address, as on all others; and nothing holds on to it as the last."""
    on_own = of(backend("a", address=None, unreached="macvlan"))
    away = of(backend("a"))
    before = compose(away, HealthView(), Drained(), Config())
    for inventory, view in ((on_own, HealthView()), (on_own, UNREACHED), (away, UNREACHED)):
        desired = compose(inventory, view, Drained(), Config())
        kept = guard(before, desired, {}, health=view, now=0.0, config=Config()).desired
        masked = mask(kept, PathView(), {}, EngineKind.KERNEL)
        (state,) = masked.frontends.values()
        assert state.passing
        assert not any(target.weight for target in state.targets)
        (problem,) = masked.problems
        assert "left to Docker's own mesh" in str(problem)
        assert "macvlan" in str(problem)


def test_others_serve_instead_of_a_task_that_is_not_reached() -> None:
    desired = compose(of(backend("a"), backend("b")), UNREACHED, Drained(), Config())
    (state,) = desired.frontends.values()
    assert {target.backend: target.weight for target in state.targets} == {"a": 0, "b": 1}
    assert not state.passing
    assert "get no connections" in str(desired.problems[0])
    ill = HealthView({"a": Health.UNREACHED, "b": Health.DOWN})
    (state,) = compose(of(backend("a"), backend("b")), ill, Drained(), Config()).frontends.values()
    assert {target.backend: target.weight for target in state.targets} == {"a": 0, "b": 1}  # panic spares it
    (state,) = compose(of(backend("a"), backend("b")), UNREACHED, Drained(frozenset("a")), Config()).frontends.values()
    assert not state.passing
