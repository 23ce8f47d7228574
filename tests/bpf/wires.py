# SPDX-License-Identifier: Apache-2.0
"""Real traffic between namespaces: what the tests over real interfaces share."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator

from tests.support.polling import PATIENCE


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


@contextlib.contextmanager
def apart(label: str) -> Iterator[None]:
    """Run this thread in a network namespace of its own, which has nothing but a loopback device."""
    name = f"mesh{os.getpid()}-{label}"
    sh(f"ip netns add {name}")
    try:
        with inside(name):
            yield
    finally:
        sh(f"ip netns del {name}")


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
