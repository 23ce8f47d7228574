# SPDX-License-Identifier: Apache-2.0
"""Whether what became of a flow was right."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from tests.flows.changes import Task, Trouble
from tests.flows.nodes import DENIED, GATEWAYS, SERVICES

Address = IPv4Address | IPv6Address


@functools.cache
def plain(text: str) -> Address:
    """An address without the IPv6 form of IPv4."""
    found = ip_address(text)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


@dataclass(frozen=True)
class Flow:
    """A line of flows.c."""

    number: int
    service: str
    protocol: str
    target: str
    source: str
    port: int
    start: float
    end: float
    up: int
    down: int
    rounds: int
    sends: int
    result: str
    name: str
    seen: str
    seen_port: int

    @classmethod
    def of(cls, line: str) -> Flow:
        _, number, service, protocol, target, source, port, start, end, *rest = line.split()
        up, down, rounds, sends, result, name, seen, seen_port = rest
        ends = (service, protocol, target, source, int(port), float(start), float(end))
        counts = (int(up), int(down), int(rounds), int(sends))
        return cls(int(number), *ends, *counts, result, name, seen, int(seen_port))


@dataclass
class Verdict:
    """Of a run.

    Attributes:
        wrong: a sentence for each flow that was not as it should be.
        refused: flows that failed for a reason that is known, by "SERVICE RESULT"; what the nodes must have counted.
        broken: likewise, connections that ended with their task, which are nobody's to count, and what only an agent
            serves while there is none.
        lost: exchanges in which a datagram was sent again.
        exceptional: answered flows whose task saw a node's address instead of the client's.
    """

    flows: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    exceptional: int = 0
    longest: float = 0.0


class Checker:
    """Judges flows by what happened meanwhile.

    Args:
        engine: keeps the client's address (kernel), or shows the node's (proxy).
        known_as: what others see of a source that is behind a router.
    """

    def __init__(
        self,
        engine: str,
        tasks: Mapping[str, Task],
        troubles: Iterable[Trouble],
        known_as: Mapping[str, str],
    ) -> None:
        self.engine, self.tasks, self.known_as = engine, tasks, known_as
        self.troubles: dict[str, list[Trouble]] = {service: [] for service in (*SERVICES, "")}
        for trouble in troubles:
            self.troubles[trouble.service].append(trouble)
        self.verdict = Verdict()

    def judge(self, flow: Flow) -> None:
        found = self.verdict
        found.flows += 1
        found.results[f"{flow.protocol} {flow.result}"] += 1
        found.longest = max(found.longest, flow.end - flow.start)
        if flow.sends > 1:
            found.lost += 1
        reason = self._answered(flow) if flow.result == "ok" else self._failed(flow)
        if reason:
            found.wrong.append(f"{reason}: {flow}")

    def _denied(self, flow: Flow) -> bool:
        return plain(flow.source) in ip_network(DENIED)

    def _answered(self, flow: Flow) -> str:
        """Why an answer is wrong; "" if it is right."""
        task = self.tasks.get(flow.name)
        if self._denied(flow):
            return "answered, but denied"
        if task is None:
            return "nobody has this name"
        if task.service != flow.service:
            return "another service's task"
        if flow.start > task.killed:
            return "a task that had ended"
        if flow.protocol == "tcp" and flow.start > task.drained:
            return "a connection to a drained task"
        if flow.sends > 1 and not self._trouble(flow, lost=True):
            return "a datagram was lost"
        return self._shown(flow, task)

    def _shown(self, flow: Flow, task: Task) -> str:
        """Why the client's address, as the task saw it, is wrong."""
        seen, source = plain(flow.seen), plain(self.known_as.get(flow.source, flow.source))
        keeps = self.engine == "kernel" and source.version == SERVICES[flow.service].family
        if keeps and not any(source in network for network in task.place.networks):
            return "" if seen == source else "the client's address is not kept"
        self.verdict.exceptional += 1
        return "" if seen in map(plain, GATEWAYS) else "neither the client's address nor the node's"

    def _trouble(self, flow: Flow, *, lost: bool = False) -> str:
        """What happened to the service meanwhile; "": nothing. `lost`: by which a datagram may have been lost."""
        beside = plain(flow.source).version != SERVICES[flow.service].family
        for trouble in self.troubles[""] * beside + self.troubles[flow.service]:
            if flow.start < trouble.ended and flow.end > trouble.begun and (lost or not trouble.lossy):
                return trouble.cause
        return ""

    def _failed(self, flow: Flow) -> str:
        """Why a failure is wrong."""
        if flow.result in ("corrupt", "moved"):
            return flow.result
        denied = self._denied(flow)
        if flow.result == "silent" and not denied:
            return "hung"
        trouble = "" if denied else self._trouble(flow)
        if not denied and not trouble:
            return "refused, and nothing had happened"
        established = flow.protocol == "tcp" and (flow.name != "-" or flow.result not in ("ECONNREFUSED", "silent"))
        uncounted = not denied and (established or trouble.startswith("no agent"))
        of = self.verdict.broken if uncounted else self.verdict.refused
        of[f"{flow.service} {'denied' if denied else flow.result}"] += 1
        return ""

    def uncounted(self, failures: Mapping[str, int]) -> list[str]:
        """Services of whose flows more were refused than the nodes have counted: a sentence each."""
        wrong = []
        for service in SERVICES:
            refused = sum(n for key, n in self.verdict.refused.items() if key.split()[0] == service)
            counted = sum(n for key, n in failures.items() if key.split()[0] == service and "unanswered" not in key)
            if refused > counted:
                wrong.append(f"{service}: {refused} flows refused, {counted} counted")
        return wrong
