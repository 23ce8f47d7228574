# SPDX-License-Identifier: Apache-2.0
"""health: damping, probes against real sockets, and what the monitor makes of both."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.datapath.base import Signal
from mesh.datapath.counters import Failure
from mesh.health import monitor as monitors
from mesh.health.damping import Damping
from mesh.health.monitor import Monitor
from mesh.health.probe import ProbeError, probe
from mesh.model import (
    Backend,
    Health,
    HealthCheck,
    HealthView,
    Intent,
    Inventory,
    ProbeKind,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
)
from tests.support.polling import settled, until
from tests.support.ports import free_port

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
FAST = HealthCheck(interval=0.02, timeout=5.0, rise=2, fall=3)
HTTP = replace(FAST, kind=ProbeKind.HTTP, path="/ready")


@contextlib.asynccontextmanager
async def listening(answer: bytes = b"", port: int = 0) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def of(*ports: int, check: HealthCheck = FAST, protocol: Protocol = Protocol.TCP, **changes: object) -> Inventory:
    published = tuple(PublishedPort(8000 + i, port, protocol) for i, port in enumerate(ports))
    backend = replace(Backend("a", "web", "n", LOOPBACK), **changes)  # type: ignore[arg-type]
    return Inventory((Service("web", "web", published, ServiceOptions(health=check)),), (backend,))


@contextlib.asynccontextmanager
async def watching(inventory: Inventory) -> AsyncIterator[Monitor]:
    seen: list[HealthView] = []
    monitor = Monitor(seen.append)
    monitor.watch(inventory)
    task = asyncio.create_task(monitor.run())
    try:
        yield monitor
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert not seen or seen[-1] == monitor.view


async def test_tcp_probe() -> None:
    async with listening() as port:
        await probe(LOOPBACK, port, FAST)
    with pytest.raises(ProbeError, match="connection refused") as caught:
        await probe(LOOPBACK, free_port(), FAST)
    assert caught.value.refused


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 304 Not Modified\r\n\r\n", ""),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "HTTP status 503 of /ready"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"x" * 5000, "not HTTP"),
        (b"\r\n", "not HTTP"),
    ],
)
async def test_http_probe(answer: bytes, reason: str) -> None:
    async with listening(answer) as port:
        if reason:
            with pytest.raises(ProbeError, match=reason) as caught:
                await probe(LOOPBACK, port, HTTP)
            assert not caught.value.refused
        else:
            await probe(LOOPBACK, port, HTTP)


async def test_a_probe_without_an_answer_ends_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ProbeError, match="no answer within"):
            await probe(LOOPBACK, silent.getsockname()[1], replace(HTTP, timeout=0.05))


def test_a_fresh_backend_that_refuses_is_down_at_once_and_up_at_its_first_good_probe() -> None:
    damping = Damping()
    damping.failed(FAST, "refused", refused=True)
    assert (damping.verdict, damping.starting) == (Health.DOWN, True)
    damping.succeeded(FAST)
    assert (damping.verdict, damping.reason, damping.starting) == (Health.UP, "", False)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4), st.integers(1, 4))
def test_a_verdict_changes_after_rise_or_fall_in_a_row(results: list[bool], rise: int, fall: int) -> None:
    check, damping = replace(FAST, rise=rise, fall=fall), Damping()
    damping.succeeded(check)
    assert damping.verdict is Health.UP
    history = [True] * rise
    for good in results:
        before = damping.verdict
        damping.succeeded(check) if good else damping.failed(check, "bad")
        history.append(good)
        if damping.verdict is not before:
            row = rise if good else fall
            assert history[-row:] == [good] * row
        elif before is Health.UP:
            assert any(history[-fall:])
        else:
            assert not all(history[-rise:])


def test_traffic_alone_never_turns_a_verdict() -> None:
    damping = Damping()
    damping.succeeded(FAST)
    damping.suspected(FAST, 1000)
    assert damping.verdict is Health.UP
    damping.failed(FAST, "refused")
    assert damping.verdict is Health.DOWN


async def test_up_down_and_up_again() -> None:
    async with listening() as port, watching(of(port)) as monitor:
        await until(lambda: monitor.view.of("a") is Health.UP)
    port = free_port()
    async with watching(of(port)) as monitor:
        await until(lambda: monitor.view.of("a") is Health.DOWN)
        assert "nothing has listened there so far" in monitor.view.reasons["a"]
        async with listening(port=port):
            await until(lambda: monitor.view.of("a") is Health.UP)
            assert not monitor.view.reasons
        await until(lambda: monitor.view.of("a") is Health.DOWN)
        assert "connection refused" in monitor.view.reasons["a"]


async def test_one_port_of_several_is_enough() -> None:
    async with listening() as port, watching(of(free_port(), port)) as monitor:
        await until(lambda: monitor.view.of("a") is Health.UP)


@pytest.mark.parametrize(
    "inventory",
    [
        of(free_port(), protocol=Protocol.UDP),
        of(free_port(), check=replace(FAST, kind=ProbeKind.OFF)),
        of(free_port(), local=False),
        of(free_port(), address=None),
        of(free_port(), intent=Intent.DRAINING),
        of(free_port(), ready=False),
        of(),
    ],
)
async def test_who_is_not_probed_stays_unknown(inventory: Inventory) -> None:
    async with watching(inventory) as monitor:
        await asyncio.sleep(0.1)
        assert monitor.view.of("a") is Health.UNKNOWN
        assert monitor.counts == {"ok": 0, "failed": 0}


async def test_the_gone_are_forgotten_and_the_paused_keep_their_verdict() -> None:
    async with listening() as port, watching(of(port)) as monitor:
        await until(lambda: monitor.view.of("a") is Health.UP)
        monitor.watch(of(port, intent=Intent.DRAINING))
        probes = await settled(lambda: monitor.counts["ok"], 0.2)  # one may have been under way
        assert monitor.view.of("a") is Health.UP
        monitor.watch(of(port))
        await until(lambda: monitor.counts["ok"] > probes)
        monitor.watch(Inventory())
        assert monitor.view == HealthView()


async def test_a_signal_of_traffic_is_followed_by_a_probe_at_once() -> None:
    slow = replace(FAST, interval=3600.0)
    async with listening() as port, watching(of(port, check=slow)) as monitor:
        await until(lambda: monitor.view.of("a") is Health.UP)
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(contextlib.AsyncExitStack())
        await server.enter_async_context(listening(port=port))
        monitor = await stack.enter_async_context(watching(of(port, check=slow)))
        await until(lambda: monitor.view.of("a") is Health.UP)
        await server.aclose()
        monitor.signals([Signal("a", ok=True, cause=None, count=5), Signal("b", False, Failure.REFUSED, 9)])
        monitor.signals([Signal("a", False, Failure.RESET, 9)])  # says nothing of whether it can be reached
        assert monitor.counts["failed"] == 0
        monitor.signals([Signal("a", False, Failure.REFUSED, 9)])
        await until(lambda: monitor.view.of("a") is Health.DOWN)


async def test_thousands_are_probed_a_bounded_number_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "RATE", 1e6)
    under_way = most = 0

    async def counted(*args: object) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1

    monkeypatch.setattr(monitors, "probe", counted)
    service = of(80, check=replace(FAST, interval=3600.0)).services
    many = Inventory(service, tuple(Backend(f"b{n:05}", "web", "n", LOOPBACK) for n in range(10_000)))
    async with watching(many) as monitor:
        await until(lambda: monitor.counts["ok"] == 10_000)
        assert most <= monitors.AT_ONCE
        await until(lambda: len(monitor.view.verdicts) == 10_000)
