# SPDX-License-Identifier: Apache-2.0
"""Source rules (mesh.allow, mesh.deny) as the fewest prefixes that say the same. Pure."""

from __future__ import annotations

import bisect
import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

from mesh.model import Network
from mesh.netaddr import MAPPED

NOBODY: Final[tuple[Network, ...]] = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
"""A deny that lets nobody in."""
MOST: Final = 8192
"""Merged prefixes that one service may have: the kernel engine has room for eight times as many, for all services."""

_Prefix = tuple[int, int]  # address, length


def merged(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The fewest networks that have the same addresses: none is in another, and no two are halves of one.

    IPv4-mapped IPv6 networks are IPv4 ones. Sorted, IPv4 first; O(n log n).
    """
    four: set[_Prefix] = set()
    six: set[_Prefix] = set()
    for network in networks:
        start, length = int(network.network_address), network.prefixlen
        if isinstance(network, ipaddress.IPv4Network):
            four.add((start, length))
        elif length >= MAPPED.prefixlen and network.network_address in MAPPED:
            four.add((start & 0xFFFFFFFF, length - MAPPED.prefixlen))
        else:
            six.add((start, length))
    return (
        *(ipaddress.IPv4Network(prefix) for prefix in _merged(four, 32)),
        *(ipaddress.IPv6Network(prefix) for prefix in _merged(six, 128)),
    )


def _merged(prefixes: Iterable[_Prefix], bits: int) -> list[_Prefix]:
    found: list[_Prefix] = []
    end = -1  # first address after the last prefix
    for prefix in sorted(prefixes):
        if prefix[0] < end:
            continue
        start, length = prefix
        end = start + (1 << bits - length)
        while found and length and found[-1] == (start ^ 1 << bits - length, length) and found[-1][0] < start:
            start, length = found.pop()[0], length - 1
        found.append((start, length))
    return found


def compact(allow: Sequence[Network], deny: Sequence[Network]) -> tuple[tuple[Network, ...], tuple[Network, ...]]:
    """Both lists merged, without what the other one decides anyway: allowed networks that are denied, and denied ones
    of which nothing is allowed. `deny` overrides `allow`; an empty `allow` is everybody.

    Where all that is allowed is denied, and so nobody is let in, the lists are (), NOBODY.
    """
    if not allow:
        return (), merged(deny)
    denied, admitted = merged(deny), merged(allow)
    closed = Cover(denied)
    left = tuple(network for network in admitted if network not in closed)
    if not left:
        return (), NOBODY
    opened = Cover(left)
    return left, tuple(network for network in denied if network in opened)


class Cover:
    """Whether a network is in one of these, which are merged: O(log n)."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        self._ends: dict[int, list[int]] = {4: [], 6: []}
        for network in networks:
            self._starts[network.version].append(int(network.network_address))
            self._ends[network.version].append(int(network.broadcast_address))

    def __contains__(self, network: Network) -> bool:
        starts, ends = self._starts[network.version], self._ends[network.version]
        at = bisect.bisect_right(starts, int(network.network_address)) - 1
        return at >= 0 and ends[at] >= int(network.broadcast_address)
