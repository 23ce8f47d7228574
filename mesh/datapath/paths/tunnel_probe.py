# SPDX-License-Identifier: Apache-2.0
"""Asks another node's kernel engine, through the tunnel, whether it takes packets of this node and gets answers back.

The question is a segment for a backend that does not exist, as bpf/include/mesh/geneve.h has it on the wire. The other
node counts it (`tunnel_no_backend`) and rejects it like every such segment: by a reset through the tunnel. This
node's programs drop the reset (`tunnel_invalid`), for it belongs to no flow; a packet socket has seen it before them.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import secrets
import socket
from contextlib import ExitStack
from typing import Final

from mesh import _abi, _linux
from mesh.datapath import packets
from mesh.datapath.paths.peer_probe import NO_ANSWER, NOBODY, answered
from mesh.model import Address, Protocol

TRIES: Final = 3
WAIT: Final = 0.5  # seconds for one answer
NO_RIGHT: Final = "not permitted"
_NOBODY: Final = ipaddress.IPv4Address("192.0.0.8")  # an address that nothing has (RFC 7600), inside
_ID: Final = _abi.GENEVE.offsets["id"]
_INNER: Final = _abi.GENEVE.size  # where the inner packet begins, after the outer UDP header
_SEGMENT: Final = _INNER + packets.IP_SIZE[4]
_LOAD_HALF: Final = _linux.BPF_LD | _linux.BPF_H | _linux.BPF_ABS
_LOAD_BYTE: Final = _linux.BPF_LD | _linux.BPF_B | _linux.BPF_ABS
_IF_EQUAL: Final = _linux.BPF_JMP | _linux.BPF_JEQ | _linux.BPF_K
_RETURN: Final = _linux.BPF_RET | _linux.BPF_K


def question(port: int, nonce: int) -> bytes:
    """The datagram's payload: from the inner port `port`, acknowledging `nonce`, which a reset repeats."""
    segment = packets.tcp(port, 0, packets.ACK, acknowledged=nonce)  # to port 0, where nobody can publish
    header = _abi.Geneve(
        words=_abi.GENEVE_WORDS,
        flags=_abi.GENEVE_CRITICAL,
        inner=packets.ETHER_TYPE[4],
        option_class=_abi.GENEVE_CLASS,
        option_type=_abi.GENEVE_TYPE,
        option_words=_abi.GENEVE_OPTION,
        id=_abi.Id(seed=secrets.token_bytes(8), protocol=Protocol.TCP),
    )
    return _abi.GENEVE.pack(header) + packets.ip(_NOBODY, _NOBODY, Protocol.TCP, segment)


def _filter(version: int, tunnel_port: int, port: int) -> bytes:
    """Classic BPF (linux/filter.h), from the IP header on: replies in the tunnel to the inner port `port`."""
    udp = packets.IP_SIZE[version]
    geneve = udp + _linux.UDP.size
    program = [
        (_LOAD_HALF, 0, 0, udp + _linux.UDP.offsets["dest"]),
        (_IF_EQUAL, 0, 5, tunnel_port),  # go on if equal, else past the next five
        (_LOAD_BYTE, 0, 0, geneve + _ID + _abi.ID.offsets["flags"]),
        (_IF_EQUAL, 0, 3, _abi.TUNNEL_REPLY),
        (_LOAD_HALF, 0, 0, geneve + _SEGMENT + _linux.TCP.offsets["destination"]),
        (_IF_EQUAL, 0, 1, port),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    ]
    return _linux.SOCKFILTER.pack_rows(_linux.SockFilter(code=c, jt=jt, jf=jf, k=k) for c, jt, jf, k in program)


def nonce_of(version: int, answer: bytes) -> bytes:
    """What an answer, from the outer IP header on, repeats of its question."""
    outer = packets.IP_SIZE[version] + _linux.UDP.size
    sequence = outer + _SEGMENT + _linux.TCP.offsets["sequence"]
    return answer[sequence : sequence + 4]


def listen(version: int, tunnel_port: int, port: int) -> socket.socket:
    """A packet socket that hears answers to questions from the inner port `port`.

    Raises:
        PermissionError: it takes CAP_NET_RAW.
    """
    # A socket for one protocol would come after the programs.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_linux.ETH_P_ALL))
    code = _filter(version, tunnel_port, port)
    held = ctypes.create_string_buffer(code, len(code))
    program = _linux.SockFprog(len=len(code) // _linux.SOCKFILTER.size, filter=ctypes.addressof(held))
    sock.setsockopt(socket.SOL_SOCKET, _linux.SO_ATTACH_FILTER, _linux.SOCKFPROG.pack(program))
    return sock


def ask_tunnel(address: Address, source: Address, tunnel_port: int) -> str:
    """Whether a node takes tunnel packets from this one; empty: it does, and the answer came; else why not, in words.

    One of NO_RIGHT (it takes CAP_NET_RAW), NO_ANSWER, NOBODY or what the system says. Takes up to
    TRIES * WAIT seconds.

    Args:
        source: this node's address as the others know it, of the same IP version.
    """
    version, port, nonce = address.version, 1024 + secrets.randbelow(64512), secrets.randbits(32)
    data, wanted = question(port, nonce), nonce.to_bytes(4, "big")
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
