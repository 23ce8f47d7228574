# SPDX-License-Identifier: Apache-2.0
"""Flow hash and slot choice: golden vectors, equality with the oracle, uniformity, hostile arguments."""

import ipaddress
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import _maglev
from mesh._abi import TABLE_SIZES
from tests.oracle import selection

GOLDEN = json.loads((Path(__file__).parent / "golden_hash.json").read_text())

addresses = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: selection.address(str(ip))),
    st.ip_addresses(v=6).map(lambda ip: ip.packed),
    st.binary(min_size=16, max_size=16),
)
ports = st.integers(0, 65535)
protocols = st.one_of(st.sampled_from([6, 17]), st.integers(0, 255))
hashes = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("vector", GOLDEN["flows"], ids=lambda v: "-".join(map(str, v["flow"])))
def test_golden_flow(vector):
    source, sport, destination, dport, protocol = vector["flow"]
    src, dst = selection.address(source), selection.address(destination)
    assert _maglev.hash_flow(src, sport, dst, dport, protocol) == vector["hash"]
    assert _maglev.hash_client(src) == vector["client"]
    assert [_maglev.hash_again(vector["hash"], n) for n in (1, 2, 3)] == vector["again"]
    assert {size: _maglev.slot_of(vector["hash"], int(size)) for size in vector["slots"]} == vector["slots"]


def test_golden_seeds():
    assert {name: _maglev.backend_seed(name).hex() for name in GOLDEN["seeds"]} == GOLDEN["seeds"]


def test_golden_file_is_what_the_oracle_says():
    assert selection.golden() == GOLDEN


@given(addresses, ports, addresses, ports, protocols)
def test_flow_hash_equals_the_oracle(source, sport, destination, dport, protocol):
    flow = (source, sport, destination, dport, protocol)
    assert _maglev.hash_flow(*flow) == selection.flow_hash(*flow)


@given(addresses)
def test_client_hash_equals_the_oracle(source):
    assert _maglev.hash_client(source) == selection.client_hash(source)


@given(hashes, st.integers(1, 2**32 - 1))
def test_further_hash_equals_the_oracle(value, n):
    assert _maglev.hash_again(value, n) == selection.further_hash(value, n)


@given(hashes, st.sampled_from(TABLE_SIZES))
def test_slot_equals_the_oracle(value, size):
    assert _maglev.slot_of(value, size) == selection.slot_for(value, size)


@given(st.text(max_size=80))
def test_seed_equals_the_oracle(identity):
    try:
        identity.encode()
    except UnicodeEncodeError:
        return
    assert _maglev.backend_seed(identity) == selection.seed_of(identity)


@pytest.mark.parametrize("size", TABLE_SIZES)
def test_slots_at_the_ends_of_the_hash_space(size):
    assert _maglev.slot_of(0, size) == 0
    assert _maglev.slot_of(2**32 - 1, size) == size - 1


def chi_square(slots, size):
    expected = len(slots) / size
    seen = Counter(slots)
    return sum((seen[slot] - expected) ** 2 / expected for slot in range(size))


def sequential_ports():
    src, dst = selection.address("10.0.0.1"), selection.address("10.0.0.2")
    return [_maglev.hash_flow(src, port, dst, 80, 6) for port in range(1024, 65536)]


def even_ports():  # what Linux gives to connect()
    dst = selection.address("10.0.0.2")
    return [
        _maglev.hash_flow(selection.address(f"10.0.0.{host}"), port, dst, 80, 6)
        for host in range(3, 6)
        for port in range(32768, 61000, 2)
    ]


def neighbouring_clients():
    return [_maglev.hash_client(selection.address(f"10.1.{i >> 8}.{i & 255}")) for i in range(60000)]


def neighbouring_v6_clients():
    base = int(ipaddress.IPv6Address("2001:db8::"))
    return [_maglev.hash_client((base + (i << 64)).to_bytes(16, "big")) for i in range(60000)]


def addresses_and_ports_that_move_together():
    dst = selection.address("10.0.0.2")
    return [
        _maglev.hash_flow(selection.address(f"10.2.{i >> 8}.{i & 255}"), 1024 + i, dst, 443, 6) for i in range(60000)
    ]


@pytest.mark.parametrize(
    "flows",
    [
        sequential_ports,
        even_ports,
        neighbouring_clients,
        neighbouring_v6_clients,
        addresses_and_ports_that_move_together,
    ],
)
def test_structured_flows_spread_evenly(flows):
    slots = [_maglev.slot_of(value, 1021) for value in flows()]
    # Chi square with 1020 degrees of freedom: mean 1020, standard deviation 45; fixed input, so this never flickers.
    assert 1020 - 6 * 45 < chi_square(slots, 1021) < 1020 + 6 * 45


def test_further_choices_are_independent_of_the_first():
    rng = random.Random(1)
    values = [rng.randrange(2**32) & 0xFFF00000 for _ in range(20000)]  # all in few slots
    pairs = Counter((_maglev.slot_of(_maglev.hash_again(v, 1), 8), v >> 31) for v in values)
    assert len(pairs) == 16
    assert max(pairs.values()) < 1.5 * min(pairs.values())


def test_every_part_of_the_flow_counts():
    src, dst = selection.address("10.0.0.1"), selection.address("10.0.0.2")
    base = (src, 1000, dst, 80, 6)
    others = {
        (dst, 1000, dst, 80, 6),
        (src, 1001, dst, 80, 6),
        (src, 1000, src, 80, 6),
        (src, 1000, dst, 81, 6),
        (src, 1000, dst, 80, 17),
        (src, 80, dst, 1000, 6),
        (dst, 1000, src, 80, 6),
    }
    assert len({_maglev.hash_flow(*flow) for flow in {base, *others}}) == 8


@pytest.mark.parametrize(
    "flow",
    [
        (b"\0" * 4, 1, b"\0" * 16, 1, 6),
        (b"\0" * 16, 1, b"\0" * 17, 1, 6),
        (b"\0" * 16, -1, b"\0" * 16, 1, 6),
        (b"\0" * 16, 1, b"\0" * 16, 65536, 6),
        (b"\0" * 16, 1, b"\0" * 16, 1, 256),
    ],
)
def test_arguments_out_of_range_are_refused(flow):
    with pytest.raises(ValueError, match=r"address is 16 bytes|ports are"):
        _maglev.hash_flow(*flow)
    with pytest.raises((TypeError, ValueError)):
        _maglev.hash_flow(None, *flow[1:])  # type: ignore[arg-type]
