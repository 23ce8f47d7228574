# SPDX-License-Identifier: Apache-2.0
"""Proof between nodes at the peer port: two engines on loopback, and what others send in a node's name."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config.keys import Config
from mesh.datapath import proof
from mesh.datapath.base import BackendKey
from mesh.datapath.paths.peer_probe import ask_stream, nonce_of, question
from mesh.datapath.proof import Proof
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.datapath.proxy.peers import tag_of
from tests.support.fastpath_bench import Served, TcpServer, UdpServer, call, engine, free_port, tcp, udp
from tests.support.polling import PATIENCE, wait_for

HERE, THERE = "127.0.0.1", "127.0.0.2"
ADDRESSES = frozenset(map(ipaddress.ip_address, (HERE, THERE)))
OLD, NEW, OTHER = (1, b"o" * 16), (2, b"n" * 16), (1, b"x" * 16)
MAPPED = bytes(10) + b"\xff\xff"
FLOW = MAPPED + b"\x0a\0\0\x01" + MAPPED + b"\x0a\0\0\x02" + struct.pack(">HH", 1234, 80)


def proves(*keys: tuple[int, bytes], **changes: object) -> Proof:
    """All nodes prove, and answer with proofs."""
    return Proof(**{"keys": keys, "proving": ADDRESSES, "checking": ADDRESSES} | changes)  # type: ignore[arg-type]


class Nodes:
    """`ingress` is called at HERE, and reaches the backends only through `owner`, which is at THERE."""

    def __init__(self, ingress: Served, owner: Served, port: int) -> None:
        self.ingress, self.owner, self.port = ingress, owner, port
        self.front, self.datagrams = tcp(), udp()
        self.server, self.udp_server = TcpServer(), UdpServer("u")
        known = {self.front: {"a": self.server.where}, self.datagrams: {"u": self.udp_server.where}}
        there = {tcp(): known[self.front], udp(): known[self.datagrams]}  # under other ports: nobody calls it directly
        self.owner.serve(there, nodes=(HERE, THERE))
        self.ingress.serve(known, via=THERE, nodes=(THERE,))  # knows the other node, and does not listen itself

    def prove(self, ingress: Proof, owner: Proof) -> None:
        self.ingress.datapath.prove(ingress)
        self.owner.datapath.prove(owner)

    def total(self, name: str = "peer_unproven", served: Served | None = None) -> int:
        return int((served or self.owner).datapath.stats().totals[name])

    def works(self) -> bool:
        with contextlib.suppress(OSError), call(self.front) as sock:
            sock.sendall(b"hello")
            return sock.recv(100) == b"hello"
        return False

    def asks(self, data: bytes = b"x", sock: socket.socket | None = None, patience: float = 0.5) -> bytes:
        """A datagram by way of the ingress."""
        with contextlib.ExitStack() as stack:
            if sock is None:
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.settimeout(patience)
            sock.sendto(data, (HERE, self.datagrams.port))
            with contextlib.suppress(TimeoutError):
                return sock.recv(70000)
        return b""

    def says(self, header: bytes) -> bytes:
        """What the owner's peer port answers to a connection that begins so; b"": it is cut off."""
        with contextlib.suppress(ConnectionError), socket.create_connection((THERE, self.port), PATIENCE) as sock:
            sock.sendall(header)
            return sock.recv(1)
        return b""

    def header(self, key: tuple[int, bytes] | None, *, ago: float = 0.0, flow: bytes = FLOW) -> bytes:
        value = tag_of(BackendKey("a", self.server.where[1], 6)) + b"\0"
        body = FLOW[12:16] + FLOW[28:32] + FLOW[32:] + b"\xe0\0\x0b" + value
        if key is not None:
            given_ = proof.write(key, proof.TCP, value + flow, int(time.time() - ago))
            body += b"\xe1\0\x10" + given_
        return b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11" + struct.pack(">H", len(body)) + body

    def head(self, key: tuple[int, bytes] | None, *, ago: float = 0.0) -> bytes:
        body = tag_of(BackendKey("u", self.udp_server.where[1], 17)) + bytes(2) + FLOW
        if key is None:
            return b"MUD1" + body
        return b"MUD2" + body + proof.write(key, proof.UDP, body, int(time.time() - ago))


@contextlib.contextmanager
def two() -> Iterator[Nodes]:
    port = free_port()
    with engine(peer_port=port) as ingress, engine(peer_port=port) as owner:
        yield Nodes(ingress, owner, port)


@pytest.fixture(scope="module")
def shared() -> Iterator[Nodes]:
    with two() as nodes:
        yield nodes


@pytest.fixture
def nodes(shared: Nodes) -> Nodes:
    shared.prove(proves(OLD), proves(OLD))
    return shared


def test_what_is_proven_is_served(nodes: Nodes) -> None:
    assert nodes.works()
    for size in (0, 1, 1400, 60000):
        assert nodes.asks(b"y" * size, patience=PATIENCE) == b"u:" + b"y" * size
    assert (nodes.total(), nodes.total(served=nodes.ingress)) == (0, 0)


def test_what_is_not_is_refused(nodes: Nodes) -> None:
    before = nodes.total()
    assert nodes.says(nodes.header(OLD)) == b"\x06"
    wrong = [
        nodes.header(None),
        nodes.header(OTHER),  # the same number, another key
        nodes.header(NEW),  # a key that is not known
        nodes.header(OLD, flow=FLOW[:15] + b"\x02" + FLOW[16:]),  # another client's
        nodes.header(OLD, ago=120),
        nodes.header(OLD, ago=-120),
        nodes.header(OLD)[:-1] + bytes([nodes.header(OLD)[-1] ^ 1]),
    ]
    for number, header in enumerate(wrong, 1):
        assert nodes.says(header) == b"", number
        assert nodes.total() == before + number
    assert nodes.says(nodes.header(OLD, ago=40)) == b"\x06"
    assert nodes.says(nodes.header(OLD, ago=-40)) == b"\x06"


def test_datagrams_likewise(nodes: Nodes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HERE, 0))
        sock.settimeout(0.2)

        def said(head: bytes) -> bytes:
            sock.sendto(head + b"hello", (THERE, nodes.port))
            with contextlib.suppress(TimeoutError):
                return sock.recv(100)
            return b""

        assert said(nodes.head(OLD))[20:] == b"u:hello"
        before = nodes.total()
        for head in (nodes.head(None), nodes.head(OTHER), nodes.head(NEW), nodes.head(OLD, ago=120)):
            assert said(head) == b""
        assert nodes.total() == before + 4
        answer = said(nodes.head(OLD))
        assert answer[:4] == b"MUD3"
        written = proof.write(OLD, 3, nodes.head(OLD)[4:52], int.from_bytes(answer[8:12], "big"))
        assert answer[4:20] == written


def test_a_forged_answer_reaches_no_client(nodes: Nodes) -> None:
    """Whoever may send from the owner's address and port: here with SO_REUSEPORT, on a wire with a raw socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert nodes.asks(b"x", client, PATIENCE) == b"u:x"
        before = nodes.total(served=nodes.ingress)
        forger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with forger:
            forger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            forger.bind((THERE, nodes.port))
            for port in towards(nodes.port):
                for data in (b"FORGED", b"MUD3" + bytes(16) + b"FORGED"):
                    forger.sendto(data, (HERE, port))
        wait_for(lambda: nodes.total(served=nodes.ingress) >= before + 2)
        assert nodes.asks(b"z", client, PATIENCE) == b"u:z"


def towards(port: int) -> list[int]:
    """Local ports of this host's UDP sockets that are connected to `port` at THERE."""
    wanted = f"{int.from_bytes(socket.inet_aton(THERE), 'little'):08X}:{port:04X}"
    rows = [line.split() for line in Path("/proc/self/net/udp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[2] == wanted]


def test_two_keys_are_valid_at_a_time(nodes: Nodes) -> None:
    """A change of keys while a session is under way, in any order; no connection and no datagram is lost."""
    before = nodes.total(), nodes.total(served=nodes.ingress)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for ingress, owner in [
            (proves(OLD), proves(OLD, NEW)),
            (proves(OLD, NEW), proves(OLD, NEW)),
            (proves(NEW, OLD), proves(OLD, NEW)),
            (proves(NEW, OLD), proves(NEW, OLD)),
            (proves(NEW), proves(NEW, OLD)),
            (proves(NEW), proves(NEW)),
        ]:
            nodes.prove(ingress, owner)
            assert nodes.asks(b"k", client, PATIENCE) == b"u:k"
            assert nodes.works()
    assert (nodes.total(), nodes.total(served=nodes.ingress)) == before


NOBODY = frozenset[ipaddress.IPv4Address]()


@pytest.mark.parametrize(
    ("ingress", "owner"),
    [
        (Proof(), Proof()),
        (Proof(), Proof(keys=(OLD,))),  # the ingress' build is old, or has no key yet
        (Proof(keys=(OLD,)), Proof()),  # the owner's
        (Proof(keys=(OLD,)), Proof(keys=(OLD,))),  # neither knows of the other
        (Proof(keys=(OLD,)), Proof(keys=(OLD,), proving=ADDRESSES)),  # connections are proven whatever is known
        (Proof(keys=(OLD,), checking=ADDRESSES), Proof(keys=(OLD,))),
        (Proof(keys=(OLD,), checking=ADDRESSES), Proof(keys=(OLD,), proving=ADDRESSES)),
    ],
)
def test_upgrades_lose_nothing(nodes: Nodes, ingress: Proof, owner: Proof) -> None:
    """Every state that two nodes can be in while keys and builds come to them, in whatever order."""
    nodes.prove(ingress, owner)
    assert nodes.works()
    if not owner.proving or ingress.checking:
        assert nodes.asks(b"x", patience=PATIENCE) == b"u:x"


def test_a_session_goes_on_when_proofs_come(nodes: Nodes) -> None:
    nodes.prove(Proof(), Proof())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for step in (
            (Proof(keys=(OLD,)), Proof(keys=(OLD,))),
            (Proof(keys=(OLD,), checking=ADDRESSES), Proof(keys=(OLD,))),
            (proves(OLD), proves(OLD)),
        ):
            nodes.prove(*step)
            assert nodes.asks(b"x", client, PATIENCE) == b"u:x"


def test_require_refuses_old_builds(nodes: Nodes) -> None:
    strict = Proof(keys=(OLD,), require=True)
    nodes.prove(Proof(), strict)
    assert not nodes.works()
    nodes.prove(Proof(keys=(OLD,)), strict)
    assert nodes.works()


async def test_a_probe_with_a_proof_shows_whether_it_is_believed(nodes: Nodes) -> None:
    there = ipaddress.ip_address(THERE)
    good, none = proves(OLD), Proof()

    def prove(by: Proof) -> object:
        return lambda kind, body: by.of(kind, body, int(time.time()))

    assert await ask_stream(there, nodes.port) == ""  # `mesh check` has no key
    assert await ask_stream(there, nodes.port, prove=prove(good)) == ""  # type: ignore[arg-type]
    assert await ask_stream(there, nodes.port, prove=prove(none)) == "cut off"  # type: ignore[arg-type]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HERE, 0))
        sock.settimeout(0.3)
        for asked, answered in (
            (question(b"1234"), True),
            (question(b"1234", prove(good)), True),  # type: ignore[arg-type]
            (question(b"1234", prove(none)), False),  # type: ignore[arg-type]
        ):
            sock.sendto(asked, (THERE, nodes.port))
            answer = b""
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(100)
            assert (nonce_of(answer, 4) == b"1234") is answered


@settings(max_examples=60)
@given(position=st.integers(0, 84), bit=st.integers(0, 7))
def test_no_bit_of_a_header_can_be_changed(shared: Nodes, position: int, bit: int) -> None:
    """Of what is proven, and of the proof: whatever is changed, the task is not reached."""
    shared.prove(proves(OLD), proves(OLD))
    header = bytearray(shared.header(OLD))
    position %= len(header)
    header[position] ^= 1 << bit
    if position in (13, 14, 15):
        return  # another length: it waits for more
    assert shared.says(bytes(header)) != b"\x06"


def test_an_engine_without_other_nodes_takes_keys() -> None:
    alone = ProxyDatapath(Config(threads=1, intercept="bind", peer_port=free_port()))
    alone.open()
    try:
        alone.prove(proves(OLD))
    finally:
        alone.close(release=True)
