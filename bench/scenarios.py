# SPDX-License-Identifier: Apache-2.0
"""The work: what the load generator does in each scenario, and which number of its answer is the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bench.lab import ECHO_PORT, SINK_PORT, SOURCE_PORT

Result = Mapping[str, Any]  # what bench/load prints


@dataclass(frozen=True)
class Scenario:
    """One kind of work. `metric` is per_second, gbit, or a percentile (p50, p99, p999) of latency in µs."""

    name: str
    title: str
    mode: str
    port: int
    arguments: tuple[str, ...]
    metric: str
    unit: str
    pinned: bool = False  # everything on one core
    udp: bool = False
    quick: bool = True  # also in bench-quick
    beside: str = ""  # what happens meanwhile: "flood" | "changes"
    duration: float = 0.0  # seconds, where it is not the run's; such a scenario is measured in the first round only

    @property
    def higher_is_better(self) -> bool:
        return self.metric in ("per_second", "gbit")

    def value(self, result: Result) -> float:
        """The number of a result that this scenario is about. NaN where nothing was completed."""
        return metric(result, self.metric)


def metric(result: Result, name: str) -> float:
    """One number of a result: per_second (operations), gbit (Gbit/s), or a percentile of latency in µs."""
    if not result["operations"]:
        return float("nan")
    if name == "per_second":
        return float(result["operations"] / result["seconds"])
    if name == "gbit":
        return float(result["bytes"] * 8 / result["seconds"] / 1e9)
    return float(result["latency_us"][name])


def busy_seconds(result: Result) -> float:
    """CPU time of the whole machine inside the window, seconds: all but idle, waiting for I/O, and stolen."""
    spent = [after - before for before, after in zip(result["cpu_before"], result["cpu_after"], strict=True)]
    user, nice, system, _idle, _iowait, irq, softirq = spent[:7]
    return float(user + nice + system + irq + softirq) / float(result["ticks_per_second"])


def cpu_per_operation(result: Result) -> float:
    """µs of CPU, whole machine, per operation; per MB in bulk transfers. NaN where nothing was completed."""
    units = result["bytes"] / 1e6 if result["mode"] in ("up", "down") else result["operations"]
    return busy_seconds(result) * 1e6 / units if units else float("nan")


MANY: Final = ("--connections", "64", "--threads", "2")
SCENARIOS: Final = (
    Scenario("connections", "new connections", "connections", ECHO_PORT, MANY, "per_second", "conn/s"),
    Scenario("requests", "requests on kept connections", "requests", ECHO_PORT, MANY, "per_second", "req/s"),
    Scenario(
        "pingpong", "ping-pong, one connection, one core", "requests", ECHO_PORT, (), "p50", "µs p50", pinned=True
    ),
    Scenario(
        "rate", "10,000 requests a second", "rate", ECHO_PORT, (*MANY, "--rate", "10000"), "p99", "µs p99", quick=False
    ),
    Scenario("down1", "download, 1 stream", "down", SOURCE_PORT, (), "gbit", "Gbit/s"),
    Scenario(
        "down8",
        "download, 8 streams",
        "down",
        SOURCE_PORT,
        ("--connections", "8", "--threads", "2"),
        "gbit",
        "Gbit/s",
        quick=False,
    ),
    Scenario("up1", "upload, 1 stream", "up", SINK_PORT, (), "gbit", "Gbit/s", quick=False),
    Scenario("up8", "upload, 8 streams", "up", SINK_PORT, ("--connections", "8", "--threads", "2"), "gbit", "Gbit/s"),
    Scenario(
        "datagrams",
        "UDP echo",
        "datagrams",
        ECHO_PORT,
        ("--connections", "16", "--threads", "2"),
        "per_second",
        "datagrams/s",
        udp=True,
    ),
    Scenario(
        "flood",
        "requests under a SYN flood",
        "requests",
        ECHO_PORT,
        MANY,
        "per_second",
        "req/s",
        quick=False,
        beside="flood",
    ),
    Scenario(
        "changes",
        "requests through table changes",
        "requests",
        ECHO_PORT,
        MANY,
        "per_second",
        "req/s",
        quick=False,
        beside="changes",
        duration=15.0,
    ),
    Scenario(
        "changes-new",
        "new connections through table changes",
        "connections",
        ECHO_PORT,
        MANY,
        "per_second",
        "conn/s",
        quick=False,
        beside="changes",
        duration=15.0,
    ),
)
STRESS: Final = {"flood": "requests", "changes": "requests", "changes-new": "connections"}
"""Scenarios that are another one with something happening beside it."""
BY_NAME: Final = {scenario.name: scenario for scenario in SCENARIOS}
