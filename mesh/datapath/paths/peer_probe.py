# SPDX-License-Identifier: Apache-2.0
"""Asks another node's peer port whether anybody is there, and how large a packet may be on the way to it.

The questions are those of mesh/fastpath/proto.pyx with a tag of zeros: no flow begins, nothing is counted.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mesh import _linux
from mesh.datapath import packets, proof
from mesh.model import Address

CONNECT: Final = 3.0  # seconds
TRIES: Final = 3
WAIT: Final = 0.4  # seconds for one answer
NO_ANSWER: Final = "no answer"
NOBODY: Final = "nobody listens"
LEAST: Final = {4: 576, 6: 1280}  # bytes that every path carries: RFC 791, RFC 8200
_HEADERS: Final = {version: size + _linux.UDP.size for version, size in packets.IP_SIZE.items()}  # IP and UDP
_TAG: Final = bytes(10)
_HEAD: Final = 52  # PEER_UDP
_PROVEN: Final = b"MUD2"  # what a question with a proof begins with
_QUESTION: Final = b"MUD1" + _TAG + b"\0\0"
_ANSWER: Final = b"MUD1" + _TAG + b"\1\0"
_DISCOVER: Final = {
    4: (socket.IPPROTO_IP, _linux.IP_MTU_DISCOVER),
    6: (socket.IPPROTO_IPV6, _linux.IPV6_MTU_DISCOVER),
}
_MTU: Final = {4: (socket.IPPROTO_IP, _linux.IP_MTU), 6: (socket.IPPROTO_IPV6, _linux.IPV6_MTU)}
_PROBE: Final = _linux.IP_PMTUDISC_PROBE  # do not fragment, and do not believe what is known of the path
Prove = Callable[[int, bytes], bytes]
_TOLD: Final = -1
_REFUSED: Final = -2


@dataclass(frozen=True, slots=True)
class PathMtu:
    """What the way to a node carries, bytes with IP header; 0: no datagram came back at all.

    `told`: a router said so (ICMP), so that senders learn it. Where `mtu` is less than `device` and nobody told,
    larger packets vanish: a black hole.
    """

    mtu: int
    device: int
    told: bool = False
    refused: bool = False  # the host answers that nobody listens

    @property
    def black_hole(self) -> bool:
        return 0 < self.mtu < self.device and not self.told

    @property
    def obstacle(self) -> str:
        """Why no datagram came back, in the words of `ask_stream`; empty: one did."""
        return "" if self.mtu else NOBODY if self.refused else NO_ANSWER


async def ask_stream(
    address: Address, port: int, wait: float = CONNECT, answer: float = CONNECT, prove: Prove | None = None
) -> str:
    """Whether the peer port takes connections from here; empty: it does, else why not, in words.

    One of: NO_ANSWER, NOBODY, "cut off" or what the system says.

    Args:
        wait: seconds for the handshake, which the other node's kernel does.
        answer: seconds for the answer, which its process gives once it gets to run.
        prove: gives the proof of a kind and a body (mesh.datapath.proof); what is proven is answered if it is believed.
    """
    client = bytes(2 * (4 if address.version == 4 else 16) + 4)
    value = _TAG + b"\0"
    body = client + b"\xe0" + len(value).to_bytes(2, "big") + value
    if prove is not None:
        given = prove(proof.TCP, value + flow_of_zeros(address.version))
        body += b"\xe1" + len(given).to_bytes(2, "big") + given
    family = b"\x11" if address.version == 4 else b"\x21"
    header = b"\r\n\r\n\0\r\nQUIT\n\x21" + family + len(body).to_bytes(2, "big") + body
    try:
        async with asyncio.timeout(wait):
            reader, writer = await asyncio.open_connection(str(address), port)
        try:
            async with asyncio.timeout(answer):
                writer.write(header)
                return "" if await reader.read(1) else "cut off"
        finally:
            writer.close()
    except TimeoutError:
        return NO_ANSWER
    except ConnectionRefusedError:
        return NOBODY
    except ConnectionError:
        return "cut off"
    except OSError as error:
        return error.strerror or str(error)


def flow_of_zeros(version: int) -> bytes:
    """A flow without addresses and ports, as proofs have it: IPv4 is mapped."""
    none = bytes(10) + b"\xff\xff" + bytes(4) if version == 4 else bytes(16)
    return none + none + bytes(4)


def question(nonce: bytes, prove: Prove | None = None) -> bytes:
    """The shortest datagram that a peer port answers; `nonce` has 16 bytes at most. `prove` as in `ask_stream`."""
    asked = (_QUESTION + nonce).ljust(_HEAD, b"\0")
    return asked if prove is None else _PROVEN + asked[len(_PROVEN) :] + prove(proof.UDP, asked[len(_PROVEN) :])


def nonce_of(answer: bytes, length: int) -> bytes | None:
    """What an answer repeats of its question; None: it is no answer."""
    start = answer[: len(_ANSWER)]
    return answer[len(_ANSWER) : len(_ANSWER) + length] if start in (_ANSWER, _PROVEN + _ANSWER[4:]) else None


def path_mtu(address: Address, port: int, device: int) -> PathMtu:
    """The largest packet that arrives at a node's peer port. Takes moments, or some seconds where packets vanish.

    Args:
        device: MTU of the interface that leads there.
    """
    version = address.version
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(*_DISCOVER[version], _PROBE)
        sock.connect((str(address), port))
        first = _ask(sock, version, LEAST[version])
        if first <= 0:
            return PathMtu(0, device, refused=first == _REFUSED)
        low, high, told = LEAST[version], device, False
        candidate = device
        while low < high:
            found = _ask(sock, version, candidate)
            if found > 0:
                low = candidate
            else:
                high = candidate - 1
            candidate = (low + high + 1) // 2
            if found == _TOLD:
                told = True
                known = sock.getsockopt(*_MTU[version])
                candidate = known if low < known <= high else candidate
        return PathMtu(low, device, told)


def _ask(sock: socket.socket, version: int, size: int) -> int:
    """`size` if a packet of that many bytes was answered, 0 if nothing came back, else _TOLD or _REFUSED."""
    nonce = os.urandom(16)
    data = _QUESTION + nonce + bytes(max(size - _HEADERS[version], _HEAD) - len(_QUESTION) - len(nonce))
    for _ in range(TRIES):
        try:
            sock.send(data)
            if answered(sock, WAIT, lambda answer: answer.startswith(_ANSWER + nonce)):
                return size
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return _TOLD
            if error.errno == errno.ECONNREFUSED:
                return _REFUSED
    return 0


def answered(sock: socket.socket, seconds: float, wanted: Callable[[bytes], bool]) -> bool:
    """Whether a datagram that is `wanted` comes within so many seconds; others are read and forgotten."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if wanted(sock.recv(2048)):
                return True
        except TimeoutError:
            return False
    return False
