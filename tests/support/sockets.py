# SPDX-License-Identifier: Apache-2.0
"""What a socket without blocking says of its other end, and datagrams of all sizes."""

from __future__ import annotations

import os
import socket
from typing import Final

from tests.support.polling import PATIENCE

IP_MTU_DISCOVER: Final = 10  # linux/in.h
IP_PMTUDISC_PROBE: Final = 3
IP_PMTUDISC_OMIT: Final = 5


def closed(sock: socket.socket) -> bool:
    """Whether the other end has closed or reset it, and has said nothing that is still to be read."""
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def omitting(version: int = 4) -> socket.socket:
    """A datagram socket that never sets DF and ignores what ICMP says: routers have to cut what it sends."""
    found = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    found.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_OMIT)
    found.settimeout(PATIENCE)
    return found


def assert_echo(client: socket.socket, size: int) -> None:
    """Send so many random bytes from a connected datagram socket; they end the answer."""
    data = os.urandom(size)
    client.send(data)
    answer = client.recv(65536)
    assert answer[-size:] == data, (size, len(answer))
