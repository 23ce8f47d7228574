# SPDX-License-Identifier: Apache-2.0
"""Paths to other nodes are up once shown to work, and down with a problem while they do not: over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest

from mesh.config.keys import Config
from mesh.datapath.paths import peer_probe
from mesh.datapath.paths.datagrams import Questions
from mesh.datapath.paths.monitor import EVERY, FLAP_SECONDS, SHARE, TRIES, WAIT, PathMonitor, Trial
from mesh.model import EngineKind, Node, Path, PathState
from tests.support.polling import until
from tests.support.ports import free_port

HERE = Node("n1", "one", ipaddress.ip_address("127.0.0.1"), engine=EngineKind.PROXY)
THERE = Node("n2", "two", ipaddress.ip_address("127.0.0.1"), engine=EngineKind.PROXY)


class _Answers(asyncio.DatagramProtocol):
    """Answers questions as the peer port does (mesh/fastpath/proto.pyx)."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data[:14] + b"\1\0" + data[16:32], addr)


@asynccontextmanager
async def peer_port(port: int) -> AsyncIterator[None]:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"\0")
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", port)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(_Answers, local_addr=("127.0.0.1", port))
    yield
    server.close()
    transport.close()


@asynccontextmanager
async def trying(port: int, *nodes: Node) -> AsyncIterator[tuple[PathMonitor, list[Node]]]:
    known = [HERE, *nodes]
    ways = PathMonitor(Config(peer_port=port), EngineKind.PROXY, lambda: ("n1", known), pause=0.001)
    task = asyncio.create_task(ways.run())
    try:
        yield ways, known
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def state(monitor: PathMonitor, node: str) -> tuple[PathState, PathState]:
    return monitor.view.of(node, Path.PEER), monitor.view.of(node, Path.PEER_UDP)


UP, DOWN, UNPROVEN = (PathState.UP,) * 2, (PathState.DOWN,) * 2, (PathState.UNPROVEN,) * 2


async def test_a_path_that_fails_is_named_until_it_works() -> None:
    port = free_port()
    async with trying(port, THERE) as (monitor, nodes):
        await until(lambda: state(monitor, "n2") == DOWN)
        (problem,) = map(str, monitor.problems)
        assert problem.startswith("node two (127.0.0.1): no path to it works")
        assert f"peer port TCP {port}: nobody listens" in problem and "mesh check" in problem
        assert monitor.refused == 1
        async with peer_port(port):
            await until(lambda: state(monitor, "n2") == UP and not monitor.problems)
            assert monitor.refused == 0
        await until(lambda: state(monitor, "n2") == DOWN)
        nodes[1] = replace(THERE, up=False)  # told by others, who name it
        await until(lambda: not monitor.problems)
        del nodes[1]
        await until(lambda: state(monitor, "n2") == UNPROVEN)


async def test_first_trials_are_waited_for() -> None:
    port = free_port()
    async with peer_port(port), trying(port, THERE, replace(THERE, id="n3", name="three")) as (monitor, nodes):
        await asyncio.wait_for(monitor.proven(), 20)
        assert state(monitor, "n2") == state(monitor, "n3") == UP
        nodes.append(replace(THERE, id="n4", name="four"))
        monitor.look_again()
        await until(lambda: state(monitor, "n4") == UP)


async def test_nodes_without_an_agent_are_tried_and_those_without_an_address_are_not() -> None:
    others = (replace(THERE, engine=EngineKind.UNKNOWN), replace(THERE, id="n3", name="three", address=None))
    async with trying(free_port(), *others) as (monitor, _):
        await until(lambda: monitor.problems)
        assert [(node.name, path) for node, path, _ in monitor.states()] == [("two", Path.PEER), ("two", Path.PEER_UDP)]


async def test_whether_an_agent_runs_there_is_told_by_its_peer_port() -> None:
    port = free_port()
    async with trying(port, THERE) as (monitor, _):
        assert monitor.agent("n2") == monitor.agent("n3") == ""
        await until(lambda: monitor.agent("n2") == "gone")
        async with peer_port(port):
            await until(lambda: monitor.agent("n2") == "answers")


def test_a_path_comes_back_after_several_good_trials_and_more_the_more_it_flaps() -> None:
    trial = Trial()
    assert trial.take("", 0.0) and trial.state is PathState.UP  # the first proof counts at once
    needed = []
    for start in (1.0, 2.0, 3.0, 4.0, 5.0):
        assert trial.take("no answer", start) and trial.state is PathState.DOWN
        good = 1
        while not trial.take("", start):
            good += 1
        needed.append(good)
    assert needed == [4, 8, 16, 16, 16]
    assert trial.take("no answer", 5.0 + FLAP_SECONDS) and not trial.take("", 70.0) and trial.take("", 70.0)


def test_one_bad_trial_of_a_path_that_is_coming_back_starts_its_proof_again() -> None:
    trial = Trial()
    trial.take("no answer", 0.0)
    assert trial.state is PathState.DOWN
    assert trial.why == "no answer"
    assert not trial.take("", 1.0) and not trial.take("no answer", 2.0) and not trial.take("", 3.0)
    assert trial.why == "it answers again, 1 of the 2 times in a row that it has to"
    assert trial.take("", 4.0)


@pytest.mark.timeout(30)  # it would never give the event loop its turn
async def test_a_question_that_is_open_when_its_socket_is_closed_ends() -> None:
    address = ipaddress.ip_address("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((str(address), 0))
        port = silent.getsockname()[1]
        asks = Questions(
            4, address, port, lambda nonce, _: peer_probe.question(nonce), lambda data: peer_probe.nonce_of(data, 4)
        )
        question = asyncio.create_task(asks.ask(address, 0.05, 1))
        await asyncio.sleep(0)  # it is sent, and waits
        asks.close()
        assert await question == peer_probe.NO_ANSWER


async def test_how_long_others_take_to_notice_that_this_node_leaves() -> None:
    """Nobody where there are no others; longer in a large swarm, whose trials are rarer."""
    port = free_port()
    others = [replace(THERE, id=f"n{i}") for i in range(2, 102)]
    times = []
    for nodes in ([], others[:1], others):
        async with trying(port, *nodes) as (monitor, _):
            monitor.look_again()
            times.append((monitor.notice(datagrams=False), monitor.notice(datagrams=True)))
    assert times[0] == (0, 0)
    assert EVERY < times[1][0] < 1 < EVERY + TRIES * WAIT < times[1][1] < 3
    assert times[2][0] > 100 * SHARE[Path.PEER] and times[2][1] > 100 * SHARE[Path.TUNNEL] + TRIES * WAIT
