# SPDX-License-Identifier: Apache-2.0
"""UDP datagrams in fragments, in any order: what a kernel that cuts them by itself never sends."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE

IP_NODEFRAG = 22  # linux/in.h
UDP, FRAGMENT = 17, 44
PIECE = 1024  # bytes of a fragment's payload; a multiple of 8

Order = Callable[[list[bytes]], list[bytes]]


def in_order(pieces: list[bytes]) -> list[bytes]:
    return pieces


def last_first(pieces: list[bytes]) -> list[bytes]:
    return pieces[::-1]


def swapped(pieces: list[bytes]) -> list[bytes]:
    """The first one second."""
    return [*pieces[1:2], *pieces[:1], *pieces[2:]]


def shuffled(pieces: list[bytes]) -> list[bytes]:
    return random.Random(sum(pieces[0]) + len(pieces)).sample(pieces, len(pieces))


ORDERS: dict[str, Order] = {"in-order": in_order, "swapped": swapped, "last-first": last_first, "shuffled": shuffled}


def total(data: bytes) -> int:
    value = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while value > 0xFFFF:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def cut(
    source: tuple[str, int], target: tuple[str, int], data: bytes, ident: int, piece: int = PIECE, ttl: int = 64
) -> list[bytes]:
    """A datagram as IP packets, from the first fragment to the last."""
    ends = ipaddress.ip_address(source[0]).packed + ipaddress.ip_address(target[0]).packed
    head = struct.pack("!HHHH", source[1], target[1], 8 + len(data), 0)
    check = ~total(ends + struct.pack("!II", 8 + len(data), UDP) + head + data) & 0xFFFF or 0xFFFF
    body = head[:6] + check.to_bytes(2, "big") + data
    places = range(0, len(body), piece)
    return [packet(ends, body[at : at + piece], ident, at, more=at + piece < len(body), ttl=ttl) for at in places]


def packet(ends: bytes, body: bytes, ident: int, at: int, *, more: bool, ttl: int = 64) -> bytes:
    if len(ends) == 32:
        head = struct.pack("!IHBB", 0x60000000, 8 + len(body), FRAGMENT, ttl) + ends
        return head + struct.pack("!BBHI", UDP, 0, at | more, ident) + body
    word = at // 8 | (0x2000 if more else 0)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), ident & 0xFFFF, word, ttl, UDP, 0) + ends
    return head[:10] + (~total(head) & 0xFFFF).to_bytes(2, "big") + head[12:] + body


def raw_socket_here(version: int) -> socket.socket:
    """A socket that sends IP packets as they are, in this thread's network namespace."""
    sock = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, IP_NODEFRAG, 1)
    return sock


def raw_socket(namespace: Namespace, version: int) -> socket.socket:
    with namespace.entered():
        return raw_socket_here(version)


def put(sock: socket.socket, target: str, packets: Sequence[bytes]) -> None:
    for each in packets:
        sock.sendto(each, (target, 0))


class Caller:
    """Asks from one address and port, in fragments."""

    def __init__(self, namespace: Namespace, source: str, target: tuple[str, int], port: int = 0) -> None:
        version = ipaddress.ip_address(source).version
        with namespace.entered():
            self.sock = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((source, port))
        self.sock.settimeout(PATIENCE)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.raw = raw_socket(namespace, version)
        self.source, self.target = (source, self.sock.getsockname()[1]), target
        self.ident = 1000

    def send(self, data: bytes, order: Order = in_order, piece: int = PIECE) -> None:
        self.ident += 1
        put(self.raw, self.target[0], order(cut(self.source, self.target, data, self.ident, piece)))

    def ask(self, data: bytes, order: Order = in_order, piece: int = PIECE) -> str:
        """Who the task takes for its client; its answer must have come back whole, from the called address."""
        self.send(data, order, piece)
        return self.answer(data)

    def answer(self, data: bytes) -> str:
        got, peer = self.sock.recvfrom(65536)
        assert peer[:2] == self.target
        seen, _, rest = got.partition(b" ")
        assert rest == data
        return seen.decode()

    def close(self) -> None:
        self.sock.close()
        self.raw.close()


@contextlib.contextmanager
def caller(namespace: Namespace, source: str, target: tuple[str, int], port: int = 0) -> Iterator[Caller]:
    made = Caller(namespace, source, target, port)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def echoing(namespace: Namespace, address: str, port: int, order: Order = in_order) -> Iterator[None]:
    """A server that answers each datagram by its client's address and the datagram, in fragments."""
    version = ipaddress.ip_address(address).version
    with namespace.entered():
        sock = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.bind((address, port))
    sock.settimeout(0.2)
    raw, ended = raw_socket(namespace, version), threading.Event()

    def serve() -> None:
        ident = 5000
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, peer = sock.recvfrom(65536)
                ident += 1
                answer = peer[0].encode() + b" " + data
                put(raw, peer[0], order(cut((address, port), peer[:2], answer, ident)))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sock.close()
        raw.close()


def queued(namespace: Namespace) -> dict[str, int]:
    """Reassembly queues of the namespace's kernel, by IP version: how many datagrams wait for fragments."""
    found = {}
    for name in ("sockstat", "sockstat6"):
        with namespace.entered(), open(f"/proc/thread-self/net/{name}") as table:
            line = next(line.split() for line in table if line.startswith("FRAG"))
        found["6" if name.endswith("6") else "4"] = int(line[2])
    return found
