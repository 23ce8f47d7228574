# SPDX-License-Identifier: Apache-2.0
"""The data plane that most packet tables meet."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.bpf.plane import UDP, Plane
from tests.bpf.tunnel import KEY
from tests.bpf.wires import apart
from tests.support.frames import NODE4, NODE6, TASK4, TASK6


@pytest.fixture
def plane() -> Plane:
    """Ports 80/tcp and 53/udp -> 8080 and 5353 of one task, over IPv4 (2, 4) or IPv6 (port 86, 56; owners 3, 5)."""
    p = Plane.fresh()
    p.local(NODE4, NODE6)
    p.backend(2, TASK4, 8080)
    p.backend(3, TASK6, 8080)
    p.backend(4, TASK4, 5353, protocol=UDP)
    p.backend(5, TASK6, 5353, protocol=UDP)
    p.frontend(1, 80, [(2, 2)])
    p.frontend(2, 86, [(3, 3)])
    p.frontend(3, 53, [(4, 4)], protocol=UDP)
    p.frontend(4, 56, [(5, 5)], protocol=UDP)
    p.frontend(5, 8080, [(2, 2)])
    return p


@pytest.fixture(params=["plain", "proven"])
def plain_and_proven(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once in a swarm whose nodes prove nothing in the tunnel, once in one where they do and demand it."""
    Plane.proofs = (3, (KEY,)) if request.param == "proven" else (0, ())
    yield
    Plane.proofs = (0, ())


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[None]:
    """A network namespace without routes, so that the way to a client is the interface of the packet."""
    with apart("edge"):
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"], check=True)
        yield
