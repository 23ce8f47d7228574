# SPDX-License-Identifier: Apache-2.0
"""Access control: mesh.allow and mesh.deny as entries of mesh_acl, a longest-prefix match. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from mesh._abi import ACL_ALLOW, ACL_DENY
from mesh.model import Network
from mesh.netaddr import MAPPED

ALL_V4: Final = ipaddress.ip_network("0.0.0.0/0")


def _covers(outer: Network, inner: Network) -> bool:
    if isinstance(outer, ipaddress.IPv4Network) and isinstance(inner, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(outer, ipaddress.IPv6Network) and isinstance(inner, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


def compile_rules(allow: Sequence[Network], deny: Sequence[Network]) -> list[tuple[Network, int]]:
    """Entries whose longest match decides as the lists do. `deny` overrides `allow`.

    A source that matches no entry is denied if `allow` has entries (MESH_FRONTEND_DENY), else allowed. IPv4 addresses
    are IPv4-mapped here, so a wide IPv6 prefix such as ::/0 needs an entry that exempts IPv4 clients.
    """
    rules: dict[Network, int] = dict.fromkeys(deny, ACL_DENY)
    for network in allow:
        if not any(_covers(outer, network) for outer in deny):
            rules[network] = ACL_ALLOW
    if any(isinstance(network, ipaddress.IPv6Network) and MAPPED.subnet_of(network) for network in rules):
        rules.setdefault(ALL_V4, ACL_DENY if allow else ACL_ALLOW)
    return list(rules.items())
