# SPDX-License-Identifier: Apache-2.0
"""Random inventories for the properties of compose, guard and plan: few names, so that things collide and recur."""

from __future__ import annotations

import ipaddress

from hypothesis import strategies as st

from mesh.model import (
    Affinity,
    Backend,
    Health,
    HealthView,
    Intent,
    Inventory,
    Locality,
    Node,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
)

SERVICES = ("s0", "s1", "s2", "s3")
NODES = ("n0", "n1")
PER_SERVICE = 6


def address(service: int, backend: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(f"172.18.{service}.{backend + 2}")


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    ports = draw(
        st.lists(
            st.builds(
                PublishedPort,
                published=st.integers(8080, 8085),
                target=st.sampled_from((80, 443)),
                protocol=st.sampled_from(Protocol),
            ),
            min_size=0,
            max_size=3,
        )
    )
    options = ServiceOptions(
        enable=draw(st.sampled_from((True, True, True, False))),
        affinity=draw(st.sampled_from(Affinity)),
        table_size=draw(st.sampled_from((1021, 1021, 4093))),
        locality=draw(st.sampled_from(Locality)),
    )
    return Service(name, f"name-{name}", tuple(ports), options)


@st.composite
def backends(draw: st.DrawFn, service: int, number: int) -> Backend:
    return Backend(
        id=f"{SERVICES[service]}.{number}",
        service=SERVICES[service],
        node=draw(st.sampled_from((*NODES, "unheard-of"))),
        address=draw(st.sampled_from((address(service, number), address(service, number), None))),
        weight=draw(st.sampled_from((0, 1, 1, 1, 7, 65535))),
        intent=draw(st.sampled_from((Intent.ACTIVE, Intent.ACTIVE, Intent.DRAINING))),
        ready=draw(st.sampled_from((True, True, False))),
        local=draw(st.booleans()),
    )


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    chosen = draw(st.sets(st.sampled_from(range(len(SERVICES)))))
    numbers = {s: draw(st.sets(st.sampled_from(range(PER_SERVICE)))) for s in sorted(chosen)}
    return Inventory(
        services=tuple(draw(services(SERVICES[s])) for s in sorted(chosen)),
        backends=tuple(draw(backends(s, n)) for s in sorted(chosen) for n in sorted(numbers[s])),
        nodes=tuple(
            Node(name, name, up=draw(st.sampled_from((True, True, False))), weight=draw(st.sampled_from((0, 1, 1, 3))))
            for name in NODES
        ),
    )


@st.composite
def health_views(draw: st.DrawFn) -> HealthView:
    ids = [f"{s}.{n}" for s in SERVICES for n in range(PER_SERVICE)]
    return HealthView(draw(st.dictionaries(st.sampled_from(ids), st.sampled_from(Health))))
