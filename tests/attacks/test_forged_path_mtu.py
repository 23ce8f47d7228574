# SPDX-License-Identifier: Apache-2.0
"""Anybody sends one ICMP "too big: 576" about the tunnel, and datagrams are lost for ten minutes (item 10)."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP

from mesh import _abi
from mesh.datapath.kernel.path_mtu import PathMtuCheck, believed
from mesh.datapath.paths.peer_probe import PathMtu
from mesh.model import Address
from tests.bpf.plane import TUNNEL_PORT, Plane
from tests.support.frames import CLIENT4, ETHER, IP, NODE4, UDP, datagram

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PEER = "192.0.2.2"


@pytest.fixture
def plane() -> Plane:
    """Port 53/udp, whose task is on another node."""
    p = Plane.fresh()
    p.local(NODE4)
    p.tunnel(0, PEER, NODE4)
    p.away(2, PEER, 5353, bytes(range(8)), protocol=17)
    p.frontend(1, 53, [(2, 2)], protocol=17)
    return p


def forge(p: Plane, mtu: int) -> None:
    quoted = IP(src=NODE4, dst=PEER, flags="DF") / UDP(sport=50000, dport=TUNNEL_PORT, chksum=0, len=1400)
    error = ETHER / IP(src="203.0.113.66", dst=NODE4) / ICMP(type=3, code=4, nexthopmtu=mtu) / quoted
    p.run("mesh_ingress", bytes(error))


def sent(p: Plane, size: int) -> bool:
    """Whether a datagram of so many bytes goes through the tunnel."""
    before = p.verdicts().get("TUNNEL_TX", 0)
    p.run("mesh_ingress", bytes(datagram(CLIENT4, 40000, NODE4, 53, bytes(size))))
    return p.verdicts().get("TUNNEL_TX", 0) > before


@pytest.fixture
def asked() -> Iterator[list[Address]]:
    yield []


def agent(p: Plane, found: PathMtu, asked: list[Address]) -> None:
    """What the agent does within a second, by probes that find this."""

    def probe(address: Address, port: int, device: int) -> PathMtu:
        asked.append(address)
        return found

    check = PathMtuCheck(p.maps["mesh_nodes"], 9552, lambda: False, probe)
    check.check()
    check.close()


@pytest.mark.parametrize("mtu", [576, 1280, 1400])
def test_one_forged_error_changes_nothing(plane: Plane, asked: list[Address], mtu: int) -> None:
    forge(plane, mtu)
    assert sent(plane, 1400)
    agent(plane, PathMtu(1500, 1500), asked)
    assert asked == ([ip_address(PEER)] if mtu >= 1280 else [])
    assert sent(plane, 1400)
    agent(plane, PathMtu(1500, 1500), asked)
    assert len(asked) <= 1  # once for each hint


def test_a_path_that_takes_less_is_found(plane: Plane, asked: list[Address]) -> None:
    forge(plane, 1280)
    agent(plane, PathMtu(1400, 1500, told=True), asked)
    assert not sent(plane, 1400)
    assert sent(plane, 1400 - 64 - 28)
    assert not sent(plane, 1400 - 64 - 28 + 1)


def test_what_cannot_be_asked_is_believed() -> None:
    node = _abi.Node(mtu=1500, hint=1300)
    assert believed(node, PathMtu(0, 1500)) == 1300
    assert believed(node, PathMtu(1500, 1500)) == 0
    assert believed(node, PathMtu(1380, 1500)) == 1380
