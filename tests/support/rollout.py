# SPDX-License-Identifier: Apache-2.0
"""A roll-out of mesh over a swarm, step by step, while clients call every node all the time."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import peers
from tests.support.cluster import WEB, Cluster
from tests.support.daemon import Daemon
from tests.support.lab.dockerd import Node, Swarm
from tests.support.lab.netns import Namespace, run
from tests.support.polling import wait_for
from tests.support.stand_in import StandIn

ONE = WEB + 1  # the port of a service with a single task
LOADS = ((WEB, "40"), (ONE, "15"))  # port, and new connections a second at each node
TIMEOUT = "20"  # seconds a client waits: the kernel repeats what is lost after 1, 3, 7 and 15
TUNNEL, PEER, PEER_UDP = "udp dport 6084", "tcp dport 9552", "udp dport 9552"
CLOSURES = ((TUNNEL,), (PEER,), (PEER, PEER_UDP), (TUNNEL, PEER, PEER_UDP))


class Rollout:
    """Nodes with and without an agent, and what clients of all nodes have seen.

    Args:
        engines: of which each node gets one.
        choose: what decides everything that is left to chance.
        stand_in: for Docker's own mesh; None: Docker's own mesh is there.
    """

    def __init__(
        self, swarm: Swarm, stand_in: StandIn | None, client: Namespace, engines: Sequence[str], choose: random.Random
    ) -> None:
        self.swarm, self.stand_in, self.choose = swarm, stand_in, choose
        self.cluster = Cluster(swarm, client, nodes=())
        self.engines = {node.hostname: choose.choice(engines) for node in swarm.nodes}
        self._engines = engines
        self.daemons: dict[str, Daemon] = {}  # by node
        self.served = 0  # new connections
        self.failures: list[str] = []
        self.steps: list[str] = []  # what was done, for the report

    # ---- steps ----

    def install(self, node: Node, **more: object) -> None:
        """An agent on a node that has none, until it is ready, which takes a manager's agent."""
        engine = self.engines.setdefault(node.hostname, self.choose.choice(self._engines))
        with self.step(f"install on {node.hostname} ({engine})"):
            daemon = self.daemons[node.hostname] = self.cluster.daemon(node, engine, **more)
            self.cluster.daemons.append(daemon)
            if any(each.namespace is self.swarm.manager.namespace for each in self.daemons.values()):
                for each in self.daemons.values():
                    each.wait_ready()
            time.sleep(self.choose.uniform(0.2, 1.0))

    def begin_with(self, program: Path) -> None:
        """Agents of another build on all nodes, before anybody calls them."""
        for node in self.swarm.nodes:
            engine = self.engines[node.hostname]
            self.daemons[node.hostname] = self.cluster.daemon(node, engine, program=program)
        self.cluster.daemons += self.daemons.values()
        self.cluster.wait_ready()
        for port in dict(LOADS):
            for node in self.swarm.nodes:
                wait_for(lambda port=port, node=node: self._serves(node, port), f"{node.hostname}:{port} is served")

    def _serves(self, node: Node, port: int) -> bool:
        return peers.load(self.cluster.client, node.address, port, "-n", "100", "-c", "4", "-T", "3").ok == 100

    def join(self, node: Node, tasks: int) -> None:
        """A node without an agent joins and gets its share of so many tasks of `web`."""
        with self.step(f"{node.hostname} joins"):
            self.swarm.join(node)
            if self.stand_in is not None:
                self.stand_in.add(node)
            self.swarm.docker("service", "scale", "--detach", f"web={tasks}")
            self.swarm.wait_running("web", tasks)
            if self.stand_in is not None:
                self.stand_in.wait()

    def take_over(self, node: Node, program: Path | None = None) -> None:
        """A new process in the place of the one that runs; of another build, if one is given."""
        daemon = self.daemons[node.hostname]
        with self.step(f"upgrade of {node.hostname} ({self.engines[node.hostname]})"):
            before = daemon.process
            daemon.program = program or daemon.program
            daemon.start("--take-over", wait=False)
            before.wait(60)
            daemon.wait_ready()

    def remove(self, node: Node) -> None:
        daemon = self.daemons.pop(node.hostname)
        with self.step(f"removal from {node.hostname} ({self.engines[node.hostname]})"):
            self.cluster.daemons.remove(daemon)
            daemon.release()

    @contextlib.contextmanager
    def closed(self, ports: Sequence[str]) -> Iterator[None]:
        """A firewall between the nodes closes these ports for the block."""
        rules = "\n".join(f"{rule} drop;" for rule in ports)
        table = f"table bridge closed {{\nchain f {{ type filter hook forward priority 0; {rules}\n}}\n}}"
        switch = self.swarm.lab.switch
        run(*switch.command("nft", "-f", "-"), input=table)
        try:
            yield
        finally:
            switch.run("nft", "delete", "table", "bridge", "closed")

    def disturb(self, ports: Sequence[str] = ()) -> None:
        """Close ports between all nodes for some seconds."""
        ports = ports or self.choose.choice(CLOSURES)
        with self.step(f"{', '.join(ports)} closed and opened"):
            with self.closed(ports):
                time.sleep(self.choose.uniform(2.5, 4.0))
            time.sleep(0.5)

    # ---- load ----

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Something is done while clients call all nodes; what failed of it is kept."""
        began = time.monotonic()
        nodes = list(self.swarm.nodes)
        with contextlib.ExitStack() as stack:
            loads = {
                port: stack.enter_context(
                    self.cluster.load("-n", "0", "-c", "64", "-r", rate, "-T", TIMEOUT, port=port, nodes=nodes)
                )
                for port, rate in LOADS
            }
            try:
                yield
            finally:
                with ThreadPoolExecutor(len(loads)) as pool:
                    reports = dict(zip(loads, pool.map(lambda each: each.stop(), loads.values()), strict=True))
        slowest = max(report.longest for found in reports.values() for report in found.values())
        self.steps.append(f"{name}: {time.monotonic() - began:.1f} s, slowest answer {slowest:.1f} s")
        for port, found in reports.items():
            for node, report in found.items():
                self.served += report.ok
                if report.failures:
                    self.failures.append(f"{name}: {node}:{port} {report.failures} of {report.started}")

    def __str__(self) -> str:
        return "\n".join([f"{self.served} connections served", *self.steps, *self.failures])
