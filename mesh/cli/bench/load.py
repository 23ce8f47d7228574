# SPDX-License-Identifier: Apache-2.0
"""Bounded load from one process: exchanges with a service, timed one by one. Its limit is one core of Python."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import itertools
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from mesh.cli.bench.http import HttpAnswer

PAUSE: Final = 0.01  # seconds after an exchange that failed
OUT_OF_PORTS: Final = "no local port left"


class Kind(enum.Enum):
    """How the service is spoken to."""

    HTTP = "http"
    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked. Empty `request`: a connection is opened and closed. `echo`: the answer has to be the request.

    `by` names what tells HTTP backends apart: a header, or `body` for the first line of the answer. Seconds.
    """

    kind: Kind
    request: bytes = b""
    echo: bool = False
    by: str = ""
    timeout: float = 5.0
    tls: ssl.SSLContext | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """Where it is asked. `preface` is sent first on every connection."""

    host: str
    port: int
    name: str = ""
    preface: bytes = b""


@dataclass(slots=True)
class Tally:
    """What came of it. Times in seconds; `latency` of whole exchanges, `connect` of the handshakes in them."""

    operations: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    received: int = 0  # bytes of answers
    latency: list[float] = field(default_factory=list)
    connect: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)  # HTTP: by status
    told: Counter[str] = field(default_factory=Counter)  # HTTP: by what Call.by names

    def add(self, other: Tally) -> None:
        """Take another one's share in."""
        self.operations += other.operations
        self.seconds += other.seconds
        self.cpu += other.cpu
        self.received += other.received
        self.latency += other.latency
        self.connect += other.connect
        self.errors += other.errors
        self.answers += other.answers
        self.told += other.told


class AnswerError(Exception):
    """An answer that is none; the text is the kind of error."""


class Exchange(asyncio.Protocol, asyncio.DatagramProtocol):
    """One connection, or one datagram socket, with at most one request under way."""

    transport: asyncio.WriteTransport

    def __init__(self, call: Call, end: End) -> None:
        self._call = call
        self._end = end
        self._answer: asyncio.Future[None] | None = None
        self._got = b""
        self.http = HttpAnswer()
        self.received = 0
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # a datagram transport is used by sendto only
        if self._end.preface:
            self.transport.write(self._end.preface)

    def ask(self) -> asyncio.Future[None]:
        """Send the request. The future ends when the whole answer is there, or with what went wrong."""
        self._answer = asyncio.get_running_loop().create_future()
        self._got = b""
        self.received = 0
        if self._call.kind is Kind.HTTP:
            self.http = HttpAnswer(self._call.by)
        if self._call.kind is Kind.UDP:
            cast(asyncio.DatagramTransport, self.transport).sendto(self._call.request)
        else:
            self.transport.write(self._call.request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if not self._answer or self._answer.done():
            return
        if self._call.kind is Kind.HTTP:
            try:
                done = self.http.feed(data)
            except ValueError:
                self._fail(AnswerError("not HTTP"))
                return
        elif self._call.echo:
            self._got += data
            done = len(self._got) >= len(self._call.request)
            if done and self._got != self._call.request:
                self._fail(AnswerError("not what was sent"))
                return
        else:
            done = True
        if done:
            self._answer.set_result(None)

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.data_received(data)

    def error_received(self, exc: Exception) -> None:
        self._fail(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer and not self._answer.done():
            whole = self._call.kind is Kind.HTTP and exc is None and self.http.end()
            if whole:
                self._answer.set_result(None)
            else:
                self._fail(exc or AnswerError("closed before the answer"))

    def _fail(self, error: Exception) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)

    def close(self) -> None:
        self.closed = True
        if hasattr(self, "transport"):
            self.transport.abort() if self._answer and not self._answer.done() else self.transport.close()


async def dial(call: Call, end: End) -> Exchange:
    """Open one connection, or one datagram socket that talks to `end` only.

    Raises:
        OSError: it could not be opened; ssl.SSLError: nor made safe.
    """
    loop = asyncio.get_running_loop()
    if call.kind is Kind.UDP:
        return (await loop.create_datagram_endpoint(lambda: Exchange(call, end), remote_addr=(end.host, end.port)))[1]
    name = call.server_name if call.tls else None
    made = await loop.create_connection(
        lambda: Exchange(call, end), end.host, end.port, ssl=call.tls, server_hostname=name
    )
    return made[1]


class Load:
    """Exchanges over `connections` at once until `seconds` have passed or `count` are done.

    Args:
        kept: connections are kept and only the requests are timed; else every exchange has one of its own.
    """

    def __init__(
        self, call: Call, ends: Sequence[End], *, connections: int, kept: bool, seconds: float, count: int
    ) -> None:
        self._call = call
        self._ends = itertools.cycle(ends)
        self._connections = connections
        self._kept = kept
        self._seconds = seconds
        self._left = count
        self.tally = Tally()

    async def run(self) -> Tally:
        """All of it. What is under way when the time is over does not count."""
        began, cpu = time.perf_counter(), time.process_time()
        workers = [asyncio.ensure_future(self._work()) for _ in range(self._connections)]
        await asyncio.wait(workers, timeout=self._seconds)
        self.tally.seconds = time.perf_counter() - began
        self.tally.cpu = time.process_time() - cpu
        done, self.tally = self.tally, Tally()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        return done

    async def _work(self) -> None:
        flow: Exchange | None = None
        try:
            while self._left > 0:
                self._left -= 1
                began = time.perf_counter()
                try:
                    async with asyncio.timeout(self._call.timeout):
                        if not flow or flow.closed:
                            flow = await dial(self._call, next(self._ends))
                            opened = time.perf_counter()
                            self.tally.connect.append(opened - began)
                            began = opened if self._kept else began
                        if self._call.request:
                            await flow.ask()
                except (OSError, AnswerError, TimeoutError) as error:
                    self._failed(error)
                    if flow:
                        flow.close()
                    await asyncio.sleep(PAUSE)
                    continue
                self._succeeded(flow, time.perf_counter() - began)
                if not self._kept:
                    flow.close()
        finally:
            if flow:
                flow.close()

    def _succeeded(self, flow: Exchange, seconds: float) -> None:
        tally = self.tally
        tally.operations += 1
        tally.latency.append(seconds)
        tally.received += flow.received
        if self._call.kind is Kind.HTTP:
            tally.answers[str(flow.http.status)] += 1
            if flow.http.status >= 500:
                tally.errors[f"status {flow.http.status}"] += 1
            if self._call.by:
                tally.told[flow.http.told or "(does not say)"] += 1
            if self._kept and flow.http.closing:
                flow.close()

    def _failed(self, error: Exception) -> None:
        cause = cause_of(error)
        self.tally.errors[cause] += 1
        if cause == OUT_OF_PORTS:
            self._left = 0


def cause_of(error: Exception) -> str:
    """A few words for what went wrong."""
    if isinstance(error, AnswerError):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return "TLS: " + (error.reason or "failed").lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError):
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return OUT_OF_PORTS
        with contextlib.suppress(TypeError, KeyError):
            known = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset"}
            return known.get(error.errno or 0) or errno.errorcode[error.errno or 0]
    return type(error).__name__
