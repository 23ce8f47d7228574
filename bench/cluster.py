# SPDX-License-Identifier: Apache-2.0
"""How long after Docker's announcement of a change the last node's table has it: a real swarm of five nodes.

`python -m bench.cluster [--rounds N] [--engine NAME]`. Five Engines in namespaces, an agent on each. One change after
another: a task more, a crash and its replacement, a task less; then containers that turn unhealthy. A change is
announced when a watcher beside the agents hears of it (swarm's Watch on a manager, an Engine's event), and is in a
node's table when its agent, done with the apply, has logged so. Of a new task there are two rows: until all nodes know
that it runs, and until all give it flows, which they do once its own node has found that it answers; that is as fast as
the task. All nodes share one clock. The report has the result if there was a run of `bench.run` before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from bench.announce import Announcements
from bench.lab import OUT, LabError
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Node, Swarm, bpf_fs, unavailable
from tests.support.lab.netns import Lab
from tests.support.polling import wait_for

ENGINES: Final = ("proxy", "kernel")
MANAGERS, WORKERS = 3, 2
REPLICAS: Final = 10
ROUNDS: Final = 25  # of three changes with four announcements
ILL: Final = 6  # containers that turn unhealthy
IN_USE: Final = frozenset({"backend serving", "backend up"})
RUNS: Final = IN_USE | {"backend first probe pending", "backend down"}
KINDS: Final = {
    "known": "a task runs",
    "up": "a new task gets flows",
    "stop": "a task shall stop",
    "die": "a container died",
    "unhealthy": "a container turned unhealthy",
}
NEW: Final = ("known", "up")
ALL: Final = "all but flows to new tasks"


class Journal:
    """What an agent's log says of backends."""

    def __init__(self, daemon: Daemon) -> None:
        self._log = daemon.log.open("rb")
        self._rest = b""
        self._said: dict[str, list[tuple[float, str]]] = {}

    def read(self) -> None:
        """Take what is new."""
        *lines, self._rest = (self._rest + self._log.read()).split(b"\n")
        for line in lines:
            if b'"backend ' in line:
                entry = json.loads(line)
                when = datetime.fromisoformat(entry["timestamp"]).timestamp()
                self._said.setdefault(entry["id"], []).append((when, entry["event"]))

    def when(self, task: str, kind: str) -> float | None:
        """When a backend was first known to run ("known") or used ("up"); or, having been used, no longer."""
        said = self._said.get(task, ())
        words = RUNS if kind == "known" else IN_USE
        first = next((when for when, event in said if event in words), None)
        if kind in NEW or first is None:
            return first
        return next((when for when, event in said if when > first and event not in IN_USE), None)


class Cluster:
    """The swarm, its agents, and who listens."""

    def __init__(self, lab: Lab, engine: str) -> None:
        self.swarm = Swarm(lab, MANAGERS, WORKERS)
        self.daemons = [self._daemon(node, engine) for node in self.swarm.nodes]
        self.journals = [Journal(daemon) for daemon in self.daemons]
        self.announcements = Announcements(self.swarm.nodes)
        self.changes: list[dict[str, Any]] = []

    def _daemon(self, node: Node, engine: str) -> Daemon:
        more = {"bpf_fs": bpf_fs(self.swarm.lab, node.hostname)} if engine == "kernel" else {}
        return Daemon(
            node.namespace,
            self.swarm.lab.directory / f"mesh-{node.hostname}",
            wait=False,
            provider="swarm",
            engine=engine,
            log_format="json",
            docker_host=node.host,
            docker_data_root=node.data_root,
            docker_exec_root=node.exec_root,
            **more,
        )

    def close(self) -> None:
        self.announcements.close()
        for daemon in self.daemons:
            daemon.close()

    def running(self, service: str) -> dict[str, dict[str, Any]]:
        """The service's tasks that run, by id."""
        return {task["ID"]: task for task in self.swarm.tasks(service)}

    def node_of(self, task: dict[str, Any]) -> Node:
        """Where a task runs."""
        names = {node["ID"]: node["Description"]["Hostname"] for node in self.swarm.api("GET", "/nodes")}
        return next(node for node in self.swarm.nodes if node.hostname == names[task["NodeID"]])

    def measure(self, task: str, kind: str) -> None:
        """Wait until a change was announced and every table has it; note how long it took."""

        for each in NEW if kind == "up" else (kind,):
            delays = self._delays(task, kind, each)
            self.changes.append({"kind": each, "ms": max(delays), "nodes": delays})

    def _delays(self, task: str, announced: str, kind: str) -> list[float]:
        """Of each node, milliseconds."""

        def done() -> list[float]:
            for journal in self.journals:
                journal.read()
            times = [journal.when(task, kind) for journal in self.journals]
            known = [when for when in times if when is not None]
            return known if len(known) == len(times) and (task, announced) in self.announcements.heard else []

        times = wait_for(done, f"{KINDS[kind]}, on all nodes", timeout=60, interval=0.01)
        begun = self.announcements.heard[task, announced]
        return [round(max(0.0, when - begun) * 1e3, 1) for when in times]

    def announced(self, kind: str) -> set[str]:
        """The tasks of which this was announced."""
        return {task for task, what in list(self.announcements.heard) if what == kind}

    def follow(self, kind: str, before: set[str]) -> set[str]:
        """Wait for the announcements to come, and for all tables. Returns the tasks."""
        found: set[str] = wait_for(lambda: self.announced(kind) - before, KINDS[kind], timeout=60, interval=0.01)
        for task in found:
            self.measure(task, kind)
        return found

    def scale(self, service: str, count: int, tasks: set[str]) -> set[str]:
        """One task more, or less. Returns those that are left."""
        kind = "up" if count > len(tasks) else "stop"
        before = self.announced(kind)
        self.swarm.docker("service", "scale", "--detach", f"{service}={count}")
        return tasks ^ self.follow(kind, before)

    def replace(self, service: str, tasks: set[str], harm: Callable[[Node, str], None], kind: str) -> set[str]:
        """Harm the container of one task, and follow until it is replaced. Returns those that are left."""
        task, before = min(tasks), self.announced("up")
        found = self.running(service)[task]
        harm(self.node_of(found), found["Status"]["ContainerStatus"]["ContainerID"])
        self.measure(task, kind)
        return tasks - {task} | self.follow("up", before)


def crash(node: Node, container: str) -> None:
    """Kill a container's process behind Docker's back."""
    os.kill(node.inspect("container", container)["State"]["Pid"], signal.SIGKILL)


def sicken(node: Node, container: str) -> None:
    """Have a container's HEALTHCHECK fail from now on."""
    attached = node.inspect("network", "docker_gwbridge")["Containers"]
    address = attached[container]["IPv4Address"].split("/")[0]
    node.namespace.run("curl", "-sS", "-m5", f"http://{address}:8080/health/fail")


def changes(engine: str, rounds: int = ROUNDS, ill: int = ILL) -> list[dict[str, Any]]:
    """[{"kind", "ms", "nodes"}]: of each change milliseconds until the last table, and until each node's.

    Raises:
        LabError: no swarm can run here, or something did not happen.
    """
    if reason := unavailable():
        raise LabError(reason)
    with Lab() as lab:
        cluster = Cluster(lab, engine)
        try:
            quick = ("--restart-delay=100ms", "--stop-grace-period=1s")
            cluster.swarm.create("web", *quick, replicas=REPLICAS, publish=["8000:8080"])
            tasks = set(cluster.running("web"))
            for task in tasks:
                cluster.measure(task, "up")
            cluster.changes.clear()  # many at once, and the agents' start
            for _ in range(rounds):
                tasks = cluster.scale("web", REPLICAS + 1, tasks)
                tasks = cluster.replace("web", tasks, crash, "die")
                tasks = cluster.scale("web", REPLICAS, tasks)
            if ill:
                cluster.swarm.create("ill", *quick, replicas=2, publish=["8001:8080"], image="mesh-lab/server:health")
                tasks = set(cluster.running("ill"))
            for _ in range(ill):
                tasks = cluster.replace("ill", tasks, sicken, "unhealthy")
        except TimeoutError as error:
            raise LabError(str(error)) from error
        finally:
            cluster.close()
        return cluster.changes


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind, and of all but flows to new tasks: {"kind", "changes", "p50", "p99", "max"}, milliseconds."""
    rows = []
    for kind in (*KINDS, "all"):
        values = sorted(
            change["ms"] for change in found if kind == change["kind"] or (kind == "all" and change["kind"] != "up")
        )
        if values:
            p99 = values[math.ceil(0.99 * len(values)) - 1]
            row = {"kind": kind, "changes": len(values), "p50": statistics.median(values), "p99": p99}
            rows.append({**row, "max": values[-1]})
    return rows


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Add to the raw data of the latest run what its report shows of this; other engines' rows stay."""
    raw = json.loads(path.read_text())
    new = {row["engine"] for row in rows}
    others = [row for row in raw.get("cluster", ()) if row["engine"] not in new]
    path.write_text(json.dumps(raw | {"cluster": [*others, *rows]}, indent=1))


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ill", type=int, default=ILL, help="containers that turn unhealthy")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: one after the other")
    parser.add_argument("--each", action="store_true", help="print each change too")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    try:
        rows = [row for engine in options.engine or ENGINES for row in measured(engine, options)]
    except LabError as error:
        print(f"bench.cluster: {error}", file=sys.stderr)
        return 1
    if (OUT / "latest.json").exists():
        keep(rows, OUT / "latest.json")
    for row in rows:
        p50, p99, most = (f"{row[key]:.1f}" for key in ("p50", "p99", "max"))
        what = f"{row['engine']:8} {row['kind']:10} {row['changes']:4} changes"
        print(f"{what}, ms: p50 {p50} p99 {p99} max {most}  {KINDS.get(row['kind'], ALL)}")
    return 0


def measured(engine: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one engine."""
    found = changes(engine, options.rounds, options.ill)
    for change in found if options.each else ():
        print(f"{engine:8} {change['kind']:10} {change['ms']:8.1f}  {change['nodes']}")
    return [{"engine": engine, **row} for row in summary(found)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
