# SPDX-License-Identifier: Apache-2.0
"""The doorbell: swarmkit's Watch, a gRPC call on the manager's control socket that announces every change of a task.

Any message means that the documented HTTP API should be read again, at most of which tasks is taken from it. Source of
names and framing: swarmkit's api/watch.proto; gRPC over HTTP/2 (PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from cryptography import x509

from mesh.errors import ProviderError
from mesh.providers.swarm.roots import trusted
from mesh.providers.swarm.watch_message import WatchMessages

KINDS: Final = ("task", "service", "node")
WATCH: Final = "/docker.swarmkit.v1.Watch/Watch"
_ACTIONS: Final = 0x07  # create | update | remove
_SERVER_NAME: Final = "swarm-manager"
_CONNECT_SECONDS: Final = 5.0
_RENEW_SECONDS: Final = 24 * 3600.0  # certificates rotate: connect again with the new one once a day
_PEM = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----\n(.*?)-----END \1-----", re.DOTALL)


def watch_request(kinds: tuple[str, ...] = KINDS) -> bytes:
    """WatchRequest as a gRPC message: for each kind an entry {1: kind, 2: actions}."""
    body = b""
    for kind in kinds:
        entry = bytes([0x0A, len(kind)]) + kind.encode() + bytes([0x10, _ACTIONS])
        body += bytes([0x0A, len(entry)]) + entry
    return b"\0" + len(body).to_bytes(4, "big") + body


def plain_key(pem: bytes) -> bytes:
    """The key without the header lines (kek-version, raft-dek) that swarm puts into its PEM and OpenSSL refuses.

    Raises:
        ProviderError: there is no key, or it is encrypted (autolock).
    """
    match = _PEM.search(pem.replace(b"\r\n", b"\n"))
    if not match:
        raise ProviderError("there is no private key in the file")
    kind, content = match[1], match[2]
    if b"ENCRYPTED" in kind or b"Proc-Type: 4,ENCRYPTED" in content:
        raise ProviderError("the manager's key is encrypted (swarm autolock)", remedy="changes are found by polling")
    lines = [line for line in content.splitlines() if line and b":" not in line]
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (kind, b"\n".join(lines), kind)


def tls_context(certificates: Path) -> ssl.SSLContext:
    """Client side with the node's own certificate, trusting the swarm's CA only. The key never reaches a disk.

    Raises:
        ProviderError: the files are not there or cannot be used.
    """
    try:
        certificate = (certificates / "swarm-node.crt").read_bytes()
        chain = x509.load_pem_x509_certificates(certificate)
        roots = trusted((certificates / "swarm-root-ca.crt").read_bytes(), chain)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default one gets stricter by the version
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=roots)
        context.set_alpn_protocols(["h2"])
        key = plain_key((certificates / "swarm-node.key").read_bytes())
        memory = os.memfd_create("mesh-key", os.MFD_CLOEXEC)
        try:
            os.write(memory, key + b"\n" + certificate)
            context.load_cert_chain(f"/proc/self/fd/{memory}", password=b"")  # never ask on the terminal
        finally:
            os.close(memory)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ProviderError(f"{error}", where=str(certificates), remedy="see docker_data_root") from None
    except ProviderError as error:
        raise ProviderError(error.message, where=str(certificates / "swarm-node.key"), remedy=error.remedy) from None
    return context


class _Call:
    """One server-streaming call on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))

    async def start(self, path: str, request: bytes) -> None:
        self._http.initiate_connection()
        stream = self._http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", path),
            (":authority", _SERVER_NAME),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self._http.send_headers(stream, headers)
        self._http.send_data(stream, request, end_stream=True)
        await self._flush()

    async def _flush(self) -> None:
        if data := self._http.data_to_send():
            self._writer.write(data)
            await self._writer.drain()

    async def data(self) -> AsyncGenerator[bytes, None]:
        """Empty when the server accepts the call, then gRPC frames as they arrive, in pieces of any size."""
        while data := await self._reader.read(65536):
            ring, ended, body = False, False, b""
            for event in self._http.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    _check_status({str(k): str(v) for k, v in event.headers})
                    ring = True
                elif isinstance(event, h2.events.DataReceived):
                    self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    ring, body = True, body + bytes(event.data)
                elif isinstance(event, h2.events.TrailersReceived):
                    _check_status({str(k): str(v) for k, v in event.headers})
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated):
                    ended = True  # after what came with it
            await self._flush()
            if ring:
                yield body
            if ended:
                raise ProviderError("the manager has ended the stream")
        raise ProviderError("the manager has closed the connection")


def _check_status(headers: dict[str, str]) -> None:
    if headers.get(":status", "200") != "200":
        raise ProviderError(f"the manager answers HTTP {headers[':status']}")
    if (status := headers.get("grpc-status", "0")) != "0":
        raise ProviderError(f"the manager refuses: {headers.get('grpc-message', '')} (gRPC status {status})")


async def watch(control_socket: Path, certificates: Path) -> AsyncGenerator[frozenset[str] | None, None]:
    """Ring once connected, then with every change of a task, service or node: ids of tasks where it was only those,
    None where it may have been anything.

    Raises:
        ProviderError: no connection, or it has ended. Connect again; changes may have been missed meanwhile.
    """
    async with contextlib.aclosing(frames(control_socket, certificates)) as pieces:
        announced = WatchMessages()
        async for piece in pieces:
            yield announced.hear(piece) if piece else None


async def frames(
    control_socket: Path, certificates: Path, path: str = WATCH, request: bytes | None = None
) -> AsyncGenerator[bytes, None]:
    """What a call answers: nothing once connected, then gRPC frames (a flag, 4 bytes of length, a message), in pieces
    of any size. See `watch` for errors.

    Args:
        path: the call; Watch if there is none.
        request: its message as gRPC has it.
    """
    where = str(control_socket)
    context = await asyncio.to_thread(tls_context, certificates)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(where, ssl=context, server_hostname=_SERVER_NAME)
    except TimeoutError:
        raise ProviderError("the manager does not answer in time", where=where) from None
    except OSError as error:  # ssl.SSLError is one
        raise ProviderError(f"{error}", where=where, remedy="see docker_exec_root") from None
    try:
        call = _Call(reader, writer)
        async with asyncio.timeout(_RENEW_SECONDS):
            await call.start(path, watch_request() if request is None else request)
            async for piece in call.data():
                yield piece
    except TimeoutError:
        raise ProviderError("connecting again with the current certificate", where=where) from None
    except (h2.exceptions.ProtocolError, ValueError) as error:
        raise ProviderError(f"no HTTP/2: {error}", where=where) from None
    except OSError as error:
        raise ProviderError(f"{error}", where=where) from None
    except ProviderError as error:
        raise ProviderError(error.message, where=where, remedy=error.remedy) from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
