# SPDX-License-Identifier: Apache-2.0
"""A large swarm on paper: what it costs two agents, and how late they are. `python -m bench.scale --help`.

The swarm is simulated (bench.scale_swarm); the two agents are real, each in a network namespace of its own, with real
relay, certificates and engines. Staleness is read from their logs: when an agent tells of a change after it was
applied, less when the simulated swarm made it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import http.client
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from bench import machine
from bench.lab import OUT, LabError, run, within
from bench.peers.mesh import ISOLATE, MESH
from bench.scale_report import HEADERS, ROLES, rows
from bench.scale_swarm import Settings
from mesh.datapath.kernel.attach import cgroup_root

PREFIX: Final = "meshscale"
ENGINES: Final = ("proxy", "kernel")
ADDRESSES: Final = dict(zip(ROLES, ("10.92.0.1", "10.92.0.2"), strict=True))
PORT: Final = 9551
OTHERS: Final = "10.93.0.0/16"  # addresses of the other nodes
REFUSING: Final = (
    "add table inet others; add chain inet others in { type filter hook input priority 0; }; "
    f"add rule inet others in ip daddr {OTHERS} tcp dport {PORT} reject with tcp reset"
)
RATE: Final = 50.0  # changes a second
WINDOW: Final = 20.0  # seconds that are measured
WARM: Final = 3.0  # seconds of churn before that
READY: Final = 60.0  # seconds until both agents serve
LIMIT: Final = 420.0  # seconds for all parts; what is not measured by then is told as such
LATE: Final = 3.0  # seconds after the window in which what was changed in it may still arrive
SCRAPE: Final = 4.0  # seconds between scrapes
WORDS: Final = {"backend gone": "gone", "backend draining": "draining"}  # all else about a new backend: it serves
TASK: Final = (
    "import asyncio,sys\n"
    "async def call(r, w): w.close()\n"
    "async def main(): await (await asyncio.start_server(call, '::', 80)).serve_forever()\n"
    "asyncio.run(main())"
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a swarm is."""

    nodes: int
    services: int
    tasks: int
    rate: float  # changes a second
    peers: int = 997  # nodes whose agents are simulated too

    def times(self, factor: float) -> Size:
        """So many times as large, with as many simulated agents."""
        nodes, services, tasks = (int(each * factor) for each in (self.nodes, self.services, self.tasks))
        return dataclasses.replace(self, nodes=nodes, services=services, tasks=tasks)


SIZE: Final = Size(1000, 500, 10_000, RATE)
LARGEST: Final = 6.0  # times SIZE; there is room for 65,534 backends (MESH_MAX_BACKENDS)
TENFOLD: Final = (dataclasses.replace(SIZE, rate=10 * RATE), SIZE.times(LARGEST))


class Location:
    """A node: a namespace with an uplink, and a bridge with the addresses of its own tasks."""

    def __init__(self, name: str, tasks: int) -> None:
        self.name = name
        self.namespace, self.inside = (f"{PREFIX}{os.getpid()}{kind}{name[0]}" for kind in "nt")
        for each in (self.namespace, self.inside):
            run("ip", "netns", "add", each)
            run("ip", "-n", each, "link", "set", "lo", "up")
        host = ("ip", "-n", self.namespace)
        run(*host, "link", "add", "docker_gwbridge", "type", "bridge")
        run(*host, "address", "add", "172.18.0.1/16", "dev", "docker_gwbridge")
        run(*host, "link", "add", "task0", "type", "veth", "peer", "name", "eth0", "netns", self.inside)
        run(*host, "link", "set", "task0", "master", "docker_gwbridge", "up")
        run(*host, "link", "set", "docker_gwbridge", "up")
        run("ip", "-n", self.inside, "link", "set", "eth0", "up")
        for number in range(tasks):
            run("ip", "-n", self.inside, "address", "add", f"172.18.1.{1 + number}/16", "dev", "eth0")
        self.command("sysctl", "-qw", "net.ipv4.ip_local_port_range=32768 60999")

    def enter(self, namespace: str, *argv: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{namespace}", *argv]

    def command(self, *argv: str) -> str:
        return run(*self.enter(self.namespace, *argv))

    def remove(self) -> None:
        for each in (self.namespace, self.inside):
            run("ip", "netns", "delete", each, check=False)


class Daemon:
    """A real agent: its process, its control socket, its log."""

    def __init__(self, place: Location, engine: str, directory: Path) -> None:
        self.name, self.engine, self._place = place.name, engine, place
        self._directory = directory / place.name
        self.state = self._directory / f"state-{engine}"
        self.log = self._directory / f"{engine}.log"
        root = cgroup_root() if engine == "kernel" else None
        self._cgroup = root / place.namespace if root else None
        if self._cgroup:
            self._cgroup.mkdir(exist_ok=True)
        pins = self._directory / "bpf"
        pins.mkdir(exist_ok=True)
        argv = [str(MESH), "run", "--engine", engine, "--provider", "swarm", "--intercept", "bind"]
        argv += ["--docker-host", f"unix://{self._directory}/docker.sock", "--state-dir", str(self.state)]
        argv += [
            "--docker-data-root",
            str(self._directory / "data"),
            "--docker-exec-root",
            str(self._directory / "exec"),
        ]
        argv += ["--cluster-managers", ADDRESSES["manager"], "--cluster-port", str(PORT), "--http-listen", ""]
        argv += ["--drain-timeout", "0", "--log-format", "json", "--bpf-fs", str(pins)]
        argv += ["--cgroup", str(self._cgroup)] if self._cgroup else []
        self.began = time.time()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(place.enter(place.namespace, *ISOLATE, str(pins), *argv), stderr=log)

    def get(self, path: str) -> bytes:
        """An answer from the control socket."""
        connection = http.client.HTTPConnection("mesh", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(20)
        try:
            connection.sock.connect(str(self.state / "mesh.sock"))
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def lines(self) -> Iterator[dict[str, Any]]:
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def wait(self, served: int, patience: float) -> float:
        """Wait until it serves so many ports; returns the seconds that took since it was started."""
        while time.time() < self.began + patience:
            if self.process.poll() is not None:
                raise LabError(f"the {self.name}'s agent ended: {self.log.read_text()[-600:]}")
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                if (
                    sum(f["served"] for s in json.loads(self.get("/state"))["services"] for f in s["frontends"])
                    >= served
                ):
                    return time.time() - self.began
            time.sleep(0.2)
        raise LabError(f"the {self.name}'s agent does not serve {served} ports: {self.log.read_text()[-600:]}")

    def usage(self) -> dict[str, float]:
        """CPU seconds so far, memory, bytes through its interfaces."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        rows = Path(f"/proc/{self.process.pid}/net/dev").read_text().splitlines()[2:]
        received = {name.strip(): int(rest.split()[0]) for name, _, rest in (row.partition(":") for row in rows)}
        sent = {name.strip(): int(rest.split()[8]) for name, _, rest in (row.partition(":") for row in rows)}
        return {
            "cpu": (int(fields[11]) + int(fields[12])) / machine.TICKS,
            "memory": machine.proportional_memory([self.process.pid]),
            "uplink": received["up0"] + sent["up0"],
            "loopback": received["lo"],
        }

    def stop(self) -> None:
        if self.engine == "kernel" and self.process.poll() is None:
            argv = [str(MESH), "stop", "--release", "--timeout", "10", "--state-dir", str(self.state)]
            run(*self._place.enter(self._place.namespace, *argv), check=False)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._cgroup:
            self._cgroup.rmdir()


class Swarm:
    """The process that simulates it, in the manager's namespace."""

    def __init__(self, place: Location, settings: Settings) -> None:
        argv = place.enter(place.namespace, sys.executable, "-m", "bench.scale_swarm")
        argv.append(json.dumps(dataclasses.asdict(settings)))
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise LabError("the simulated swarm has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **what: object) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and greatest."""
    if not values:
        return {}
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[math.ceil(0.99 * len(ordered)) - 1], "max": ordered[-1]}


def staleness(
    lines: Iterator[dict[str, Any]], changes: Sequence[Sequence[Any]], since: float, until: float
) -> dict[str, Any]:
    """How late an agent told of the changes between two times, by seconds; how many it never told of."""
    told: dict[tuple[str, str], float] = {}
    for line in lines:
        event = str(line.get("event", ""))
        if event.startswith("backend ") and "id" in line:
            what = WORDS.get(event, "new")
            at = datetime.datetime.fromisoformat(line["timestamp"]).timestamp()
            told.setdefault((what, line["id"]), at)
    wanted = [(what, task, at) for at, what, task, _ in changes if since <= at < until]
    late = [told[what, task] - at for what, task, at in wanted if (what, task) in told]
    return {"changes": len(wanted), "untold": len(wanted) - len(late), **percentiles(late)}


class Scraper(threading.Thread):
    """Scrapes an agent as Prometheus would, and keeps how long that and the applies took."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self._of, self._ended = daemon, threading.Event()
        self.seconds: list[float] = []
        self.applies: list[float] = []
        self.problems: list[str] = []

    def run(self) -> None:
        while not self._ended.wait(SCRAPE):
            began = time.perf_counter()
            try:
                text = self._of.get("/metrics").decode()
            except (OSError, http.client.HTTPException) as error:
                self.problems.append(str(error))
                continue
            self.seconds.append(time.perf_counter() - began)
            if found := re.search(r"^mesh_apply_last_seconds (\S+)$", text, re.MULTILINE):
                self.applies.append(float(found[1]))

    def end(self) -> None:
        self._ended.set()
        self.join()


@contextlib.contextmanager
def places(tasks: int) -> Iterator[dict[str, Location]]:
    """Both nodes, joined, each with a process that answers for its tasks."""
    made: dict[str, Location] = {}
    answering = []
    try:
        for name in ADDRESSES:
            made[name] = Location(name, tasks)
        ends = [made[name].namespace for name in ADDRESSES]
        run("ip", "-n", ends[0], "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", ends[1])
        for name, place in made.items():
            run("ip", "-n", place.namespace, "address", "add", f"{ADDRESSES[name]}/24", "dev", "up0")
            run("ip", "-n", place.namespace, "link", "set", "up0", "up")
            # The other nodes' agents are in the manager's namespace: there, their nodes answer, by refusing.
            run("ip", "-n", place.namespace, "route", "add", "local", OTHERS, "dev", "lo")
            place.command("nft", REFUSING)
            answering.append(subprocess.Popen(place.enter(place.inside, sys.executable, "-c", TASK)))
        yield made
    finally:
        for process in answering:
            process.kill()
            process.wait()
        for place in made.values():
            place.remove()


def measure(size: Size, engine: str, window: float, patience: float) -> dict[str, Any]:
    """Both agents with an engine, through a window of churn. Ends within `patience` seconds, and those to clean up."""
    own = size.tasks // size.nodes
    files = tempfile.TemporaryDirectory(prefix=PREFIX)
    with files as name, places(own) as found, contextlib.ExitStack() as stack, within(patience):
        directory = Path(name)
        settings = Settings(
            name, size.nodes, size.services, size.tasks, size.peers, ADDRESSES["manager"], ADDRESSES["worker"], PORT
        )
        swarm = Swarm(found["manager"], settings)
        stack.callback(swarm.stop)
        daemons = {}
        row: dict[str, Any] = {"engine": engine, "size": dataclasses.asdict(size), "window": window, "agents": {}}
        for role, place in found.items():
            daemons[role] = Daemon(place, engine, directory)
            stack.callback(daemons[role].stop)
        for role, daemon in daemons.items():
            row["agents"][role] = {"start": daemon.wait(size.services, READY * size.tasks / SIZE.tasks)}
        deadline = time.monotonic() + READY
        while swarm.ask().get("agents", 0) < size.peers and time.monotonic() < deadline:
            time.sleep(0.5)
        swarm.ask(churn=size.rate)
        time.sleep(WARM)
        scrapers = {role: Scraper(daemon) for role, daemon in daemons.items()}
        for scraper in scrapers.values():
            scraper.start()
        before, usage, began = swarm.ask(), {role: d.usage() for role, d in daemons.items()}, time.time()
        time.sleep(window)
        after, used, ended = swarm.ask(), {role: d.usage() for role, d in daemons.items()}, time.time()
        for scraper in scrapers.values():
            scraper.end()
        swarm.ask(churn=0)
        time.sleep(LATE)
        changes = swarm.ask(changes=True)["changes"]
        seconds = ended - began
        for role, daemon in daemons.items():
            per_second = {key: (used[role][key] - usage[role][key]) / seconds for key in ("cpu", "uplink", "loopback")}
            scraper = scrapers[role]
            row["agents"][role] |= {
                "cpu": per_second["cpu"],
                "memory": used[role]["memory"],
                "uplink": per_second["uplink"],
                "loopback": per_second["loopback"],
                "scrape": percentiles(scraper.seconds),
                "apply": percentiles(scraper.applies),
                "problems": scraper.problems,
                "staleness": staleness(daemon.lines(), changes, began, ended),
                "errors": sorted({str(x["event"]) for x in daemon.lines() if x.get("level") in ("error", "critical")}),
            }
        for key in ("engine_bytes", "reads", "relay_frames", "relay_bytes", "cpu"):
            row[f"swarm_{key}"] = (after.get(key, 0) - before.get(key, 0)) / seconds
        row["peers"] = after.get("agents", 0)
        row["peers_lost"] = after.get("agents_lost", 0)
        if keep := os.environ.get("BENCH_SCALE_LOGS"):
            for daemon in daemons.values():
                (Path(keep) / f"{daemon.name}-{engine}.log").write_bytes(daemon.log.read_bytes())
        return row


def main(argv: Sequence[str]) -> int:
    """Measure and print; raw JSON into a file if asked."""
    parser = argparse.ArgumentParser(prog="bench.scale", description=__doc__)
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--factor", type=float, default=1.0, help="so many times as large; then nothing else")
    parser.add_argument("--rate", type=float, default=RATE, help="changes a second; if not the default, nothing else")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds")
    parser.add_argument("--peers", type=int, default=SIZE.peers, help="other nodes whose agents call the manager")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all of it")
    parser.add_argument("--raw", type=Path, help="write raw JSON here")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    size = dataclasses.replace(SIZE.times(options.factor), peers=options.peers, rate=options.rate)
    usual = (options.factor, options.rate, options.peers) == (1.0, RATE, SIZE.peers)
    engines, end = options.engine or ENGINES, time.monotonic() + options.limit
    found: list[dict[str, Any]] = []
    for part, engine in [(size, each) for each in engines] + [(beyond, engines[0]) for beyond in TENFOLD if usual]:
        try:
            found.append(measure(part, engine, options.window, end - time.monotonic()))
        except LabError as error:  # that something gives way is a result, too
            found.append({"engine": engine, "size": dataclasses.asdict(part), "failed": str(error)[:200]})
    print(tabulate(rows(found), HEADERS))
    if (OUT / "latest.json").exists() and usual:
        latest = json.loads((OUT / "latest.json").read_text())
        (OUT / "latest.json").write_text(json.dumps(latest | {"scale": found}, indent=1))
    if options.raw:
        options.raw.write_text(json.dumps(found, indent=1))
    return int(any("failed" in row for row in found[: len(engines)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
