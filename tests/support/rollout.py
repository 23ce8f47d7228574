# SPDX-License-Identifier: Apache-2.0
"""A roll-out of mesh over a swarm, step by step, while clients call every node all the time."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
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
LOADS = {WEB: 40, ONE: 15}  # port, and new connections a second to it at each node
TIMEOUT = "20"  # seconds a client waits: the kernel repeats what is lost after 1, 3, 7 and 15
TUNNEL, PEER, PEER_UDP = "udp dport 6084", "tcp dport 9552", "udp dport 9552"
CLOSURES = ((TUNNEL,), (PEER,), (PEER, PEER_UDP), (TUNNEL, PEER, PEER_UDP))

log = logging.getLogger(__name__)


def taken_by_docker(node: Node, port: int) -> int:
    """Connections to a port that Docker's rules of a node have taken so far."""
    shown = run(*node.inside("iptables", "-t", "nat", "-nvxL", "DOCKER-INGRESS")).stdout
    return sum(int(n) for n in re.findall(rf"^ *(\d+) .*tcp dpt:{port} ", shown, re.MULTILINE))


class Rollout:
    """Nodes with and without an agent, and what clients of all nodes have seen.

    Args:
        engines: of which each node gets one.
        choose: what decides everything that is left to chance.
        stand_in: for Docker's own mesh; None: Docker's own mesh is there.
        loads: ports, and how many new connections a second each node gets there.
    """

    def __init__(
        self,
        swarm: Swarm,
        stand_in: StandIn | None,
        client: Namespace,
        engines: Sequence[str],
        choose: random.Random,
        loads: Mapping[int, int] = LOADS,
    ) -> None:
        self.swarm, self.stand_in, self.choose, self.loads = swarm, stand_in, choose, loads
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
        self.wait_served()

    def wait_served(self) -> None:
        """Until all nodes serve all ports, which Docker begins with on some nodes later than on others."""
        for port in self.loads:
            for node in self.swarm.nodes:
                wait_for(lambda port=port, node=node: self._serves(node, port), f"{node.hostname}:{port} is served")

    def _serves(self, node: Node, port: int) -> bool:
        return peers.load(self.cluster.client, node.address, port, "-n", "100", "-c", "4", "-T", "3").ok == 100

    def served_by_docker(self) -> None:
        """All nodes serve without an agent."""
        if self.stand_in is not None:
            self.stand_in.wait()
        for node in self.swarm.nodes:
            for port in self.loads:
                report = peers.load(self.cluster.client, node.address, port, "-n", "100", "-c", "8")
                assert (report.ok, report.failures) == (100, ()), (node.hostname, port, report)

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

    def passes(self) -> None:
        """With all paths closed, the only task of `one` is reached by Docker's own mesh from all nodes but its own."""
        nodes = self.swarm.nodes
        before = {node.hostname: taken_by_docker(node, ONE) for node in nodes}
        self.disturb((TUNNEL, PEER, PEER_UDP))
        after = {node.hostname: taken_by_docker(node, ONE) for node in nodes}
        assert sum(after[name] > before[name] for name in after) == len(nodes) - 1, (before, after)

    # ---- load ----

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Something is done while clients call all nodes; what failed of it is kept."""
        began = time.monotonic()
        nodes = list(self.swarm.nodes)
        with contextlib.ExitStack() as stack:
            loads = {
                port: stack.enter_context(
                    self.cluster.load("-n", "0", "-c", "64", "-r", str(rate), "-T", TIMEOUT, port=port, nodes=nodes)
                )
                for port, rate in self.loads.items()
            }
            try:
                yield
            finally:
                with ThreadPoolExecutor(len(loads)) as pool:
                    reports = dict(zip(loads, pool.map(lambda each: each.stop(), loads.values()), strict=True))
        slowest = max(report.longest for found in reports.values() for report in found.values())
        self.steps.append(f"{name}: {time.monotonic() - began:.1f} s, slowest answer {slowest:.1f} s")
        log.info("%s", self.steps[-1])
        for port, found in reports.items():
            for node, report in found.items():
                self.served += report.ok
                if report.failures:
                    self.failures.append(f"{name}: {node}:{port} {report.failures} of {report.started}")
                    log.info("failed: %s", self.failures[-1])

    def __str__(self) -> str:
        return "\n".join([f"{self.served} connections served", *self.steps, *self.failures])
