# SPDX-License-Identifier: Apache-2.0
"""One probe of one address: is a TCP connection accepted, and does HTTP answer with status 200 to 399."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

from mesh import netaddr
from mesh.model import Address, HealthCheck, ProbeKind

_LINE_MOST: Final = 1024  # bytes of a status line
# PROXY protocol v2, command LOCAL: what a health checker says to a server that insists on it. (HAProxy, 2.2.)
PROXY_LOCAL: Final = b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"


class ProbeError(Exception):
    """A failed probe, with the reason. `refused`: nothing listens on the port, as is usual just after a start."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


async def probe(address: Address, port: int, check: HealthCheck, preface: bytes = b"") -> None:
    """Probe once, within `check.timeout`.

    Args:
        preface: what to say before all else.

    Raises:
        ProbeError: with the reason, address and port.
    """
    place = netaddr.join_host_port(address, port)
    try:
        async with asyncio.timeout(check.timeout):
            await _attempt(address, port, check, place, preface)
    except TimeoutError:
        raise ProbeError(f"{place}: no answer within {check.timeout:g} s") from None
    except ConnectionRefusedError:
        raise ProbeError(f"{place}: connection refused", refused=True) from None
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise ProbeError(f"{place}: {reason}") from None


async def _attempt(address: Address, port: int, check: HealthCheck, place: str, preface: bytes) -> None:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (str(address), port))
        if preface:
            await loop.sock_sendall(connection, preface)
        if check.kind is ProbeKind.HTTP:
            await _ask(connection.dup(), check.path, place)


async def _ask(connection: socket.socket, path: str, place: str) -> None:
    reader, writer = await asyncio.open_connection(sock=connection, limit=_LINE_MOST)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {place}\r\nUser-Agent: mesh-health\r\nAccept: */*\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        try:
            line = await reader.readline()
        except ValueError:  # longer than any status line
            raise ProbeError(f"{place}: the answer is not HTTP") from None
        words = line.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
            raise ProbeError(f"{place}: the answer is not HTTP" if line else f"{place}: closed without an answer")
        if not 200 <= int(words[1]) < 400:
            raise ProbeError(f"{place}: HTTP status {int(words[1])} of {path}")
    finally:
        with contextlib.suppress(OSError):
            writer.transport.abort()
