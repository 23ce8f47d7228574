# SPDX-License-Identifier: Apache-2.0
"""A SYN with a victim's address and port keeps the victim out; a container answers by another's address (item 23)."""

from __future__ import annotations

import pytest

from mesh._abi import REVNAT
from tests.bpf.plane import REDIRECT, SHOT, Plane
from tests.oracle import selection
from tests.support.frames import CLIENT4, NODE4, TASK4, become, datagram, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

VETH = 99


@pytest.fixture
def plane() -> Plane:
    """Ports 80 and 81 lead to one port of one task, which sees a client's own port once only."""
    p = Plane.fresh()
    p.local(NODE4)
    p.backend(2, TASK4, 8080)
    p.frontend(1, 80, [(2, 2)])
    p.frontend(2, 81, [(2, 2)])
    return p


def call(p: Plane, port: int, flags: str = "S") -> int:
    return p.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, port, flags))).retval


def age(p: Plane, stamps: int) -> None:
    """Let what waits in mesh_revnat_new have begun so long ago."""
    for key, value in p.maps["mesh_revnat_new"].rows():
        entry = REVNAT.unpack(value)
        p.maps["mesh_revnat_new"].update(key, REVNAT.pack(entry._replace(stamp=entry.stamp - stamps)))


def others() -> list[int]:
    """The ports that the victim's call of port 80 may get instead of its own."""
    return list(selection.source_ports((selection.address(CLIENT4), 40000, selection.address(NODE4), 80, 6)))


@pytest.mark.parametrize("forged", ["S", "A", "PA", "FA"])
def test_a_forged_packet_costs_the_victim_its_port_and_no_more(plane: Plane, forged: str) -> None:
    assert call(plane, 81, forged) == REDIRECT
    assert call(plane, 80) == REDIRECT
    seen = others()[0]
    assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, seen, "SA"))).retval == REDIRECT
    assert call(plane, 80, "A") == REDIRECT
    assert call(plane, 81, forged) == REDIRECT
    assert call(plane, 80, "PA") == REDIRECT
    answer = segment(TASK4, 8080, CLIENT4, seen, "PA")
    assert plane.run("mesh_task", bytes(answer)).data == become(answer, src=NODE4, sport=80, dport=40000)
    assert "COLLISION" not in plane.verdicts()


def test_who_forges_all_ports_delays_the_victim(plane: Plane) -> None:
    """It is not refused: its kernel sends the SYN again after a second, and after three."""

    def forge() -> None:
        for port in (40000, *others()):
            assert plane.run("mesh_ingress", bytes(segment(CLIENT4, port, NODE4, 81))).retval == REDIRECT

    forge()
    assert call(plane, 80) == SHOT
    age(plane, 1)
    forge()  # sent again, which makes it no younger
    age(plane, 1)
    assert call(plane, 80) == REDIRECT
    assert plane.verdicts()["COLLISION"] == 1


@pytest.mark.parametrize("flags", ["SA", "A", "PA", "R", "RA", "FA"])
def test_no_other_container_answers_for_a_task(plane: Plane, flags: str) -> None:
    plane.backend(2, TASK4, 8080, ifindex=VETH)  # the test's packets come in by another one
    call(plane, 80)
    before = plane.maps["mesh_revnat_new"].dump()
    forged = segment(TASK4, 8080, CLIENT4, 40000, flags)
    assert plane.run("mesh_task", bytes(forged)).retval == SHOT
    assert plane.verdicts()["FOREIGN_REPLY"] == 1
    assert plane.maps["mesh_revnat_new"].dump() == before
    assert plane.maps["mesh_revnat"].dump()[0] == b""


def test_a_task_that_has_moved_to_another_interface_answers(plane: Plane) -> None:
    """As after `docker network disconnect` and `connect` with the same address."""
    plane.backend(2, TASK4, 8080, ifindex=VETH)
    for flags in ("S", "A"):
        call(plane, 80, flags)
    plane.backend(2, TASK4, 8080, ifindex=1)
    call(plane, 80, "A")
    assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "A"))).retval == REDIRECT
    assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, "A"))).retval == REDIRECT
    call(plane, 80, "A")


def test_datagrams_alike(plane: Plane) -> None:
    plane.backend(4, TASK4, 5353, protocol=17, ifindex=VETH)
    plane.frontend(3, 53, [(4, 4)], protocol=17)
    assert plane.run("mesh_ingress", bytes(datagram(CLIENT4, 40000, NODE4, 53))).retval == REDIRECT
    assert plane.run("mesh_task", bytes(datagram(TASK4, 5353, CLIENT4, 40000, b"forged"))).retval == SHOT
