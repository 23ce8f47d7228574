# SPDX-License-Identifier: Apache-2.0
"""The Engine's answers -> Inventory: which task receives what, and that any answer gives that or a ProviderError."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ProviderError
from mesh.model import Intent, PublishedPort
from mesh.model import Protocol as Transport
from mesh.providers.swarm import schema
from mesh.providers.swarm.decode import GONE, UNREADY, Answers, Decoder, decode
from mesh.providers.swarm.events import Overlay
from tests.support.engine_answers import answers, event, service, task

BODIES = tuple(part for part in Answers.__slots__ if part != "legs")


def test_a_running_task_is_a_backend() -> None:
    (backend,) = decode(answers(tasks=[task("t1")], running=["c-t1"])).inventory.backends
    assert (backend.id, backend.service, backend.node, backend.container) == ("t1", "s1", "node1", "c-t1")
    assert (str(backend.address), backend.ready, backend.intent, backend.local) == (
        "172.18.0.2",
        True,
        Intent.ACTIVE,
        True,
    )
    assert backend.name == "web.1"


@pytest.mark.parametrize(
    ("state", "desired", "expected"),
    [
        ("running", "running", (Intent.ACTIVE, True)),
        ("running", "shutdown", (Intent.DRAINING, True)),
        ("running", "remove", (Intent.DRAINING, True)),
        ("starting", "running", (Intent.ACTIVE, False)),
        ("starting", "shutdown", None),
        ("preparing", "running", None),
        ("assigned", "ready", None),
        ("ready", "ready", None),
        ("complete", "shutdown", None),
        ("failed", "running", None),
        ("a state of a later Engine", "running", None),
    ],
)
def test_who_receives_what(state: str, desired: str, expected: tuple[Intent, bool] | None) -> None:
    found = decode(answers(tasks=[task("t1", state, desired)], running=["c-t1"])).inventory.backends
    assert [(b.intent, b.ready) for b in found] == ([expected] if expected else [])


def test_a_task_whose_container_has_ended_is_gone() -> None:
    assert not decode(answers(tasks=[task("t1")], running=[])).inventory.backends


@pytest.mark.parametrize(("state", "up"), [("ready", True), ("down", False), ("unknown", True), ("disconnected", True)])
def test_only_a_node_that_swarm_calls_down_is_down(state: str, up: bool) -> None:
    """After a change of leader all nodes are "unknown", while they look for it "disconnected"."""
    read = decode(answers(nodes=[{"ID": "a", "Status": {"State": state, "Addr": "10.0.0.2"}}]))
    assert [node.up for node in read.inventory.nodes] == [up]


def test_an_unhealthy_container_is_not_ready() -> None:
    (backend,) = decode(answers(tasks=[task("t1")], running=["c-t1"], unready=["c-t1"])).inventory.backends
    assert not backend.ready


def test_tasks_of_other_nodes_have_no_address_yet() -> None:
    (backend,) = decode(answers(tasks=[task("t1", node="node2")])).inventory.backends
    assert (backend.address, backend.local, backend.container, backend.ready) == (None, False, "", True)


def test_only_ingress_ports_as_allocated() -> None:
    ports = [
        {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 30000, "PublishMode": "ingress"},
        {"Protocol": "tcp", "TargetPort": 81, "PublishedPort": 81, "PublishMode": "host"},
        {"Protocol": "sctp", "TargetPort": 82, "PublishedPort": 82, "PublishMode": "ingress"},
        {"Protocol": "tcp", "TargetPort": 83, "PublishMode": "ingress"},  # not allocated yet
        {"Protocol": "tcp", "TargetPort": 99999, "PublishedPort": 84, "PublishMode": "ingress"},
    ]
    inventory = decode(answers(services=[service(Endpoint={"Ports": ports})])).inventory
    assert inventory.services[0].ports == (PublishedPort(30000, 53, Transport.UDP),)
    assert [p.where for p in inventory.problems] == ["service web, port 82/sctp", "service web, port 84/tcp"]


@pytest.mark.parametrize(
    ("mode", "replicas"),
    [({"Replicated": {"Replicas": 3}}, 3), ({"Replicated": {"Replicas": 0}}, 0), ({"Global": {}}, None), (None, None)],
)
def test_how_many_tasks_are_asked_for(mode: Any, replicas: int | None) -> None:
    (found,) = decode(answers([service(Spec={"Name": "web", "Labels": {}, "Mode": mode})])).inventory.services
    assert found.replicas == replicas


def test_labels_on_containers_are_said_to_mean_nothing() -> None:
    """`labels:` beside `image:` in a compose file, not under `deploy:`."""
    of_containers = {"mesh.affinity": "client-ip", "mesh.deny": "10.0.0.1", "other": "x"}
    template = {"ContainerSpec": {"Labels": of_containers}}
    spec = {"Name": "web", "Labels": {"mesh.deny": "10.0.0.1"}, "TaskTemplate": template}
    (problem,) = decode(answers(services=[service(Spec=spec)])).inventory.problems
    assert problem.where == "service web, container label mesh.affinity"
    assert "deploy: labels:" in problem.remedy
    for empty in ({}, {"ContainerSpec": None}, {"ContainerSpec": {"Labels": None}}):
        spec = {"Name": "web", "TaskTemplate": empty}
        assert not decode(answers(services=[service(Spec=spec)])).inventory.problems


@pytest.mark.parametrize("endpoint", [None, {}, {"Ports": None}, {"Ports": []}])
def test_services_that_publish_nothing_are_left_out(endpoint: Any) -> None:
    inventory = decode(answers(services=[service(Endpoint=endpoint)], tasks=[task("t1")], running=["c-t1"])).inventory
    assert not inventory.services
    assert not inventory.backends


def test_nodes() -> None:
    nodes = [
        {
            "ID": "b",
            "Spec": {"Labels": {"mesh.weight": "0"}},
            "Description": {"Hostname": "n2"},
            "Status": {"State": "down", "Addr": "10.0.0.2"},
        },
        {"ID": "a", "Status": {"State": "ready", "Addr": "0.0.0.0"}, "ManagerStatus": {"Addr": "[2001:db8::1]:2377"}},
    ]
    a, b = decode(answers(nodes=nodes)).inventory.nodes
    assert (a.name, str(a.address), a.up, a.weight) == ("a", "2001:db8::1", True, 1)
    assert (b.name, str(b.address), b.up, b.weight) == ("n2", "10.0.0.2", False, 0)


@pytest.mark.parametrize(
    ("label", "manager", "status", "expected"),
    [
        ("", "", "10.0.0.2", "10.0.0.2"),
        ("", "10.0.0.1:2377", "127.0.0.1", "10.0.0.1"),  # a leader's status
        ("", "10.0.0.1:2377", "172.16.0.1", "10.0.0.1"),  # what it advertises, not where a NAT lets it seem to be
        ("192.168.7.7", "10.0.0.1:2377", "10.0.0.2", "192.168.7.7"),
        ("2001:db8::7", "", "10.0.0.2", "2001:db8::7"),
        ("", "127.0.0.1:2377", "127.0.0.1", None),
        ("", "0.0.0.0:2377", "", None),
        ("", "", "::1", None),
    ],
)
def test_where_other_nodes_reach_a_node(label: str, manager: str, status: str, expected: str | None) -> None:
    node = {
        "ID": "a",
        "Spec": {"Labels": {"mesh.address": label} if label else {}},
        "Description": {"Hostname": "n1"},
        "Status": {"State": "ready", "Addr": status},
        **({"ManagerStatus": {"Addr": manager}} if manager else {}),
    }
    inventory = decode(answers(nodes=[node])).inventory
    assert inventory.nodes[0].address == (ipaddress.ip_address(expected) if expected else None)
    assert [problem.where for problem in inventory.problems] == ([] if expected else ["node n1"])
    assert all("mesh.address" in problem.remedy for problem in inventory.problems)


@pytest.mark.parametrize("wrong", ["127.0.0.1", "0.0.0.0", "fe80::1", "224.0.0.1", "n1", "10.0.0.1:80", ""])
def test_a_wrong_address_of_a_node_is_named_and_not_used(wrong: str) -> None:
    node = {"ID": "a", "Spec": {"Labels": {"mesh.address": wrong}}, "Status": {"State": "ready", "Addr": "10.0.0.2"}}
    inventory = decode(answers(nodes=[node])).inventory
    assert str(inventory.nodes[0].address) == "10.0.0.2"
    (problem,) = inventory.problems
    assert problem.where == "node a, label mesh.address"


def test_the_order_of_the_answer_does_not_matter() -> None:
    tasks = [task(f"t{n}") for n in range(5)]
    running = [f"c-t{n}" for n in range(5)]
    assert decode(answers(tasks=tasks, running=running)) == decode(answers(tasks=tasks[::-1], running=running))


@pytest.mark.parametrize(
    ("state", "said"), [("active", "docker node promote"), ("inactive", "docker swarm init"), ("locked", "locked")]
)
def test_not_a_manager(state: str, said: str) -> None:
    info = {"Swarm": {"LocalNodeState": state, "ControlAvailable": False}}
    with pytest.raises(ProviderError, match=said):
        decode(answers(info=info))


def test_an_error_names_source_and_path() -> None:
    broken = task("t1")
    broken["Status"]["State"] = 7
    with pytest.raises(ProviderError) as caught:
        decode(answers(tasks=[task("t0"), broken]))
    assert "GET /tasks" in str(caught.value)
    assert "$[1].Status.State" in str(caught.value)


def altered(part: str, body: bytes) -> Answers:
    """Answers of which one is something else."""
    changed: Any = {part: body}
    return replace(answers(), **changed)


@pytest.mark.parametrize("part", BODIES)
@pytest.mark.parametrize("body", [b"", b"null", b"<html>", b"[", b"[{}]", b"{", b"\xff", b"7", b"[" * 100000])
def test_garbage_is_a_provider_error(part: str, body: bytes) -> None:
    with pytest.raises(ProviderError):
        decode(altered(part, body))


def mutations(value: Any, draw: Any) -> Any:
    """A JSON value with some parts replaced by anything."""
    anything = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({})
    if draw(st.integers(0, 12)) == 0:
        return draw(anything)
    if isinstance(value, dict):
        return {k: mutations(v, draw) for k, v in value.items() if draw(st.integers(0, 15))}
    if isinstance(value, list):
        return [mutations(v, draw) for v in value]
    return value


@given(st.data())
def test_any_json_gives_an_inventory_or_a_provider_error(data: st.DataObject) -> None:
    good = answers(
        tasks=[task("t1"), task("t2", node="node2")],
        nodes=[{"ID": "a", "Spec": {"Labels": {}}, "Status": {"State": "ready", "Addr": "10.0.0.1"}}],
        running=["c-t1"],
    )
    parts = {k: mutations(json.loads(getattr(good, k)), data.draw) for k in BODIES}
    with contextlib.suppress(ProviderError):
        encoded: dict[str, Any] = {k: json.dumps(v).encode() for k, v in parts.items()}
        read = decode(Answers(**encoded))
        assert [b.id for b in read.inventory.backends] == sorted(b.id for b in read.inventory.backends)


@given(st.binary())
def test_any_bytes_give_an_inventory_or_a_provider_error(body: bytes) -> None:
    for part in BODIES:
        with contextlib.suppress(ProviderError):
            decode(altered(part, body))


def test_a_death_counts_at_once_and_until_the_list_shows_it() -> None:
    read = decode(answers(tasks=[task("t1"), task("t2")], running=["c-t1", "c-t2"]))
    overlay = Overlay()
    assert overlay.hear(event("die"), 1) == (True, True)
    assert [b.id for b in overlay.apply(read).backends] == ["t2"]
    overlay.settle(2, read.local.running)  # a read that began later, but whose list still has the container
    assert [b.id for b in overlay.apply(read).backends] == ["t2"]
    later = decode(answers(tasks=[task("t1"), task("t2")], running=["c-t2"]))
    overlay.settle(3, later.local.running)
    assert not overlay.dead


def test_what_only_this_node_knows_of_its_tasks() -> None:
    """Swarm calls all of them running: those that its own Engine says have ended or are not ready, by read or event."""
    names = ["ended", "ill", "dies", "sickens", "well"]
    tasks = [*(task(name) for name in names), task("away", node="node2"), task("begins", "starting")]
    running = [f"c-{name}" for name in [*names[1:], "begins"]]
    read = decode(answers(tasks=tasks, running=running, unready=["c-ill", "c-begins"]))
    overlay = Overlay()
    assert overlay.unseen(read) == {"ended": GONE, "ill": UNREADY}
    overlay.hear(event("die", "c-dies"), 1)
    overlay.hear(event("health_status: unhealthy", "c-sickens"), 1)
    assert overlay.unseen(read) == {"ended": GONE, "ill": UNREADY, "dies": GONE, "sickens": UNREADY}


def test_a_started_container_lives_again() -> None:
    read = decode(answers(tasks=[task("t1")], running=["c-t1"]))
    overlay = Overlay()
    overlay.hear(event("die"), 1)
    assert overlay.hear(event("start"), 1) == (True, True)
    assert overlay.apply(read) is read.inventory


def test_unhealthy_counts_at_once_and_until_a_later_read() -> None:
    read = decode(answers(tasks=[task("t1")], running=["c-t1"]))
    overlay = Overlay()
    overlay.hear(event("health_status: unhealthy"), 4)
    overlay.settle(4, read.local.running)  # began before
    assert not overlay.apply(read).backends[0].ready
    overlay.settle(5, read.local.running)
    assert overlay.apply(read).backends[0].ready


def test_a_container_that_is_told_to_stop_gets_no_new_flows() -> None:
    """Until its death is told; one that goes on is used again some reads later, one that is started at once."""
    read = decode(answers(tasks=[task("t1")], running=["c-t1"]))
    overlay = Overlay()
    assert overlay.hear(event("kill", signal="15"), 1) == (True, True)
    for begun in range(2, 6):
        overlay.settle(begun, read.local.running)
        assert not overlay.apply(read).backends[0].ready
        assert overlay.unseen(read) == {"t1": UNREADY}
    overlay.settle(6, read.local.running)
    assert overlay.apply(read) is read.inventory
    overlay.hear(event("kill", signal="15"), 6)
    assert overlay.hear(event("start"), 6) == (True, True)
    assert overlay.apply(read) is read.inventory


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        (event("kill", signal="9"), (True, True)),
        (event("kill", signal="15"), (True, True)),
        (event("kill", signal="1"), (False, True)),
        (event("exec_start: /server --check"), (False, False)),
        (schema.Event("container", "die", schema.Actor("x", {})), (False, False)),
        (schema.Event("service", "update", schema.Actor("s1")), (False, True)),
        (schema.Event(), (False, False)),
    ],
)
def test_what_rings(heard: schema.Event, expected: tuple[bool, bool]) -> None:
    assert Overlay().hear(heard, 1) == expected


def test_what_stays_is_the_same_object_from_read_to_read() -> None:
    """Later steps see by identity that nothing has changed; what has changed is told as a decoder would that is new."""
    decoder, services = Decoder(), [service()]
    both = [task("t1", node="node2"), task("t2", node="node2")]
    first = decoder.decode(answers(services, both))
    again = decoder.decode(answers(services, both))
    assert again == first
    assert again.inventory.backends is first.inventory.backends
    assert again.inventory.services is first.inventory.services
    assert again.inventory.nodes is first.inventory.nodes
    drained = [both[0], task("t2", desired="shutdown", node="node2")]
    read = decoder.decode(answers(services, drained))
    assert read == decode(answers(services, drained))
    assert read.inventory.backends[0] is first.inventory.backends[0]
    assert decoder.decode(answers(services, drained[1:])) == decode(answers(services, drained[1:]))
    assert decoder.decode(answers([], drained)) == decode(answers([], drained))
    assert decoder.decode(answers(services, both)) == first


@pytest.mark.parametrize("node", ["node1", "node2"])
@pytest.mark.parametrize("state", ["starting", "running", "failed", "gone"])
@pytest.mark.parametrize("desired", ["running", "shutdown"])
def test_a_read_of_some_tasks_is_as_good_as_one_of_all(node: str, state: str, desired: str) -> None:
    before = [task("t1", node=node), task("t2", node="node2"), task("t3", node="node1")]
    after = [] if state == "gone" else [task("t1", state, desired, node)]
    new = task("t4", node="node2")
    decoder = Decoder()
    decoder.decode(answers(tasks=before, running=["c-t1", "c-t3"]))
    running = {"running": ["c-t1"], "unready": ["c-t1"]}  # c-t3 has died meanwhile, and nobody announced its task
    read = decoder.update(answers(tasks=[*after, new], **running), ["t1", "t4"])
    assert read == decode(answers(tasks=[*after, *before[1:], new], **running))
    assert decoder.update(answers(**running), ["t4", "never heard of"]) == decode(
        answers(tasks=[*after, *before[1:]], **running)
    )


def test_a_read_of_some_tasks_by_what_is_no_manager_any_more() -> None:
    decoder = Decoder()
    decoder.decode(answers(tasks=[task("t1")]))
    with pytest.raises(ProviderError, match="manager"):
        decoder.update(answers(info={"Swarm": {"LocalNodeState": "active"}}), ["t1"])
