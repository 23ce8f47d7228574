# SPDX-License-Identifier: Apache-2.0
"""Call what you are not admitted to, by every way in, while rules and daemons come and go: denied stays denied, members
only, established stays (issue 12, the matrix).

Rows are rules, callers, IP versions and protocols; both engines, with rules from the beginning, rules that come later,
and a daemon that was killed. Fragments, interfaces, the tunnel and the peer port have attacks of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engines.topology import Spec, Topology, logs
from tests.support.lab.images import ECHO_PORT, UDP_PORT
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

GRACE = 0.3  # seconds after the last admitted answer in which a denied one would have come, too
PORTS = {"open": 8100, "deny": 8101, "allow": 8102, "nobody": 8103}


@dataclass(frozen=True)
class Row:
    """One way in."""

    rules: str  # a key of PORTS
    caller: str  # client, stranger, node
    version: int
    protocol: str

    def admitted(self, engine: str) -> bool:
        """Whether the caller is let in. Rules do not hold for processes of a node with the kernel engine."""
        if self.rules == "open" or (self.caller == "node" and engine == "kernel"):
            return True
        return self.caller != "stranger" and self.rules != "nobody"


ROWS = [Row(*row) for row in itertools.product(PORTS, ("client", "stranger", "node"), (4, 6), ("tcp", "udp"))]


class Call:
    """A connection or a UDP flow. `answers` counts; nothing blocks."""

    def __init__(self, where: Namespace, address: str, port: int, protocol: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with where.entered():
            self.socket = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError, OSError):
            self.socket.connect((address, port))
        self.asked = self.answered = False

    def ask(self) -> None:
        self.asked = self.answered = False

    def look(self) -> bool:
        """Whether the last question was answered; asks it, as soon as it can be."""
        with contextlib.suppress(OSError):
            if not self.asked:
                self.asked = self.socket.send(b"ping\n") > 0
            self.answered = self.answered or bool(self.socket.recv(4096))
        return self.answered

    def close(self) -> None:
        self.socket.close()


class World:
    """A topology with a stranger beside the client."""

    def __init__(self, lab: Lab, engine: str) -> None:
        self.engine = engine
        self.topology = Topology(lab, engine, backends=2)
        self.callers = {
            "client": self.topology.client,
            "stranger": lab.host("stranger"),
            "node": self.topology.node,
        }

    def specs(self, *, ruled: bool = True) -> tuple[Spec, ...]:
        client, node, stranger = (self.callers[name] for name in ("client", "node", "stranger"))
        own = f"127.0.0.0/8, ::1, {node.address}, {node.address6}"
        rules: dict[str, dict[str, Any]] = {
            "open": {},
            "deny": {"deny": f"{stranger.address}, {stranger.address6}"},
            "allow": {"allow": f"{client.address}, {client.address6}, {own}"},
            "nobody": {"deny": "0.0.0.0/0, ::/0"},
        }
        return tuple(
            Spec(
                name,
                (f"{port}:{ECHO_PORT}/tcp", f"{port}:{UDP_PORT}/udp"),
                tuple(self.topology.hosts),
                options={"health": "off", **(rules[name] if ruled else {})},
            )
            for name, port in PORTS.items()
        )

    def call(self, row: Row) -> Call:
        node = self.topology.node
        address = node.address if row.version == 4 else node.address6
        return Call(self.callers[row.caller], address, PORTS[row.rules], row.protocol)

    def wrong(self, calls: dict[Row, Call]) -> list[Row]:
        """Rows that are answered and should not be; waits for those that should."""
        self.answers({row: call for row, call in calls.items() if row.admitted(self.engine)})
        time.sleep(GRACE)
        return [row for row, call in calls.items() if call.look() and not row.admitted(self.engine)]

    def answers(self, calls: dict[Row, Call]) -> None:
        """Wait until all are answered."""
        try:
            wait_for(lambda: sum(call.look() for call in calls.values()) == len(calls), "answers")
        except TimeoutError as error:
            raise AssertionError([row for row, call in calls.items() if not call.answered]) from error

    def fresh(self, *, straight: bool = False) -> list[Row]:
        """The same for new calls.

        Args:
            straight: nobody runs, so of those who are let in only IPv4 is served: its tasks speak that.
        """
        rows = (row for row in ROWS if not straight or row.version == 4 or not row.admitted(self.engine))
        calls = {row: self.call(row) for row in rows}
        try:
            return self.wrong(calls)
        finally:
            for call in calls.values():
                call.close()


@pytest.fixture(params=["proxy", "kernel"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with Lab() as lab:
        yield World(lab, request.param)
        request.node.add_report_section("teardown", "daemon", logs(lab.directory))


def test_denied_stays_denied_members_only_established_stays(world: World) -> None:
    topology = world.topology
    topology.serve(*world.specs(ruled=False))
    before = {row: world.call(row) for row in ROWS}
    world.answers(before)
    topology.change(*world.specs())
    assert world.fresh() == [], "rules that come later"
    for call in before.values():
        call.ask()
    # A process of a node with the kernel engine is connected straight to its task, and exempt.
    assert world.wrong(before) == [], "what was open before the rules came"
    topology.daemon.process.kill()
    topology.daemon.process.wait()
    if world.engine == "kernel":
        assert world.fresh(straight=True) == [], "nobody runs"
        kept = {row: call for row, call in before.items() if row.admitted("kernel") and row.version == 4}
        for call in kept.values():
            call.ask()
        assert world.wrong(kept) == [], "established stays"
    topology.daemon.start()
    wait_for(lambda: topology.daemon.state()["generation"]["applied"], "serves again")
    assert world.fresh() == [], "a daemon that was killed"
    for call in before.values():
        call.close()
