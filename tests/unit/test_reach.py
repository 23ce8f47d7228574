# SPDX-License-Identifier: Apache-2.0
"""An engine that does not reach other nodes claims no port that it could not serve."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from mesh.model import Backend, Inventory, Protocol, PublishedPort, Service
from mesh.reconcile.reach import own_part


def two_services() -> Inventory:
    """Service `near` with a backend here, service `far` with one on another node."""
    ports = [(PublishedPort(port, 80, Protocol.TCP),) for port in (8000, 8001)]
    here = Backend("a", "near", "n1", ipaddress.ip_address("172.18.0.3"))
    away = Backend("b", "far", "n2", None, local=False)
    services = (Service("far", "far", ports[0]), Service("near", "near", ports[1]))
    return Inventory(services, (here, away), source="swarm")


def test_a_service_of_other_nodes_is_left_out_and_told() -> None:
    part = own_part(two_services())
    assert [s.id for s in part.services] == ["near"]
    assert [b.id for b in part.backends] == ["a"]
    (problem,) = part.problems
    assert "far" in str(problem)
    assert 'engine = "proxy"' in str(problem)


def test_a_service_with_own_backends_keeps_those() -> None:
    whole = two_services()
    mixed = replace(whole, backends=tuple(replace(b, service="near") for b in whole.backends))
    part = own_part(mixed)
    assert [b.id for b in part.backends] == ["a"]
    assert len(part.services) == 2  # the other one has no backend anywhere: refused, as with every engine
    assert not part.problems


def test_nothing_changes_where_all_is_here() -> None:
    whole = two_services()
    inventory = replace(whole, backends=whole.backends[:1])
    assert own_part(inventory) is inventory
