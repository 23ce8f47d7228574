# SPDX-License-Identifier: Apache-2.0
"""Access control: mesh.allow and mesh.deny as entries of mesh_acl, a longest-prefix match. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from mesh._abi import ACL_ALLOW, ACL_DENY
from mesh.datapath.kernel import codec
from mesh.model import Network
from mesh.netaddr import MAPPED
from mesh.rules import compact

ALL_V4: Final = ipaddress.ip_network("0.0.0.0/0")

Rules = tuple[tuple[Network, int], ...]


def compile_rules(allow: Sequence[Network], deny: Sequence[Network]) -> Rules:
    """Entries whose longest match decides as the lists do, each with ACL_ALLOW or ACL_DENY. `deny` overrides `allow`.

    A source that matches no entry is denied if `allow` has entries (MESH_FRONTEND_DENY), else allowed. IPv4 addresses
    are IPv4-mapped here, so a wide IPv6 prefix such as ::/0 needs an entry that exempts IPv4 clients. O(n log n).
    """
    admitted, denied = compact(allow, deny)
    rules = dict.fromkeys(denied, ACL_DENY) | dict.fromkeys(admitted, ACL_ALLOW)
    if any(isinstance(network, ipaddress.IPv6Network) and MAPPED.subnet_of(network) for network in rules):
        rules.setdefault(ALL_V4, ACL_DENY if allow else ACL_ALLOW)
    return tuple(rules.items())


def rule_keys(rules: Rules) -> dict[bytes, int]:
    """The same with each network as the end of a mesh_acl key: what differs from rule set to rule set is left out."""
    return {codec.pack_acl_key(0, network): action for network, action in rules}
