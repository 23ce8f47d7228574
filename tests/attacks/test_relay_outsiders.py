# SPDX-License-Identifier: Apache-2.0
"""Outsiders fill the relay's port with silent connections, and a member floods it: no memory, descriptor or loop is
left (item 9).

3,000 silent connections took 150 MB; 4,206 took all descriptors of the proxy engine, so that 1 of 30 clients was
served; a member's report of 31 MiB stopped a manager's loop for four seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mesh import listener
from mesh.cluster import wire
from mesh.datapath.proxy.engine import reserved_descriptors
from mesh.listener import Bounds, descriptor_pool
from tests.support.polling import PATIENCE, until
from tests.support.relay import Authority, calling, context_of, serving
from tests.support.sockets import closed

MOST = Bounds().most_waiting


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def silent(port: int, number: int, addresses: int) -> Iterator[list[socket.socket]]:
    """Connections from so many addresses that say nothing."""
    with contextlib.ExitStack() as stack:
        socks = []
        for i in range(number):
            sock = stack.enter_context(socket.socket())
            sock.bind((f"127.1.{i % addresses // 250}.{i % addresses % 250 + 1}", 0))
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            socks.append(sock)
        yield socks


@pytest.mark.parametrize(
    ("number", "addresses"), [(2 * MOST, MOST), (2 * Bounds().per_address, 1)], ids=["many addresses", "one address"]
)
async def test_silent_connections_are_bounded_and_members_get_in(tmp_path: Path, number: int, addresses: int) -> None:
    authority = Authority(tmp_path)
    member = context_of(authority.node("n1", role="swarm-worker"))
    async with serving(authority.node("m1"), "m1", "n1") as server:
        before = descriptors()
        with silent(server.port, number, addresses) as socks:
            await asyncio.sleep(0.3)  # what comes later only makes it better
            most = MOST if addresses > 1 else Bounds().per_address
            assert descriptors() - before - len(socks) <= most + 10
            async with calling(server.port, member):  # from yet another address
                await until(lambda: set(server.nodes) == {"n1"}, "a member gets in")
            if addresses == 1:
                assert sum(map(closed, socks)) >= number - most
        await until(lambda: descriptors() <= before + 10, "nothing is left")


async def test_whoever_says_nothing_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE", 0.3)
    authority = Authority(tmp_path)
    async with serving(authority.node("m1"), "m1") as server:
        with silent(server.port, 3, 3) as socks:
            await until(lambda: all(map(closed, socks)), "they are sent away")


def test_a_handshake_has_five_seconds() -> None:
    assert listener.HANDSHAKE <= 5


async def test_connections_of_one_certificate_are_bounded(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    member, other = (context_of(authority.node(name, role="swarm-worker")) for name in ("n1", "n2"))
    async with serving(authority.node("m1"), "m1", "n1", "n2") as server, contextlib.AsyncExitStack() as stack:
        for _ in range(Bounds().per_owner):
            await stack.enter_async_context(calling(server.port, member))
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await stack.enter_async_context(calling(server.port, member))
        await stack.enter_async_context(calling(server.port, other))
        await stack.aclose()
        async with calling(server.port, member):
            await until(lambda: set(server.nodes) == {"n1"}, "there is room again")


async def test_all_connections_together_are_bounded() -> None:
    """Whoever has many certificates."""
    names = itertools.count()
    bounds = Bounds(waiting=100, per_address=100, per_owner=100, total=10)
    bounded = listener.Listener(lambda ended: asyncio.Protocol(), lambda transport: f"n{next(names)}", bounds=bounds)
    port = bounded.start("127.0.0.1", 0)
    try:
        with silent(port, 25, 25) as socks:
            await until(lambda: sum(map(closed, socks)) == 15, "the others are sent away")
            assert (bounded.open, bounded.refused["total"]) == (10, 15)
    finally:
        bounded.end(lambda owner: True)
        bounded.stop()


async def longest_stop(server_busy: asyncio.Task[Any]) -> float:
    """Seconds for which the loop stood still at most until a task has ended."""
    loop, stops = asyncio.get_running_loop(), [0.0]

    def look(due: float) -> None:
        stops.append(loop.time() - due)
        following = loop.time() + 0.005
        loop.call_at(following, look, following)

    look(loop.time())
    await server_busy
    return max(stops)


def large(size: int) -> bytes:
    """A report of so many bytes, of as many entries as they can be."""
    verdict = wire.HealthReport("up")
    each = len(wire.encode(wire.Report({f"{i:07d}": verdict for i in range(1000)}))) / 1000
    return wire.encode(wire.Report({f"{i:07d}": verdict for i in range(int(size / each) - 100)}))


async def test_a_huge_report_is_not_taken(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    member = context_of(authority.node("n1", role="swarm-worker"))
    data = large(31 << 20)
    async with serving(authority.node("m1"), "m1", "n1") as server, calling(server.port, member) as socket:

        async def flood() -> None:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                await socket.send_bytes(data)
            while (await socket.receive()).type is not aiohttp.WSMsgType.CLOSED:
                pass
            await until(lambda: not server.nodes, "the connection has ended")

        assert await longest_stop(asyncio.create_task(flood())) < 1.5  # it was four


async def test_large_reports_leave_time_for_others(tmp_path: Path) -> None:
    """Reports as large as they may be, one after the other."""
    authority = Authority(tmp_path)
    member = context_of(authority.node("n1", role="swarm-worker"))
    data, taken = large(wire.MAX_REPORT), itertools.count()
    seen = 0

    def on_report(node: str, report: wire.Report) -> None:
        nonlocal seen
        seen = next(taken) + 1

    async with (
        serving(authority.node("m1"), "m1", "n1", on_report=on_report) as server,
        calling(server.port, member) as socket,
    ):
        for _ in range(3):
            await socket.send_bytes(data)
        task = asyncio.create_task(until(lambda: seen == 3, "all are taken"))
        assert await longest_stop(task) < 2.0  # 4 s, once, of a report of 31 MiB


async def test_many_digests_are_not_kept(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    member = context_of(authority.node("n1", role="swarm-worker"))
    async with serving(authority.node("m1"), "m1", "n1") as server, calling(server.port, member) as socket:
        digests = {f"{i}": "x" for i in range(wire.MAX_DIGESTS // 2 + 1)}
        await socket.send_bytes(wire.encode(wire.Report({}, digests)))
        await socket.send_bytes(wire.encode(wire.Report({}, {f"y{key}": "x" for key in digests}, changes=True)))
        async with asyncio.timeout(PATIENCE):
            while (message := await socket.receive()).type is not aiohttp.WSMsgType.CLOSE:
                assert message.type is aiohttp.WSMsgType.BINARY
        assert message.data == 1002
        await until(lambda: not server.nodes)
        assert server.refused["message"] == 1


@pytest.mark.parametrize("limit", [1024, 4096, 65536, 1 << 20])
def test_the_proxy_engine_leaves_descriptors_to_the_control_plane(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the relay and HTTP may take is not counted on by forwarding."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert reserved_descriptors(limit) >= descriptor_pool() + listener.HTTP + 32
    assert reserved_descriptors(limit) <= limit // 4
