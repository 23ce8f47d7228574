# SPDX-License-Identifier: Apache-2.0
"""Proofs in the tunnel between two engines (picture: tunnel_pair.py): they begin, keys change, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from mesh.datapath.paths.tunnel_probe import ask_tunnel, ask_tunnel_either_way
from tests.engines.kernel_plane import Connection, datagram
from tests.engines.tunnel_pair import MEGABYTE, NODES, UDP, A, B, Pair
from tests.support.lab.netns import Lab
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

OLD, NEW = (0x11110001, b"o" * 16), (0x22220002, b"n" * 16)
Keys = tuple[tuple[int, bytes], ...]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Lab() as lab:
        pair = Pair(lab)
        pair.ensure()
        pair.serve("there")
        pair.wait_ways(1500)
        yield pair
        pair.close()


def prove(pair: Pair, at: str, keys: Keys, *, demanded: bool, sent: bool = True) -> None:
    """What one node proves to the other, and demands of it."""
    node, other = (pair.a, B) if at == "a" else (pair.b, A)
    listed = [[number, secret.hex()] for number, secret in keys]
    pair.drivers[node].prove(keys=listed, nodes=[other] * demanded, checking=[other] * sent)


def unproven(pair: Pair) -> int:
    return sum(pair.verdicts(node).get("tunnel_unproven", 0) for node in (pair.a, pair.b))


def test_proofs_begin_and_keys_change_under_way(pair: Pair) -> None:
    """In the order in which an upgrade and a rotation bring them; an established connection and a transfer go on."""
    connection = Connection(pair.client, pair.a.address)
    stream, tag = pair.stream("-u", str(60 * MEGABYTE), "-d", str(60 * MEGABYTE))
    steps: list[tuple[str, Keys, bool, bool]] = [
        ("a", (OLD,), False, False),  # a has been upgraded
        ("b", (OLD,), False, False),
        ("b", (OLD,), False, True),  # b has heard of a; a hears it by b's proofs
        ("b", (OLD,), True, True),
        ("a", (OLD,), False, True),
        ("a", (OLD,), True, True),
        ("b", (OLD, NEW), True, True),  # a rotation: held by all, then used
        ("a", (OLD, NEW), True, True),
        ("b", (NEW, OLD), True, True),
        ("a", (NEW, OLD), True, True),
        ("a", (NEW,), True, True),
        ("b", (NEW,), True, True),
        ("a", (NEW,), False, True),  # back to a build without proofs
        ("b", (), False, False),
        ("a", (NEW,), False, False),
    ]
    for at, keys, demanded, sent in steps:
        prove(pair, at, keys, demanded=demanded, sent=sent)
        connection.echo(10_000)
        assert datagram(pair.client, pair.a.address, UDP) == f"there {pair.client.address}"
        assert Connection(pair.client, pair.a.address).backend == "there"
    client, server = pair.ends(stream, tag)
    assert (client["end"], server["end"]) == ("complete", "complete")
    assert unproven(pair) == 0
    assert pair.drivers[pair.a].problems() == pair.drivers[pair.b].problems() == []


@pytest.mark.parametrize("back", ["tunnel", "direct"])
def test_transfers_are_proven(pair: Pair, back: str) -> None:
    pair.ensure(back)
    for at in "ab":
        prove(pair, at, (NEW,), demanded=True)
    before = unproven(pair)
    pair.transfer("-w", up=3 * MEGABYTE, down=3 * MEGABYTE)
    assert datagram(pair.client, pair.a.address, UDP) == f"there {pair.client.address}"
    assert unproven(pair) == before


def test_trials_are_proven(pair: Pair) -> None:
    """What a node sends that proves nothing is answered as long as it need not, in either form."""
    for at in "ab":
        prove(pair, at, (NEW,), demanded=True)
    to, source = ip_address(B), ip_address(A)
    with pair.a.entered():
        assert ask_tunnel(to, source, 6084, NEW) == ""
        assert ask_tunnel(to, source, 6084) == "no answer"
        assert ask_tunnel(to, source, 6084, OLD) == "no answer"
        prove(pair, "b", (NEW,), demanded=False)
        assert ask_tunnel_either_way(to, source, 6084, ()) == ""
        assert ask_tunnel_either_way(to, source, 6084, (NEW,)) == ""
        assert ask_tunnel_either_way(to, source, 6084, (OLD,)) == ""


def test_the_next_agent_goes_on_with_what_was_demanded(pair: Pair) -> None:
    """Before it has been told anything, and when it has the keys but does not know the nodes yet."""
    for at in "ab":
        prove(pair, at, (NEW,), demanded=True)
    connection = Connection(pair.client, pair.a.address)
    before = unproven(pair)
    for node in (pair.a, pair.b):
        pair.drivers[node].kill()
        pair.start(node)
    with pair.a.entered():
        assert ask_tunnel(ip_address(B), ip_address(A), 6084) == "no answer"
    connection.echo(10_000)
    assert unproven(pair) > before  # the trial alone
    before = unproven(pair)
    for node in (pair.a, pair.b):
        pair.drivers[node].prove(keys=[[NEW[0], NEW[1].hex()]], nodes=[], known=False)
    connection.echo(10_000)
    pair.serve("there", nodes=NODES)
    connection.echo(10_000)
    assert unproven(pair) == before
    wait_for(lambda: pair.drivers[pair.a].ways() == {B: 1500}, "nothing else has changed")
