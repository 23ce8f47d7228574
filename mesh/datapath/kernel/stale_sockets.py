# SPDX-License-Identifier: Apache-2.0
"""Ends connected UDP sockets of this node's processes whose task is gone or elsewhere (sock_diag(7), SOCK_DESTROY).

The socket hooks connect a socket straight to a task, and the kernel asks nobody when it sends. The task's address may
go to a task of another service: so the socket is ended before. Its process gets an error (ECONNABORTED or, sending,
EDESTADDRREQ), and its next connect finds a new task. TCP needs none of this, because another task's kernel resets the
connection.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator, Mapping
from typing import Final

from mesh import _abi, _bpf, netaddr
from mesh import _linux as nl
from mesh.datapath.netlink import Netlink, number
from mesh.model import Address, Protocol

ALL_STATES: Final = 0xFFFFFFFF
GONE: Final = (errno.ENOENT, errno.ESTALE)  # the socket was closed meanwhile


class StaleSockets:
    """Finds and ends them. Not thread-safe; works in the network namespace of the thread that makes it.

    Args:
        peers: the map mesh_udp_revnat, which has every socket that the hooks have connected.
        backends: what the maps hold, by owner id.

    Attributes:
        problem: why sockets cannot be ended; empty: they can.
    """

    def __init__(self, peers: _bpf.Map, backends: Mapping[int, _abi.Backend]) -> None:
        self._peers, self._backends = peers, backends
        self._netlink = Netlink(nl.NETLINK_SOCK_DIAG)
        self.problem = ""

    def close(self) -> None:
        self._netlink.close()

    def end(self) -> int:
        """End all of them. Returns how many."""
        ended = 0
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                for found in [m for m in self._connected(family) if self._is_stale(m)]:
                    ended += self._destroy(found)
        except OSError as error:
            self.problem = (
                f"connected UDP sockets of local processes do not leave tasks that are gone: {error.strerror}"
            )
        else:
            self.problem = ""
        return ended

    def _connected(self, family: int) -> Iterator[nl.DiagMessage]:
        request = nl.DiagRequest(sdiag_family=family, sdiag_protocol=Protocol.UDP, idiag_states=ALL_STATES)
        for body in self._netlink.request(nl.SOCK_DIAG_BY_FAMILY, nl.NLM_F_DUMP, nl.DIAGREQUEST.pack(request)):
            message = nl.DIAGMESSAGE.unpack_from(body)
            if message.id.idiag_dport:
                yield message

    def _is_stale(self, found: nl.DiagMessage) -> bool:
        value = self._peers.lookup(peer_key(found))
        if value is None:
            return False
        entry = _abi.SK_REVNAT.unpack(value)
        backend = self._backends.get(entry.owner)
        if backend is None or backend.state == _abi.BACKEND_FREE or backend.epoch != entry.epoch:
            return True
        return address_of(found) != backend.address

    def _destroy(self, found: nl.DiagMessage) -> bool:
        request = nl.DiagRequest(
            sdiag_family=found.idiag_family, sdiag_protocol=Protocol.UDP, idiag_states=ALL_STATES, id=found.id
        )
        try:
            list(self._netlink.request(nl.SOCK_DESTROY, nl.NLM_F_ACK, nl.DIAGREQUEST.pack(request)))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        self._peers.delete(peer_key(found))
        return True


def address_of(found: nl.DiagMessage) -> Address:
    """Where a socket is connected to."""
    raw = found.id.idiag_dst
    return ipaddress.IPv4Address(raw[:4]) if found.idiag_family == socket.AF_INET else netaddr.unpack(raw)


def peer_key(found: nl.DiagMessage) -> bytes:
    """The key of a connected socket in mesh_udp_revnat."""
    address = address_of(found)
    low, high = (number(found.id.idiag_cookie[at : at + 4]) for at in (0, 4))
    return _abi.UDP_PEER.pack(_abi.UdpPeer(cookie=high << 32 | low, address=address, port=found.id.idiag_dport))
