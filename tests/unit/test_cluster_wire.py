# SPDX-License-Identifier: Apache-2.0
"""Messages of the relay: nothing is lost on the way, deltas lead where they should, garbage is refused by name."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import _abi, model
from mesh.cluster import wire
from mesh.cluster.credentials import strip_headers
from mesh.cluster.translate import Incoming, Outgoing

names = st.text("abcdef0123456789", min_size=1, max_size=6)
networks = st.builds(
    lambda a, n: ipaddress.ip_network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
options = st.builds(
    model.ServiceOptions,
    enable=st.booleans(),
    health=st.builds(
        model.HealthCheck,
        kind=st.sampled_from(model.ProbeKind),
        path=st.sampled_from(["/", "/ready"]),
        interval=st.sampled_from([0.5, 2.0]),
        fall=st.integers(1, 100),
    ),
    affinity=st.sampled_from(model.Affinity),
    proxy_protocol=st.sampled_from(model.ProxyProtocol),
    table_size=st.sampled_from(_abi.TABLE_SIZES),
    locality=st.sampled_from(model.Locality),
    allow=st.lists(networks, max_size=2).map(tuple),
    deny=st.lists(networks, max_size=2).map(tuple),
)
ports = st.builds(
    model.PublishedPort, st.integers(1, 65535), st.integers(1, 65535), st.sampled_from(list(model.Protocol))
)


replicas = st.none() | st.integers(0, 1000)


@st.composite
def inventories(draw: st.DrawFn) -> model.Inventory:
    services = draw(
        st.dictionaries(names, st.tuples(names, st.lists(ports, max_size=2).map(tuple), options, replicas), max_size=4)
    )
    nodes = draw(st.dictionaries(names, st.tuples(st.booleans(), st.integers(0, 9)), max_size=4))
    backends = draw(st.dictionaries(names, st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), max_size=6))
    return model.Inventory(
        tuple(model.Service(key, *value) for key, value in sorted(services.items())),
        tuple(
            model.Backend(
                key,
                "s",
                "n",
                None,
                key,
                weight,
                model.Intent.DRAINING if draining else model.Intent.ACTIVE,
                ready,
                local=False,
            )
            for key, (draining, ready, weight) in sorted(backends.items())
        ),
        tuple(
            model.Node(key, key, ipaddress.ip_address("192.0.2.1"), up, weight)
            for key, (up, weight) in sorted(nodes.items())
        ),
        source="relay",
    )


def passed(message: wire.Message) -> wire.Message:
    return wire.decode(wire.encode(message))


@given(inventories())
def test_inventory_survives_the_wire(inventory: model.Inventory) -> None:
    snapshot = passed(wire.Snapshot(1, Outgoing().content(inventory, {})))
    assert isinstance(snapshot, wire.Snapshot)
    assert Incoming().inventory(snapshot.content) == inventory


@given(inventories(), inventories(), st.dictionaries(names, st.sampled_from(["up", "down"])))
def test_a_delta_leads_from_one_snapshot_to_the_next(a: model.Inventory, b: model.Inventory, v: dict[str, str]) -> None:
    outgoing = Outgoing()
    old = wire.Snapshot(4, outgoing.content(a, {}))
    new = wire.Snapshot(5, outgoing.content(b, {key: wire.HealthReport(value) for key, value in v.items()}))
    delta = passed(wire.diff(old, new))
    assert isinstance(delta, wire.Delta)
    assert wire.patch(old, delta) == new
    with pytest.raises(wire.WireError, match="from generation 4, this node has 5"):
        wire.patch(new, delta)


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    try:
        wire.decode(data)
    except wire.WireError as error:
        assert "not a message of the relay" in str(error)


def test_unknown_fields_are_ignored_and_unknown_values_named() -> None:
    newer = msgspec.msgpack.encode(
        {"type": "hello", "version": 2, "oldest": 1, "mesh": "9", "engine": "", "extra": [1]}
    )
    hello = wire.decode(newer)
    assert isinstance(hello, wire.Hello)
    wire.check_version(hello)
    with pytest.raises(wire.WireError, match="upgrade this node"):
        wire.check_version(wire.Hello(9, 8, "9"))
    odd = wire.Content(services={"s": wire.WireService("s", "s", (), {"affinity": "sticky"})})
    with pytest.raises(wire.WireError, match="sticky"):
        Incoming().inventory(odd)


def test_headers_of_a_swarm_key_are_stripped() -> None:
    pem = b"-----BEGIN PRIVATE KEY-----\nkek-version: 0\nraft-dek: abc=\n\nMC4CAQ\n-----END PRIVATE KEY-----\n"
    plain = b"-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----\n"
    assert strip_headers(pem) == plain
    assert strip_headers(plain) == plain


@given(inventories(), inventories())
def test_what_stays_is_the_same_object(a: model.Inventory, b: model.Inventory) -> None:
    """At both ends, so that the steps behind see by identity that nothing has changed."""
    outgoing, incoming = Outgoing(), Incoming()
    both = [outgoing.content(inventory, {}) for inventory in (a, b)]
    for kind in ("services", "backends", "nodes"):
        olds, news = (getattr(content, kind) for content in both)
        given = {thing.id: thing for thing in getattr(a, kind)}
        for thing in getattr(b, kind):
            assert (news[thing.id] is olds.get(thing.id)) == (given.get(thing.id) is thing)
    assert [incoming.inventory(content) for content in both] == [a, b]
    first = incoming.inventory(both[1])
    assert all(x is y for x, y in zip(incoming.inventory(both[1]).backends, first.backends, strict=True))


def test_pending_is_called_awaited_on_the_wire() -> None:
    """Builds before the name PENDING know this word only: to them any other would be UNKNOWN, which lets tasks in."""
    assert wire.health_report(model.Health.PENDING, "refused") == wire.HealthReport("awaited", "refused")
    assert wire.health_of(wire.HealthReport("awaited")) is model.Health.PENDING
    assert wire.health_of(wire.HealthReport("of a later build")) is model.Health.UNKNOWN
    for health in model.Health:
        assert wire.health_of(wire.health_report(health)) is health
