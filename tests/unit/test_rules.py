# SPDX-License-Identifier: Apache-2.0
"""Source rules merged: fewer prefixes that say the same."""

from __future__ import annotations

import ipaddress
import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from mesh.model import Network
from mesh.rules import MOST, NOBODY, Cover, compact, merged

SMALL = [ipaddress.ip_network(f"10.0.0.{n}/{32 - bits}") for bits in range(4) for n in range(0, 8, 1 << bits)]
SIXES = [ipaddress.ip_network(f"2001:db8::{n:x}/{128 - bits}") for bits in range(3) for n in range(0, 4, 1 << bits)]
WIDE = [ipaddress.ip_network(text) for text in ("0.0.0.0/0", "::/0", "10.0.0.0/8", "::ffff:10.0.0.2/127")]
ADDRESSES = [ipaddress.ip_address(f"10.0.0.{n}") for n in range(9)]
ADDRESSES += [ipaddress.ip_address(f"2001:db8::{n:x}") for n in range(5)] + [ipaddress.ip_address("192.0.2.1")]
LISTS = st.lists(st.sampled_from(SMALL + SIXES + WIDE), max_size=12)


def within(address: object, networks: object) -> bool:
    """IPv4-mapped networks are IPv4 ones."""
    for network in networks:  # type: ignore[attr-defined]
        if network.version == 6 and network.network_address.ipv4_mapped:
            network = ipaddress.ip_network((network.network_address.ipv4_mapped, network.prefixlen - 96))  # noqa: PLW2901
        if address in network:
            return True
    return False


@given(LISTS)
def test_merged_networks_have_the_same_addresses_and_are_the_fewest(networks: list[Network]) -> None:
    found = merged(networks)
    for address in ADDRESSES:
        assert within(address, found) == within(address, networks)
    versions = {n: [x for x in found if x.version == n] for n in (4, 6)}
    collapsed = [
        *ipaddress.collapse_addresses(versions[4]),  # type: ignore[type-var]
        *ipaddress.collapse_addresses(versions[6]),  # type: ignore[type-var]
    ]
    assert list(found) == collapsed


@given(LISTS, LISTS)
def test_compact_lists_admit_the_same_clients(allow: list[Network], deny: list[Network]) -> None:
    few, against = compact(allow, deny)
    for address in ADDRESSES:
        expected = not within(address, deny) and (not allow or within(address, allow))
        assert (not within(address, against) and (not few or within(address, few))) is expected
    assert len(few) + len(against) <= max(len(allow) + len(deny), len(NOBODY))


def test_what_covers_is_found_whatever_the_ends() -> None:
    cover = Cover(merged([ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32")]))
    inside = ("10.0.0.0/8", "10.255.255.255/32", "2001:db8:ffff::/48")
    assert all(ipaddress.ip_network(text) in cover for text in inside)
    assert not any(ipaddress.ip_network(text) in cover for text in ("0.0.0.0/0", "11.0.0.0/32", "2001:db9::/32"))


def test_as_many_networks_as_anybody_writes_take_no_time() -> None:
    """An allow and a deny of 20,000 networks each; comparing each with each took minutes."""
    allow = [ipaddress.IPv4Network((n << 12, 24)) for n in range(20_000)]
    deny = [ipaddress.IPv4Network((n << 12 | 2, 32)) for n in range(20_000)]
    began = time.perf_counter()
    admitted, denied = compact(allow, deny)
    assert time.perf_counter() - began < 10
    assert len(admitted) == len(denied) == 20_000
    neighbours = list(itertools.islice(ipaddress.ip_network("10.0.0.0/8").hosts(), 70_000))
    assert len(merged(ipaddress.IPv4Network(address) for address in neighbours)) < MOST  # merged they are few
