# SPDX-License-Identifier: Apache-2.0
"""Questions by datagram to many nodes at once, on the event loop: one socket for all that are asked from one address.

An answer is told from all else by the nonce of its question. A host that refuses says so by ICMP, which the kernel
keeps in the socket's error queue (ip(7), IP_RECVERR).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from mesh import _linux
from mesh.datapath.paths.peer_probe import NO_ANSWER, NOBODY
from mesh.model import Address

_RECVERR: Final = {4: (socket.IPPROTO_IP, _linux.IP_RECVERR), 6: (socket.IPPROTO_IPV6, _linux.IPV6_RECVERR)}
_LONGEST: Final = 2048


def bind(sock: socket.socket, source: Address | None) -> None:
    """Ask from this address; where no interface has it, because NAT gives it to what this node sends, from any.

    Raises:
        OSError: any other reason.
    """
    try:
        sock.bind((str(source) if source is not None else "", 0))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise


class Questions:
    """Asks from one address of this node, by one socket, which is made when it is first needed.

    Args:
        version: of IP.
        source: this node's address as others know it, if it is one of its own; None: any.
        port: that is asked, the same on all nodes.
        question: the datagram for a nonce of 4 bytes, to an address.
        nonce_of: the nonce that an answer repeats; None: no answer of ours.
        listener: a socket by which answers come in, where that is another than they are asked by; None: that one.
    """

    def __init__(
        self,
        version: int,
        source: Address | None,
        port: int,
        question: Callable[[bytes, Address], bytes],
        nonce_of: Callable[[bytes], bytes | None],
        listener: socket.socket | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._version, self._port = version, port
        self._question, self._nonce_of = question, nonce_of
        self._waiting: dict[bytes, asyncio.Future[str]] = {}
        self._asked: dict[str, set[bytes]] = {}  # open nonces, by address
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        self._sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._sock.setsockopt(*_RECVERR[version], 1)
            bind(self._sock, source)
        except OSError:
            self._sock.close()
            raise
        self._listener = listener
        self._loop.add_reader(self._sock, self._on_socket)
        if listener is not None:
            listener.setblocking(False)
            self._loop.add_reader(listener, self._on_answer, listener)

    async def ask(self, address: Address, wait: float, tries: int) -> str:
        """Ask until an answer comes, `tries` times, `wait` seconds apart.

        Returns:
            Empty: an answer came. Else NOBODY, NO_ANSWER or what the system says.
        """
        nonce, name = os.urandom(4), str(address)
        answer: asyncio.Future[str] = self._loop.create_future()
        self._waiting[nonce] = answer
        self._asked.setdefault(name, set()).add(nonce)
        try:
            for _ in range(tries):
                try:
                    self._sock.sendto(self._question(nonce, address), (name, self._port))
                except BlockingIOError:
                    pass  # the next try
                except OSError as error:
                    if error.errno != errno.ECONNREFUSED:  # that of another node, which the error queue has told
                        return error.strerror or str(error)
                done, _ = await asyncio.wait([answer], timeout=wait)
                if done:
                    return answer.result()
            self._on_answer(self._listener or self._sock)  # it may be there, and this process be late
            return answer.result() if answer.done() else NO_ANSWER
        finally:
            del self._waiting[nonce]
            self._asked[name].discard(nonce)
            if not self._asked[name]:
                del self._asked[name]

    def _on_socket(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                _, messages, _, to = self._sock.recvmsg(_LONGEST, 512, socket.MSG_ERRQUEUE)
                for level, kind, data in messages:
                    if (level, kind) == _RECVERR[self._version] and len(data) >= _linux.SOCKEXTENDEDERR.size:
                        self._on_error(to[0].partition("%")[0], _linux.SOCKEXTENDEDERR.unpack_from(data, 0).ee_errno)
        self._on_answer(self._sock)

    def _on_error(self, name: str, number: int) -> None:
        said = NOBODY if number == errno.ECONNREFUSED else os.strerror(number)
        for nonce in self._asked.get(name, ()):
            self._settle(nonce, said)

    def _on_answer(self, sock: socket.socket) -> None:
        while True:
            try:
                data = sock.recv(_LONGEST)
            except BlockingIOError:
                return
            except OSError:  # an error that the queue has told, too
                if sock.fileno() < 0:  # closed while a question was open
                    return
                continue
            nonce = self._nonce_of(data)
            if nonce is not None:
                self._settle(nonce, "")

    def _settle(self, nonce: bytes, said: str) -> None:
        answer = self._waiting.get(nonce)
        if answer is not None and not answer.done():
            answer.set_result(said)

    def close(self) -> None:
        """Close the sockets; questions that are open get no answer."""
        for sock in filter(None, (self._sock, self._listener)):
            self._loop.remove_reader(sock)
            sock.close()
