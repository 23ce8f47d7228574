# SPDX-License-Identifier: Apache-2.0
"""Clients that only call, whatever becomes of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

from tests.support.lab.netns import Namespace

KEPT = 4.0  # seconds: a refusal is told when the client's kernel asks a second time


class Callers:
    """Connections from a namespace to all these addresses, five a second to each, until closed."""

    def __init__(self, client: Namespace, addresses: Sequence[tuple[str, int]]) -> None:
        self.client, self.addresses = client, addresses
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        calls: list[tuple[float, socket.socket]] = []
        with self.client.entered():
            while not self.stop.wait(0.2):
                for address in self.addresses:
                    call = socket.socket()
                    call.setblocking(False)
                    call.connect_ex(address)
                    calls.append((time.monotonic() + KEPT, call))
                for _, call in [row for row in calls if row[0] < time.monotonic()]:
                    call.close()
                calls = [row for row in calls if row[0] >= time.monotonic()]
        for _, call in calls:
            call.close()

    def close(self) -> None:
        self.stop.set()
        self.thread.join()


class Sender:
    """Sends datagrams every 20 ms from one port, whatever comes back; from the next one over IPv6."""

    def __init__(self, namespace: Namespace, host: str, called: int, port: int = 40000) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with namespace.entered():
            self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.bind(("::" if ":" in host else "0.0.0.0", port + (":" in host)))
        self.sock.settimeout(0.02)
        self.place = host, called
        self.last = b""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError):
                self.sock.sendto(b"x", self.place)
            with contextlib.suppress(OSError):
                self.last = self.sock.recv(100)
            self.ended.wait(0.02)

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.sock.close()
