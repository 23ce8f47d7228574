# SPDX-License-Identifier: Apache-2.0
"""How the kernel engine asks for the MACs of backends of which many do not answer, of a real neighbour table."""

from __future__ import annotations

import ipaddress

import pytest

from mesh.datapath.kernel.locator import ASK_MOST, Locator
from mesh.datapath.netlink import Netlink
from tests.engines.kernel_plane import Plane
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root]


def test_silent_backends_do_not_fill_the_neighbour_table(plane: Plane) -> None:
    living = ipaddress.ip_address(plane.namespaces["b1"].address)
    silent = [ipaddress.ip_address(f"172.31.0.{n}") for n in range(50, 58 + ASK_MOST)]
    with plane.node.entered():
        netlink = Netlink()
        try:
            places = Locator(netlink)
            places.refresh()
            for address in (*silent, living):  # more than may be asked for at a time
                places.find(address)
            waiting = plane.node.ip("-4", "neigh", "show", "nud", "incomplete").splitlines()
            assert 0 < len(waiting) <= ASK_MOST

            def found() -> bool:
                changed = places.refresh()
                for address in (*silent, living) if changed else places.open():
                    places.find(address)
                return places.find(living).mac != bytes(6)

            wait_for(found, "the living one's turn")
        finally:
            netlink.close()
