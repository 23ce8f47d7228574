# SPDX-License-Identifier: Apache-2.0
"""Asks another node's kernel engine, through the tunnel, whether it takes packets of this node and gets answers back.

The question is a segment for a backend that does not exist, as bpf/include/mesh/geneve.h has it on the wire. The other
node counts it (`tunnel_no_backend`) and rejects it like every such segment: by a reset through the tunnel. This
node's programs take the tunnel's headers off, look at the proof, and leave the reset to a packet socket
(`tunnel_trial`). Where no programs run, another packet socket hears it as it comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from mesh import _abi, _linux
from mesh.datapath import packets, tunnel_proof
from mesh.datapath.paths.datagrams import bind
from mesh.datapath.paths.peer_probe import NO_ANSWER, NOBODY, answered
from mesh.model import Address, Protocol

TRIES: Final = 3
WAIT: Final = 0.5  # seconds for one answer
NO_RIGHT: Final = "not permitted"
_NOBODY: Final = ipaddress.IPv4Address(_abi.TRIAL_ADDRESS)
_ID: Final = _abi.GENEVE.offsets["id"]
_INNER: Final = _abi.GENEVE.size  # where the inner packet begins, after the outer UDP header, if there is no proof
_SEGMENT: Final = _INNER + packets.IP_SIZE[4]
_LOAD_WORD: Final = _linux.BPF_LD | _linux.BPF_W | _linux.BPF_ABS
_LOAD_HALF: Final = _linux.BPF_LD | _linux.BPF_H | _linux.BPF_ABS
_LOAD_BYTE: Final = _linux.BPF_LD | _linux.BPF_B | _linux.BPF_ABS
_IF_EQUAL: Final = _linux.BPF_JMP | _linux.BPF_JEQ | _linux.BPF_K
_RETURN: Final = _linux.BPF_RET | _linux.BPF_K


@dataclass(frozen=True, slots=True)
class Between:
    """What a question is proven by.

    Attributes:
        key: number and secret of the swarm's.
        own: this node's address, as the other one knows it.
        other: that of the other one.
    """

    key: tuple[int, bytes]
    own: Address
    other: Address


def question(port: int, nonce: int, between: Between | None = None) -> bytes:
    """The datagram's payload: from the inner port `port`, acknowledging `nonce`, which a reset repeats."""
    segment = packets.tcp(port, 0, packets.ACK, acknowledged=nonce)  # to port 0, where nobody can publish
    ident = _abi.Id(seed=secrets.token_bytes(8), protocol=Protocol.TCP)
    proof = b""
    if between is not None:
        flow = _abi.Flow(source=_NOBODY, destination=_NOBODY, source_port=port, protocol=Protocol.TCP)
        proof = tunnel_proof.write(between.key, between.own, between.other, flow, _abi.ID.pack(ident), time.time_ns())
    more = _abi.PROOF_WORDS * bool(proof)
    header = _abi.Geneve(
        words=_abi.GENEVE_WORDS + more,
        flags=_abi.GENEVE_CRITICAL,
        inner=packets.ETHER_TYPE[4],
        option_class=_abi.GENEVE_CLASS,
        option_type=_abi.GENEVE_TYPE,
        option_words=_abi.GENEVE_OPTION + more,
        id=ident,
    )
    return _abi.GENEVE.pack(header) + proof + packets.ip(_NOBODY, _NOBODY, Protocol.TCP, segment)


def _is_reply_in_tunnel(version: int, tunnel_port: int, port: int) -> Sequence[_linux.SockFilter]:
    """Classic BPF (linux/filter.h), from the outer IP header on: replies in the tunnel to the inner port `port`."""
    udp = packets.IP_SIZE[version]
    geneve = udp + _linux.UDP.size
    destination = geneve + _SEGMENT + _linux.TCP.offsets["destination"]
    plain, inner, keep, drop = 8, 9, 10, 11  # places in the program

    def only(at: int, value: int, *, then: int = 0, other: int = drop) -> _linux.SockFilter:
        """At a place: go on with `then` (0: the next one) if what was loaded is `value`, else with `other`."""
        return _linux.SockFilter(code=_IF_EQUAL, jt=max(then - at - 1, 0), jf=other - at - 1, k=value)

    return [
        _load(_LOAD_HALF, udp + _linux.UDP.offsets["dest"]),
        only(1, tunnel_port),
        _load(_LOAD_BYTE, geneve + _ID + _abi.ID.offsets["flags"]),
        only(3, _abi.TUNNEL_REPLY),
        _load(_LOAD_BYTE, geneve + _abi.GENEVE.offsets["words"]),
        only(5, _abi.GENEVE_WORDS, then=plain, other=6),
        _load(_LOAD_HALF, destination + _abi.PROOF.size),
        only(7, port, then=keep),
        _load(_LOAD_HALF, destination),
        only(inner, port),
        _linux.SockFilter(code=_RETURN, k=0xFFFF),
        _linux.SockFilter(code=_RETURN, k=0),
    ]


def _is_reply(port: int) -> Sequence[_linux.SockFilter]:
    """Likewise from the inner IP header on, as this node's programs leave it."""
    segment = packets.IP_SIZE[4]
    asked = (
        (_LOAD_WORD, _linux.IPV4.offsets["source"], _abi.TRIAL_ADDRESS),
        (_LOAD_HALF, segment + _linux.TCP.offsets["source"], 0),
        (_LOAD_HALF, segment + _linux.TCP.offsets["destination"], port),
    )
    drop = 2 * len(asked) + 1
    program: list[_linux.SockFilter] = []
    for load, at, value in asked:
        program += [
            _load(load, at),
            _linux.SockFilter(code=_IF_EQUAL, jf=drop - len(program) - 2, k=value),
        ]
    return [*program, _linux.SockFilter(code=_RETURN, k=0xFFFF), _linux.SockFilter(code=_RETURN, k=0)]


def _load(code: int, at: int) -> _linux.SockFilter:
    return _linux.SockFilter(code=code, k=at)


def nonce_of(version: int, answer: bytes) -> bytes:
    """What an answer, from the outer IP header on, repeats of its question."""
    outer = packets.IP_SIZE[version] + _linux.UDP.size
    if answer[outer : outer + 1] != bytes([_abi.GENEVE_WORDS]):
        outer += _abi.PROOF.size
    return inner_nonce_of(answer[outer + _INNER :])


def inner_nonce_of(answer: bytes) -> bytes:
    """Likewise from the inner IP header on."""
    sequence = packets.IP_SIZE[4] + _linux.TCP.offsets["sequence"]
    return answer[sequence : sequence + 4]


def listen(version: int, tunnel_port: int, port: int) -> socket.socket:
    """A packet socket that hears answers to questions from the inner port `port`, also where no programs run.

    It is asked about each packet that comes in, so it is for moments.

    Raises:
        PermissionError: it takes CAP_NET_RAW.
    """
    # A socket for one protocol would come after the programs.
    sock = _listen(_linux.ETH_P_ALL, _is_reply_in_tunnel(version, tunnel_port, port))
    sock.setsockopt(_linux.SOL_PACKET, _linux.PACKET_IGNORE_OUTGOING, 1)  # else the kernel copies all that is sent
    return sock


def listen_after_programs(port: int) -> socket.socket:
    """Likewise, of those that this node's programs leave to it. What they forward does not come by.

    Raises:
        PermissionError: it takes CAP_NET_RAW.
    """
    return _listen(_linux.ETH_P_IP, _is_reply(port))


def _listen(protocol: int, rows: Sequence[_linux.SockFilter]) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol))
    code = _linux.SOCKFILTER.pack_rows(rows)
    held = ctypes.create_string_buffer(code, len(code))
    program = _linux.SockFprog(len=len(rows), filter=ctypes.addressof(held))
    sock.setsockopt(socket.SOL_SOCKET, _linux.SO_ATTACH_FILTER, _linux.SOCKFPROG.pack(program))
    with contextlib.suppress(BlockingIOError):
        while True:  # what came before the filter
            sock.recv(1, socket.MSG_DONTWAIT)
    return sock


def ask_tunnel(address: Address, source: Address, tunnel_port: int, key: tuple[int, bytes] | None = None) -> str:
    """Whether a node takes tunnel packets from this one; empty: it does, and the answer came; else why not, in words.

    One of NO_RIGHT (it takes CAP_NET_RAW), NO_ANSWER, NOBODY or what the system says. Takes up to
    TRIES * WAIT seconds.

    Args:
        source: this node's address as the others know it, of the same IP version.
        key: number and secret of the swarm's, to prove the question by; a node of an earlier build does not take that.
    """
    version, port, nonce = address.version, 1024 + secrets.randbelow(64512), secrets.randbits(32)
    between = Between(key, source, address) if key is not None else None
    data, wanted = question(port, nonce, between), nonce.to_bytes(4, "big")
    with ExitStack() as stack:
        try:
            answers = stack.enter_context(listen(version, tunnel_port, port))
        except PermissionError:
            return NO_RIGHT
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        try:
            bind(sock, source)
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


def ask_tunnel_either_way(
    address: Address, source: Address, tunnel_port: int, keys: Sequence[tuple[int, bytes]]
) -> str:
    """As `ask_tunnel`, proven by the first of the swarm's keys; if nobody answers that, as earlier builds want it."""
    obstacle = ask_tunnel(address, source, tunnel_port, keys[0]) if keys else NO_ANSWER
    return ask_tunnel(address, source, tunnel_port) if obstacle == NO_ANSWER else obstacle
