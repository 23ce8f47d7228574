# SPDX-License-Identifier: Apache-2.0
"""The parts of `mesh bench` that need no daemon: targets, HTTP answers, loads on real sockets, what is shown."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Awaitable, Callable

import click
import pytest

from mesh.cli.bench import report
from mesh.cli.bench.http import HttpAnswer, request
from mesh.cli.bench.load import OUT_OF_PORTS, Call, End, Kind, Load, Tally, cause_of
from mesh.cli.bench.target import Behind, Target, connected, parse

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize(
    ("text", "kind", "host", "port", "path", "service"),
    [
        ("8080", None, "127.0.0.1", 8080, "/", ""),
        ("web", None, "", 0, "/", "web"),
        ("192.0.2.1:80", None, "192.0.2.1", 80, "/", ""),
        ("192.0.2.1:80/ready", Kind.HTTP, "192.0.2.1", 80, "/ready", ""),
        ("http://example", Kind.HTTP, "example", 80, "/", ""),
        ("https://example/a?b=c", Kind.HTTP, "example", 443, "/a?b=c", ""),
        ("tcp://[2001:db8::1]:5432", Kind.TCP, "2001:db8::1", 5432, "/", ""),
        ("udp://192.0.2.1:53", Kind.UDP, "192.0.2.1", 53, "/", ""),
    ],
)
def test_targets(text: str, kind: Kind | None, host: str, port: int, path: str, service: str) -> None:
    found = parse(text)
    assert (found.kind, found.host, found.port, found.path, found.service) == (kind, host, port, path, service)
    assert found.tls == text.startswith("https")


@pytest.mark.parametrize("text", ["ftp://example", "tcp://example", "http://example:99999", "http://:80"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse(text)


ANSWERS = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Who: a\r\n\r\nhello": (200, False),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n": (204, True),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n": (200, False),
    b"HTTP/1.1 404 \r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n0\r\nTrailer: 1\r\n\r\n": (404, False),
    b"HTTP/1.0 503 Busy\r\nContent-Length: 0\r\n\r\n": (503, True),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_whole_at_its_last_byte_however_it_is_cut(text: bytes) -> None:
    for cut in range(1, len(text)):
        answer = HttpAnswer()
        assert not answer.feed(text[:cut])
        assert answer.feed(text[cut:])
        assert (answer.status, answer.closing) == ANSWERS[text]
    answer = HttpAnswer()
    assert [answer.feed(text[n : n + 1]) for n in range(len(text))] == [False] * (len(text) - 1) + [True]


def test_an_answer_without_a_length_lasts_until_the_connection_ends() -> None:
    answer = HttpAnswer()
    assert not answer.end()
    assert not answer.feed(b"HTTP/1.1 200 OK\r\n\r\nhello")
    assert answer.end()


@pytest.mark.parametrize("text", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/2 200\r\n\r\n", b"H\x00"])
def test_what_is_not_http(text: bytes) -> None:
    with pytest.raises(ValueError, match="HTTP"):
        HttpAnswer().feed(text)


def test_who_answered() -> None:
    for by, told in ("x-who", "a"), ("body", "hello"), ("server", ""):
        answer = HttpAnswer(by)
        assert answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nX-Who: a\r\n\r\nhello\nyo")
        assert answer.told == told


def test_a_request_says_what_was_asked_for() -> None:
    text = request("h:1", "/x?y", ["host: other", "A: b"], keep=False)
    assert text.startswith(b"GET /x?y HTTP/1.1\r\n") and text.endswith(b"\r\n\r\n")
    assert b"host: other\r\nA: b\r\n" in text and b"Host: h:1" not in text and b"Connection: close" in text


async def measured(handler: Handler, call: Call, *, kept: bool, count: int = 40, seconds: float = 30) -> Tally:
    """A load on a server of our own."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        ends = [End("127.0.0.1", server.sockets[0].getsockname()[1])]
        return await Load(call, ends, connections=4, kept=kept, seconds=seconds, count=count).run()
    finally:
        server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1000):
        writer.write(data)
    writer.close()


@pytest.mark.parametrize("kept", [False, True])
async def test_a_load_does_what_was_counted(kept: bool) -> None:
    tally = await measured(echo, Call(Kind.TCP, b"x" * 5000, echo=True), kept=kept)
    assert (tally.operations, len(tally.latency), tally.received, tally.errors) == (40, 40, 200_000, Counter())
    assert len(tally.connect) == (4 if kept else 40)


async def test_a_load_ends_when_its_time_is_over() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    tally = await measured(silent, Call(Kind.TCP, b"x", timeout=60), kept=True, seconds=0.1)
    assert (tally.operations, tally.errors) == (0, Counter())
    tally = await measured(silent, Call(Kind.TCP, b"x", timeout=0.02), kept=True, count=4)
    assert (tally.operations, tally.errors) == (0, Counter({"no answer in time": 4}))


async def test_what_goes_wrong_is_named() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello")
        writer.close()

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"y" * len(await reader.read(100)))

    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    http = Call(Kind.HTTP, request("h", "/", (), keep=True))
    assert (await measured(cut, http, kept=True)).errors == Counter({"closed before the answer": 40})
    assert (await measured(lie, Call(Kind.TCP, b"xx", echo=True), kept=True)).errors == Counter(
        {"not what was sent": 40}
    )
    assert (await measured(lie, http, kept=True)).errors == Counter({"not HTTP": 40})
    tally = await measured(busy, http, kept=True)
    assert (tally.operations, tally.answers, tally.errors) == (40, Counter({"503": 40}), Counter({"status 503": 40}))
    nobody = Load(Call(Kind.TCP), [End("127.0.0.1", 1)], connections=1, kept=False, seconds=30, count=3)
    assert (await nobody.run()).errors == Counter({"refused": 3})
    assert cause_of(OSError(errno.EADDRNOTAVAIL, "")) == OUT_OF_PORTS
    assert cause_of(OSError(errno.ENETUNREACH, "")) == "ENETUNREACH"


async def test_datagrams() -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: object) -> None:
            self.transport.sendto(data, addr)  # type: ignore[attr-defined]

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
    try:
        ends = [End("127.0.0.1", transport.get_extra_info("sockname")[1])]
        call = Call(Kind.UDP, b"hello", echo=True)
        for kept in (False, True):
            tally = await Load(call, ends, connections=2, kept=kept, seconds=30, count=20).run()
            assert (tally.operations, tally.received, tally.errors) == (20, 100, Counter())
    finally:
        transport.close()


async def test_where_a_connection_really_ends_is_read_from_the_kernel() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    behind = Behind(ends=[End("127.0.0.1", port, "a"), End("::1", port, "b")])
    local = writer.get_extra_info("sockname")[1]
    assert connected([local], behind) == Counter(a=1)
    assert connected([local], Behind(ends=[End("127.0.0.2", port, "c")])) == Counter()
    assert connected([], behind) == Counter()
    writer.close()
    server.close()


def test_percentiles_are_of_what_was_measured() -> None:
    tally = Tally(operations=100, seconds=2.0, latency=[n / 1000 for n in range(1, 101)])
    shown = report.summary(tally)
    assert shown["per_second"] == 50
    assert shown["latency_ms"] == {"p50": 50, "p90": 90, "p99": 99, "p99.9": 100, "max": 100}
    assert report.summary(Tally())["latency_ms"] == {}


def test_a_histogram_holds_everything_in_bounded_space() -> None:
    sides = {"through": [10 ** (n / 100 - 6) for n in range(600)], "direct": [0.001]}
    lines = report.histogram(sides)
    assert len(lines) <= report.ROWS + 4 and max(map(len, lines)) <= 120
    shares = [float(line.split()[1].rstrip("%")) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert report.histogram({"through": []}) == []


def test_a_busy_client_is_said() -> None:
    busy = Tally(seconds=1.0, cpu=0.95)
    lines = report.advice({"through": busy, "direct": busy})
    assert lines and max(map(len, lines)) <= 120
    assert not report.advice({"through": Tally(seconds=1.0, cpu=0.5)})


def test_ipv6_is_written_in_brackets() -> None:
    assert Target(Kind.TCP, tls=False, host="::1", port=80).called == "[::1]:80"
