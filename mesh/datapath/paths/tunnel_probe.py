# SPDX-License-Identifier: Apache-2.0
"""Asks another node's kernel engine, through the tunnel, whether it takes packets of this node and gets answers back.

The question is a segment for a backend that does not exist, as bpf/include/mesh/geneve.h has it on the wire. The other
node counts it (`tunnel_no_backend`) and rejects it like every such segment: by a reset through the tunnel. This
node's programs drop the reset (`tunnel_invalid`), for it belongs to no flow; a packet socket has seen it before them.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import struct
from contextlib import ExitStack
from typing import Final

from mesh.datapath.kernel.codec import NETWORK
from mesh.datapath.paths.peer_probe import NO_ANSWER, NOBODY, answered
from mesh.model import Address, Protocol

TRIES: Final = 3
WAIT: Final = 0.5  # seconds for one answer
NO_RIGHT: Final = "not permitted"
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_ETH_P_ALL: Final = 3  # a socket for one protocol would come after the programs
_GENEVE: Final = struct.Struct(">BBHIHBB")  # and its one option: struct mesh_geneve without the id
_HEAD: Final = _GENEVE.pack(4, 0x40, 0x0800, 0, 0xFF6D, 0x81, 3)
_ID: Final = 12  # bytes, the last of them flags
_REPLY: Final = 1  # MESH_TUNNEL_REPLY
_NOBODY: Final = bytes((192, 0, 0, 8))  # an address that nothing has (RFC 7600), inside
_IP: Final = {4: 20, 6: 40}  # bytes of the outer header
_UDP: Final = 8
_ACK: Final = 0x10


def question(port: int, nonce: int) -> bytes:
    """The datagram's payload: from the inner port `port`, acknowledging `nonce`, which a reset repeats."""
    tcp = NETWORK.tcp.pack(port, 0, 0, nonce, 0x50, _ACK, 0, 0, 0)  # to port 0, where nobody can publish
    ip = NETWORK.ipv4.pack(0x45, 0, 20 + len(tcp), 0, 0, 64, Protocol.TCP, 0, _NOBODY, _NOBODY)
    ident = struct.pack(">8sHBB", secrets.token_bytes(8), 0, Protocol.TCP, 0)
    return _HEAD + ident + ip + tcp


def _filter(version: int, tunnel_port: int, port: int) -> bytes:
    """Classic BPF (linux/filter.h), from the IP header on: replies in the tunnel to the inner port `port`."""
    udp = _IP[version]
    inner = udp + _UDP + len(_HEAD) + _ID
    program = [
        (0x28, 0, 0, udp + 2),  # load the destination port
        (0x15, 0, 5, tunnel_port),  # go on if equal, else past the next five
        (0x30, 0, 0, inner - 1),
        (0x15, 0, 3, _REPLY),
        (0x28, 0, 0, inner + 20 + 2),
        (0x15, 0, 1, port),
        (0x06, 0, 0, 0xFFFF),
        (0x06, 0, 0, 0),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def nonce_of(version: int, answer: bytes) -> bytes:
    """What an answer, from the outer IP header on, repeats of its question."""
    sequence = _IP[version] + _UDP + len(_HEAD) + _ID + 20 + 4
    return answer[sequence : sequence + 4]


def listen(version: int, tunnel_port: int, port: int) -> socket.socket:
    """A packet socket that hears answers to questions from the inner port `port`.

    Raises:
        PermissionError: it takes CAP_NET_RAW.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    code = ctypes.create_string_buffer(_filter(version, tunnel_port, port))
    count = (len(code) - 1) // 8
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", count, ctypes.addressof(code)))
    return sock


def ask_tunnel(address: Address, source: Address, tunnel_port: int) -> str:
    """Whether a node takes tunnel packets from this one; empty: it does, and the answer came; else why not, in words.

    One of NO_RIGHT (it takes CAP_NET_RAW), NO_ANSWER, NOBODY or what the system says. Takes up to
    TRIES * WAIT seconds.

    Args:
        source: this node's address as the others know it, of the same IP version.
    """
    version, port, nonce = address.version, 1024 + secrets.randbelow(64512), secrets.randbits(32)
    data, wanted = question(port, nonce), struct.pack(">I", nonce)
    with ExitStack() as stack:
        try:
            answers = stack.enter_context(listen(version, tunnel_port, port))
        except PermissionError:
            return NO_RIGHT
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        try:
            sock.bind((str(source), 0))
            sock.connect((str(address), tunnel_port))
            for _ in range(TRIES):
                sock.send(data)
                if answered(answers, WAIT, lambda answer: nonce_of(version, answer) == wanted):
                    return ""
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except ConnectionRefusedError:
            return NOBODY
        except OSError as failed:
            return failed.strerror or str(failed)
    return os.strerror(error) if error else NO_ANSWER
