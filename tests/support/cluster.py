# SPDX-License-Identifier: Apache-2.0
"""A swarm of several nodes with an agent on each, and load at all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.daemon import Daemon, backends_of
from tests.support.lab.dockerd import Node, Swarm, bpf_fs
from tests.support.lab.netns import Namespace, run
from tests.support.polling import PATIENCE, wait_for

WEB = 8000
ENGINES = ["proxy", pytest.param("kernel", marks=pytest.mark.bpf)]


class Cluster:
    """A swarm with a daemon on each node, or on these, and a client beside it.

    Further arguments are configuration keys.
    """

    def __init__(
        self,
        swarm: Swarm,
        client: Namespace,
        *,
        engine: str = "proxy",
        nodes: Sequence[Node] | None = None,
        **config: object,
    ) -> None:
        self.swarm, self.client, self.engine, self._config = swarm, client, engine, config
        self.daemons = [self.daemon(node, engine) for node in (swarm.nodes if nodes is None else nodes)]

    def daemon(self, node: Node, engine: str, **more: object) -> Daemon:
        if engine == "kernel":
            more["bpf_fs"] = bpf_fs(self.swarm.lab, node.hostname)
        return Daemon(
            node.namespace,
            Path(self.swarm.lab.directory) / f"mesh-{engine}-{node.hostname}",
            **self._config,
            **more,
            wait=False,
            provider="swarm",
            engine=engine,
            docker_host=node.host,
            docker_data_root=node.data_root,
            docker_exec_root=node.exec_root,
        )

    def revive(self) -> None:
        """Start agents that a test before has left dead."""
        for daemon in self.daemons:
            if daemon.process.poll() is not None:
                daemon.start(wait=False)

    def wait_ready(self) -> None:
        for daemon in self.daemons:
            daemon.wait_ready()

    def sees(self, daemon: Daemon, service: str) -> set[str]:
        """Backends to which a daemon gives new connections, once it has applied what it knows."""
        state = daemon.state()
        if state["generation"]["applied"] != state["generation"]["desired"]:
            return set()
        return {backend for backend, weight in backends_of(state, service).items() if weight}

    def agree(self, service: str, count: int, *, timeout: float = PATIENCE) -> set[str]:
        """Until all daemons serve exactly the `count` tasks that Docker names, from equal tables, and know that each
        answers: Docker calls a task running before it listens."""
        self.swarm.wait_running(service, count)

        def all_see() -> set[str]:
            tasks = {task["ID"] for task in self.swarm.tasks(service)}
            return tasks if all(self.sees(d, service) == tasks for d in self.daemons) else set()

        try:
            tasks = wait_for(all_see, f"{count} backends of {service} on every node", timeout=timeout)
        except TimeoutError as error:
            seen = {d.namespace.short: sorted(self.sees(d, service)) for d in self.daemons}
            docker = sorted(task["ID"] for task in self.swarm.tasks(service))
            raise TimeoutError(f"{error}; Docker: {docker}, nodes: {seen}") from None
        wait_for(lambda: len(self.digests(service)) == 1, f"equal tables of {service} on every node")
        wait_for(lambda: all(self.is_probed(d, service) for d in self.daemons), f"each task of {service} was probed")
        return tasks

    @staticmethod
    def is_probed(daemon: Daemon, service: str) -> bool:
        """Whether the daemon knows of all backends that are reached by TCP whether they answer."""
        frontends = [f for s in daemon.state()["services"] if s["name"] == service for f in s["frontends"]]
        targets = [t for f in frontends if f["frontend"].endswith("/tcp") for t in f["targets"] if t["weight"]]
        return all(target["health"] != "unknown" for target in targets)

    def digests(self, service: str) -> set[str]:
        found = set()
        for daemon in self.daemons:
            for entry in daemon.state()["services"]:
                if entry["name"] == service:
                    found |= {frontend["digest"] for frontend in entry["frontends"]}
        return found

    @contextlib.contextmanager
    def load(self, *options: str, port: int = WEB, nodes: Sequence[Node] = ()) -> Iterator[Loads]:
        """New connections all the time at each of these nodes (default: all).

        From an address of its own for each.
        """
        loads = Loads()
        with contextlib.ExitStack() as stack:
            for node in nodes or self.swarm.nodes:
                source = ("-b", self._source(self.swarm.nodes.index(node)))
                running = peers.Load(self.client, node.address, port, *(options or STEADY), *source)
                loads.add(node.hostname, stack.enter_context(running))
            yield loads

    def _source(self, number: int) -> str:
        """The client's address for calls to a node."""
        address = f"192.0.2.{100 + int(self.client.address.rpartition('.')[2]) % 25 * 5 + number}"
        if address not in self.client.addresses:
            self.client.add_address("eth0", f"{address}/24")
        return address

    @contextlib.contextmanager
    def configured(self, **keys: object) -> Iterator[None]:
        """Agents with other configuration inside the block, one after the other on each node."""
        before = self._config
        self._replace(before | keys)
        try:
            yield
        finally:
            self._replace(before)

    def _replace(self, config: dict[str, object]) -> None:
        self._config = config
        with ThreadPoolExecutor(len(self.daemons)) as pool:
            list(pool.map(Daemon.close, self.daemons))
        self.daemons = [self.daemon(node, self.engine) for node in self.swarm.nodes]
        self.wait_ready()

    def close(self) -> None:
        """End the agents; with the kernel engine nothing of them is left on the nodes, which others use next."""
        end = Daemon.release if self.engine == "kernel" else Daemon.close
        with ThreadPoolExecutor(len(self.daemons)) as pool:
            list(pool.map(end, self.daemons))

    def tails(self) -> str:
        return "\n".join(f"--- {d.namespace.short}\n{d.tail(4000)}" for d in self.daemons)


STEADY = ("-n", "0", "-c", "16", "-r", "25")


class Loads:
    """Loads at several nodes."""

    def __init__(self) -> None:
        self._loads: dict[str, peers.Load] = {}

    def add(self, node: str, load: peers.Load) -> None:
        self._loads[node] = load

    def wait_more(self, count: int = 100) -> None:
        """Until each has had so many further answers, counted from now for all."""
        with ThreadPoolExecutor(len(self._loads)) as pool:
            list(pool.map(lambda load: load.wait_more(count), self._loads.values()))

    def stop(self) -> dict[str, peers.Report]:
        """End them all; reports by node."""
        return {node: load.stop() for node, load in self._loads.items()}


def failures(reports: dict[str, peers.Report]) -> dict[str, Any]:
    """What failed, by node; empty where all is well. Each node must have answered at all."""
    silent = {node: "no answer at all" for node, report in reports.items() if not report.ok}
    return silent | {node: report.failures for node, report in reports.items() if report.failures}


@contextlib.contextmanager
def blocked(swarm: Swarm, *rules: str, table: str = "blocked") -> Iterator[None]:
    """What the network between the nodes drops."""
    text = "\n".join(f"{rule} drop;" for rule in rules)
    filters = f"table bridge {table} {{\nchain f {{ type filter hook forward priority 0; {text}\n}}\n}}"
    run(*swarm.lab.switch.command("nft", "-f", "-"), input=filters)
    try:
        yield
    finally:
        swarm.lab.switch.run("nft", "delete", "table", "bridge", table)
