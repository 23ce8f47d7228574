# SPDX-License-Identifier: Apache-2.0
"""Real traffic between namespaces: what the tests over real interfaces share."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import socket
import struct
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from tests.support.polling import PATIENCE

IFLA_GSO_MAX_SIZE: Final = 41  # linux/if_link.h
IFLA_GSO_IPV4_MAX_SIZE: Final = 63
RTM_NEWLINK: Final = 16
NLM_F_REQUEST_ACK: Final = 5
SO_RCVBUFFORCE: Final = 33
ETH_P_ALL: Final = 3


def sh(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Run this thread in a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    assert libc.setns(there, 0x40000000) == 0
    try:
        yield
    finally:
        assert libc.setns(here, 0x40000000) == 0
        os.close(here)
        os.close(there)


def allow_big(namespace: str, device: str, size: int = 200_000) -> None:
    """Segments of so many bytes (BIG TCP), which `ip` of Debian 12 cannot set for IPv4."""
    with inside(namespace), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        limits = b"".join(struct.pack("=HHI", 8, kind, size) for kind in (IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE))
        body = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(device), 0, 0) + limits
        netlink.send(struct.pack("=IHHII", 16 + len(body), RTM_NEWLINK, NLM_F_REQUEST_ACK, 1, 0) + body)
        assert struct.unpack_from("=i", netlink.recv(1000), 16) == (0,)


@contextlib.contextmanager
def largest_frames(namespace: str) -> Iterator[dict[str, int]]:
    """The largest frame of each device meanwhile, once it is over."""
    found: dict[str, int] = defaultdict(int)
    with inside(namespace):
        heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with heard:
        heard.setblocking(False)
        heard.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        yield found
        with contextlib.suppress(BlockingIOError):
            while True:
                length, (device, *_) = heard.recvfrom_into(bytearray(1), 0, socket.MSG_TRUNC)
                found[device] = max(found[device], length)


def bulk(client: str, called: tuple[str, int], task: str, *, port: int = 8080, size: int = 2 << 20) -> str:
    """Random bytes from one namespace to `called` and back from another, where a task listens; each byte compared.

    Returns:
        Whom the task takes for its client.
    """
    data = os.urandom(size)
    got: list[tuple[str, str]] = []
    version = family(called[0])
    with inside(task):
        server = socket.create_server(("::" if version == socket.AF_INET6 else "0.0.0.0", port), family=version)
    with inside(client):
        caller = socket.socket(version)
    with server, caller:
        server.settimeout(PATIENCE)
        caller.settimeout(PATIENCE)

        def serve() -> None:
            connection, address = server.accept()
            with connection:
                connection.settimeout(PATIENCE)
                received = bytearray()
                while len(received) < len(data) and (chunk := connection.recv(1 << 20)):
                    received += chunk
                got.append((address[0], hashlib.sha256(received).hexdigest()))
                connection.sendall(received)

        thread = threading.Thread(target=serve)
        thread.start()
        caller.connect(called)
        caller.sendall(data)
        back = bytearray()
        while len(back) < len(data) and (chunk := caller.recv(1 << 20)):
            back += chunk
        thread.join(PATIENCE)
    assert back == data
    ((seen, digest),) = got
    assert digest == hashlib.sha256(data).hexdigest()
    return seen
