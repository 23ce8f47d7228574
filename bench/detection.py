# SPDX-License-Identifier: Apache-2.0
"""How long after a fault another node names it: a real swarm of three nodes, and what the trials of paths cost.

`python -m bench.detection [--trials N] [--engine NAME]`. A fault is named when the observer's `/state`, which
`mesh status` prints, or a metric has it with the name of the node or the task. The first node's agent is asked, every
20 ms. Between two faults everything is well again, and the observer is a fresh process, so that no path counts as
flapping. All nodes share one clock. Cost: CPU and packets of the three nodes while nobody calls them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.cluster import crash
from bench.lab import OUT, LabError
from tests.support.cluster import WEB, Cluster, blocked
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Swarm, unavailable
from tests.support.lab.netns import Lab, run
from tests.support.polling import wait_for

ENGINES: Final = ("kernel", "proxy")
TRIALS: Final = 6
SOLO: Final = 8001
HERE: Final = "--constraint=node.hostname=={}"
REPLICAS: Final = 6
QUICK: Final = ("--restart-delay=200ms", "--stop-grace-period=1s")
IDLE: Final = 20.0  # seconds
TARGET: Final = 2.0  # seconds, p99
FAULTS: Final = {
    "agent": "an agent is killed",
    "tunnel": "UDP 6084 is blocked",
    "peer": "TCP 9552 is blocked",
    "node": "a node is cut off",
    "down": "the same, until it counts as down",
    "task": "a task dies",
    "none": "the only task dies",
}

Named = Callable[[dict[str, Any]], bool]


class Scene:
    """Three nodes; the first observes, faults happen to the second."""

    def __init__(self, lab: Lab, engine: str) -> None:
        self.swarm = Swarm(lab, 1, 2)
        self.cluster = Cluster(self.swarm, lab.host("client"), engine=engine)
        self.observer, self.harmed = self.cluster.daemons[:2]
        self.node = self.swarm.nodes[1]
        self.swarm.create("web", *QUICK, "--replicas-max-per-node=2", replicas=REPLICAS, publish=[f"{WEB}:8080"])
        self.swarm.create("solo", "--restart-delay=5s", HERE.format(self.node.hostname), publish=[f"{SOLO}:8080"])

    def close(self) -> None:
        self.cluster.close()

    def well(self) -> None:
        """Until nothing is wrong on any node, and the observer has forgotten what was."""
        self.cluster.wait_ready()
        before = self.observer.process
        self.observer.start("--take-over", wait=False)
        before.wait(60)
        self.cluster.wait_ready()
        self.swarm.wait_running("web", REPLICAS)
        self.swarm.wait_running("solo", 1)
        wait_for(self.is_heard, "the observer hears all agents", interval=0.1)
        wait_for(lambda: all(self.is_well(daemon) for daemon in self.cluster.daemons), "all is well", interval=0.1)

    def is_heard(self) -> bool:
        """Whether all agents have called the observer's new process: who has not is watched by Swarm alone."""
        ages = [row["age"] for row in json.loads(self.observer.get("/cluster")[1])["nodes"]]
        return all(age is not None and age < 2 for age in ages)

    def is_well(self, daemon: Daemon) -> bool:
        state = daemon.state()
        return (
            state["traffic"]["verdict"] == "ok"
            and not state["problems"]
            and all(len(serving(state, service)) == count for service, count in (("web", REPLICAS), ("solo", 1)))
        )

    def measured(self, fault: str, trials: int) -> list[float]:
        """Seconds of each trial; shown as they come, for the run is long."""
        found = []
        for _ in range(trials):
            found.append(self.measure(fault))
            print(f"{FAULTS[fault]}: {found[-1]:.2f} s", file=sys.stderr, flush=True)
        return found

    def measure(self, fault: str) -> float:
        """Cause a fault and repair it. Returns the seconds until the observer names it."""
        self.well()
        with getattr(self, f"_{fault}")() as (named, began):
            wait_for(lambda: named(self.observer.state()), FAULTS[fault], timeout=30, interval=0.02)
            return time.monotonic() - began

    def is_down(self) -> bool:
        return self.observer.total("mesh_node_up", node=self.node.hostname) == 0

    @contextlib.contextmanager
    def _agent(self) -> Iterator[tuple[Named, float]]:
        began = time.monotonic()
        self.harmed.kill()
        yield self._problem(f"node {self.node.hostname} "), began
        self.harmed.start(wait=False)

    @contextlib.contextmanager
    def _blocked(self, rule: str, place: str) -> Iterator[tuple[Named, float]]:
        address = self.node.address
        began = time.monotonic()
        with blocked(self.swarm, *(f"ip {way} {address} {rule}" for way in ("saddr", "daddr"))):
            yield self._problem(f"node {self.node.hostname} ", place), began

    def _tunnel(self) -> contextlib.AbstractContextManager[tuple[Named, float]]:
        return self._blocked("udp dport 6084", "UDP 6084")

    def _peer(self) -> contextlib.AbstractContextManager[tuple[Named, float]]:
        return self._blocked("tcp dport 9552", "TCP 9552")

    @contextlib.contextmanager
    def _node(self) -> Iterator[tuple[Named, float]]:
        port = f"p{self.node.address.rpartition('.')[2]}"
        began = time.monotonic()
        self.swarm.lab.switch.ip("link", "set", port, "down")
        named = self._problem(f"node {self.node.hostname} ")
        yield lambda state: named(state) or self.is_down(), began
        self.swarm.lab.switch.ip("link", "set", port, "up")

    @contextlib.contextmanager
    def _down(self) -> Iterator[tuple[Named, float]]:
        with self._node() as (_, began):
            yield lambda state: self.is_down(), began

    @contextlib.contextmanager
    def _task(self) -> Iterator[tuple[Named, float]]:
        container = self.swarm.containers("web", self.node)[0]
        labels = self.node.inspect("container", container)["Config"]["Labels"]
        task = labels["com.docker.swarm.task.id"]
        began = time.monotonic()
        crash(self.node, container)
        yield lambda state: task not in serving(state, "web"), began

    @contextlib.contextmanager
    def _none(self) -> Iterator[tuple[Named, float]]:
        container = self.swarm.containers("solo", self.node)[0]
        began = time.monotonic()
        crash(self.node, container)
        yield lambda state: any(why.startswith("service solo:") for why in state["traffic"]["reasons"]), began

    @staticmethod
    def _problem(*texts: str) -> Named:
        return lambda state: any(all(text in problem for text in texts) for problem in state["problems"])

    def idle(self) -> dict[str, float]:
        """What a node does while nobody calls it, mean of three: CPU in percent of a core, packets sent a second."""
        self.well()
        daemons = self.cluster.daemons
        sent, used = packets(self.swarm.lab), sum(map(cpu, daemons))
        time.sleep(IDLE)
        sent, used = packets(self.swarm.lab) - sent, sum(map(cpu, daemons)) - used
        count = len(daemons)
        return {"cpu_percent": 100 * used / count / IDLE, "packets_per_second": sent / count / IDLE}


def serving(state: dict[str, Any], service: str) -> set[str]:
    """Tasks of a service that get new connections."""
    frontends = [f for s in state["services"] if s["name"] == service for f in s["frontends"]]
    return {target["backend"] for frontend in frontends for target in frontend["targets"] if target["weight"]}


def cpu(daemon: Daemon) -> float:
    """Seconds of CPU that an agent has used."""
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def packets(lab: Lab) -> float:
    """Packets of the trials that have crossed the switch, from the first call on."""
    shown = lab.switch.run("nft", "-j", "list", "table", "bridge", "trials", check=False)
    if shown.returncode:
        rules = "".join(f"{port} counter\n" for port in ("udp dport 6084", "th dport 9552", "th sport 9552"))
        table = f"table bridge trials {{\nchain f {{ type filter hook forward priority 0;\n{rules}}}\n}}\n"
        run(*lab.switch.command("nft", "-f", "-"), input=table)
        return 0.0
    rows = [entry["rule"] for entry in json.loads(shown.stdout)["nftables"] if "rule" in entry]
    return float(sum(part["counter"]["packets"] for row in rows for part in row["expr"] if "counter" in part))


def summary(engine: str, fault: str, found: Sequence[float]) -> dict[str, Any]:
    """A row of the report, in seconds."""
    values = sorted(found)
    p99 = values[math.ceil(0.99 * len(values)) - 1]
    row = {"engine": engine, "fault": fault, "trials": len(values), "p50": statistics.median(values), "p99": p99}
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def measured(engine: str, trials: int, faults: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of an engine, and what its trials cost.

    Raises:
        LabError: no swarm can run here, or something was not named at all.
    """
    if reason := unavailable():
        raise LabError(reason)
    with Lab() as lab:
        scene = Scene(lab, engine)
        try:
            cost = scene.idle()
            chosen = [fault for fault in faults if engine == "kernel" or fault != "tunnel"]
            rows = [summary(engine, fault, scene.measured(fault, trials)) for fault in chosen]
        except TimeoutError as error:
            raise LabError(str(error)) from error
        finally:
            scene.close()
    return rows, cost


def main(argv: Sequence[str]) -> int:
    """Measure and print; the raw rows go to bench/out/detection.json."""
    parser = argparse.ArgumentParser(prog="bench.detection", description=__doc__)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: one after the other")
    parser.add_argument("--fault", action="append", choices=tuple(FAULTS), help="default: all")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    build = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result: dict[str, Any] = {"commit": build.stdout.strip(), "faults": [], "idle": {}}
    try:
        for engine in options.engine or ENGINES:
            rows, result["idle"][engine] = measured(engine, options.trials, options.fault or tuple(FAULTS))
            result["faults"] += rows
            for row in rows:
                late = "" if row["p99"] <= TARGET else f"  above {TARGET:g} s"
                what = f"{engine:7} {FAULTS[row['fault']]:34} {row['trials']:3} trials"
                print(f"{what}, s: p50 {row['p50']:.2f} p99 {row['p99']:.2f}{late}", flush=True)
            cost = result["idle"][engine]
            print(f"{engine:7} idle: {cost['cpu_percent']:.2f} % of a core, {cost['packets_per_second']:.0f} packets/s")
    except LabError as error:
        print(f"bench.detection: {error}", file=sys.stderr)
        return 1
    OUT.mkdir(exist_ok=True)
    (OUT / "detection.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
