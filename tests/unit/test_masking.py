# SPDX-License-Identifier: Apache-2.0
"""What this node leaves out of the agreed tables, and which path it takes to the rest."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model import (
    ANY_ADDRESS,
    DesiredState,
    EngineKind,
    Frontend,
    FrontendState,
    Node,
    Path,
    PathState,
    PathView,
    Protocol,
    ServiceOptions,
    Target,
)
from mesh.reconcile.masking import MaskCache, mask, path_to

UP, DOWN, UNPROVEN = PathState.UP, PathState.DOWN, PathState.UNPROVEN
NODES = {f"n{i}": Node(f"n{i}", f"node{i}", ipaddress.ip_address(f"10.77.0.1{i}")) for i in range(1, 5)}


def remote(name: str, node: str, weight: int = 1, engine: EngineKind = EngineKind.KERNEL) -> Target:
    address = NODES[node].address
    assert address is not None
    return Target(name, address, 80, weight, local=False, node=node, via=address, engine=engine)


def local(name: str, weight: int = 1) -> Target:
    return Target(name, ipaddress.ip_address("172.18.0.3"), 80, weight, node="n1")


def state(*targets: Target, protocol: Protocol = Protocol.TCP) -> FrontendState:
    frontend = Frontend(ANY_ADDRESS, 8080, protocol)
    return FrontendState(frontend, "s", "web", ServiceOptions(), targets)


def masked(view: PathView, given: FrontendState, engine: str = "kernel") -> FrontendState:
    return mask(DesiredState(1, {given.frontend: given}), view, NODES, engine).frontends[given.frontend]


def view(**states: PathState) -> PathView:
    """`n2_tunnel=UP`."""
    names = ((name.partition("_")[0], Path(name.partition("_")[2].replace("_", "-"))) for name in states)
    return PathView(dict(zip(names, states.values(), strict=True)))


@pytest.mark.parametrize(
    ("known", "own", "other", "protocol", "expected"),
    [
        (view(n2_tunnel=UP), "kernel", "kernel", Protocol.TCP, (Path.TUNNEL, "")),
        (view(n2_tunnel=UP, n2_peer=UP), "kernel", "", Protocol.TCP, (Path.TUNNEL, "")),
        (view(n2_tunnel=DOWN, n2_peer=UP), "kernel", "kernel", Protocol.TCP, (Path.PEER, "")),
        (view(n2_tunnel=UNPROVEN, n2_peer=UP), "kernel", "kernel", Protocol.TCP, (Path.PEER, "")),
        (view(n2_tunnel=DOWN, n2_peer=UP), "kernel", "kernel", Protocol.UDP, (Path.TUNNEL, "no proven path")),
        (view(n2_tunnel=DOWN, n2_peer_udp=UP), "kernel", "kernel", Protocol.UDP, (Path.PEER, "")),
        (view(n2_tunnel=UP, n2_peer=DOWN), "kernel", "proxy", Protocol.TCP, (Path.PEER, "no path")),
        (view(n2_tunnel=UP, n2_peer=DOWN), "proxy", "kernel", Protocol.TCP, (Path.PEER, "no path")),
        (view(n2_peer=UP), "proxy", "kernel", Protocol.TCP, (Path.PEER, "")),
        (view(), "proxy", "proxy", Protocol.TCP, (Path.PEER, "no proven path")),
        (view(n2_tunnel=DOWN, n2_peer=DOWN), "kernel", "kernel", Protocol.TCP, (Path.TUNNEL, "no path")),
    ],
)
def test_a_path_must_be_proven(
    known: PathView, own: str, other: str, protocol: Protocol, expected: tuple[Path, str]
) -> None:
    assert path_to(remote("b", "n2", engine=EngineKind.told(other)), protocol, known, own) == expected


def test_tasks_of_this_node_need_no_path() -> None:
    assert path_to(local("a"), Protocol.TCP, PathView(), "kernel") == (Path.LOCAL, "")


def test_a_masked_task_weighs_nothing_here_and_says_why_and_what_was_agreed() -> None:
    found = masked(view(n2_tunnel=UP), state(local("a"), remote("b", "n2", 3), remote("c", "n3", 5)))
    assert [(t.weight, t.masked, t.agreed, t.path) for t in found.targets] == [
        (1, "", 0, Path.LOCAL),
        (3, "", 0, Path.TUNNEL),
        (0, "no proven path to node3", 5, Path.TUNNEL),
    ]
    assert not found.passing


@pytest.mark.parametrize(("protocol", "path"), [(Protocol.TCP, "n2_peer"), (Protocol.UDP, "n2_peer_udp")])
def test_own_callers_need_the_peer_port_even_where_the_tunnel_is_up(protocol: Protocol, path: str) -> None:
    asked = state(local("a"), remote("b", "n2"), protocol=protocol)
    for known, handed in (({path: UP}, True), ({path: DOWN}, False), ({path: UNPROVEN}, False), ({}, False)):
        found = masked(view(n2_tunnel=UP, **known), asked)
        assert [(t.weight, t.handed) for t in found.targets] == [(1, True), (1, handed)]


def test_with_nobody_in_reach_the_port_is_left_to_docker_and_the_service_is_named() -> None:
    asked = state(remote("b", "n2"), local("a", weight=0))
    made = mask(DesiredState(1, {asked.frontend: asked}), view(n2_tunnel=DOWN, n2_peer=DOWN), NODES, "kernel")
    assert made.frontends[asked.frontend].passing
    (problem,) = made.problems
    assert problem.where == "service web" and "Docker's own mesh" in problem.message and "mesh nodes" in problem.remedy


def test_a_service_without_anybody_is_not_left_to_docker() -> None:
    """That is what `no_backend` decides, on all nodes alike."""
    assert not masked(view(), state(remote("b", "n2", weight=0))).passing
    assert not masked(view(), state()).passing


def test_what_is_as_before_is_the_same_object() -> None:
    asked, other = state(local("a"), remote("b", "n2")), state(local("a"))
    other = replace(other, frontend=Frontend(ANY_ADDRESS, 8081, Protocol.TCP))
    desired, cache = DesiredState(1, {s.frontend: s for s in (asked, other)}), MaskCache()
    first = mask(desired, view(n2_tunnel=UP), NODES, "kernel", cache).frontends
    again = mask(desired, view(n2_tunnel=UP, n3_tunnel=DOWN), NODES, "kernel", cache).frontends
    assert all(again[frontend] is first[frontend] for frontend in first)
    changed = mask(desired, view(n2_tunnel=DOWN), NODES, "kernel", cache).frontends
    assert changed[asked.frontend] is not first[asked.frontend] and changed[other.frontend] is first[other.frontend]


@given(
    st.lists(st.tuples(st.sampled_from(["n1", "n2", "n3", "n4"]), st.integers(0, 3)), max_size=8),
    st.dictionaries(
        st.tuples(st.sampled_from(["n2", "n3", "n4"]), st.sampled_from([Path.TUNNEL, Path.PEER, Path.PEER_UDP])),
        st.sampled_from(list(PathState)),
    ),
    st.sampled_from(["kernel", "proxy"]),
    st.sampled_from(list(Protocol)),
)
def test_no_new_flow_goes_where_no_path_is_proven_and_none_is_lost(
    members: list[tuple[str, int]], states: dict[tuple[str, Path], PathState], engine: str, protocol: Protocol
) -> None:
    targets = [
        local(f"b{i}", weight) if node == "n1" else remote(f"b{i}", node, weight)
        for i, (node, weight) in enumerate(members)
    ]
    known, asked = PathView(states), state(*targets, protocol=protocol)
    found = masked(known, asked, engine)
    for before, after in zip(asked.targets, found.targets, strict=True):
        reachable = path_to(before, protocol, known, engine)[1] == ""
        assert after.weight == (before.weight if reachable else 0)
        assert (after.agreed if after.masked else after.weight) == before.weight
        assert bool(after.masked) == (not reachable and before.weight > 0)
    could, can = any(t.weight for t in asked.targets), any(t.weight for t in found.targets)
    assert found.passing == (could and not can)
