# SPDX-License-Identifier: Apache-2.0
"""What happens to tasks and tables while flows go on: all of it random, by a seed, and written down."""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.flows.nodes import SERVICES, Nodes, Place, program
from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

SETTLED = 3.0  # seconds after a crash in which flows may still meet it: a client's SYN is sent again after 1 and 2


@dataclass
class Task:
    """One that came, and what became of it; times of CLOCK_MONOTONIC."""

    name: str
    service: str
    place: Place
    weight: int = 1
    drained: float = float("inf")  # from when on no node gives it new flows
    killed: float = float("inf")

    def row(self) -> dict[str, Any]:
        return {"name": self.name, "service": self.service, "place": self.place, "weight": self.weight}


@dataclass
class Trouble:
    """From when to when flows may fail, and why.

    Attributes:
        service: whose flows; "": of those that a proxy beside the programs serves, all.
        lossy: only that single datagrams are lost: those that are on their way to a task that leaves, or wait at a
            socket that another one replaces. UDP flows may stay with a drained task for as long as it is there.
    """

    service: str
    begun: float
    ended: float
    cause: str
    lossy: bool = False


class Caller:
    """A process that calls, and what it has said so far."""

    def __init__(self, nodes: Nodes, namespace: Namespace, seed: int, count: int, at_once: int, datagram: int) -> None:
        self.namespace, self.oldest = namespace, 0.0
        self.lines: list[str] = []
        command = (program(), "call", str(seed), str(count), str(at_once), "30")
        self.process = namespace.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin
        self.process.stdin.write(nodes.what(namespace, datagram))
        self.process.stdin.close()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line[0] == "F":
                self.lines.append(line)
            else:
                self.oldest = float(line[2:])
        self.oldest = float("inf")

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.thread.join()


@dataclass
class Changes:
    """Makes changes for as long as flows go on."""

    nodes: Nodes
    random: random.Random
    callers: list[Caller] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)  # that are served now
    all_tasks: dict[str, Task] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    made: dict[str, int] = field(default_factory=dict)  # changes by kind
    history: list[tuple[float, str]] = field(default_factory=list)  # when, and what the nodes serve from then on
    numbers: Any = field(default_factory=itertools.count)

    def begin(self) -> None:
        """Two tasks for each service."""
        self.admit(*(self._start(service) for service in SERVICES for _ in range(2)))

    def admit(self, *tasks: Task | None) -> None:
        """New tasks, once all nodes know them: until its own node has probed it, a task gets no flows."""
        new = [(task, task.weight) for task in tasks if task]
        for task, _ in new:
            task.weight = 0
        self.publish()
        for task, weight in new:
            task.weight = weight
        self.publish()

    def publish(self) -> None:
        """Tell the nodes, one after the other: for moments they do not agree."""
        rows = [task.row() for task in self.tasks]
        self.nodes.served = rows
        shown = (f"{t.name}@{t.place.namespace.short}*{t.weight}" for t in self.tasks)
        self.history.append((time.monotonic(), " ".join(shown)))
        begun = time.monotonic()
        for node in self.random.sample(self.nodes.nodes, len(self.nodes.nodes)):
            self.nodes.serve(node, rows)
            time.sleep(self.random.choice((0, 0, 0.02, 0.1)))
        self.troubles.append(Trouble("", begun, time.monotonic(), "tables changed", lossy=True))

    def step(self) -> None:
        """One change."""
        kinds = {self.come: 4, self.leave: 4, self.weigh: 2, self.crash: 2, self.vanish: 1}
        if self.nodes.engine == "kernel":
            kinds[self.restart] = 1
        (kind,) = self.random.choices(list(kinds), list(kinds.values()))
        if kind():
            self.made[kind.__name__] = self.made.get(kind.__name__, 0) + 1
        time.sleep(self.random.uniform(0.0, 0.2))

    def _of(self, service: str) -> list[Task]:
        return [task for task in self.tasks if task.service == service]

    def _start(self, service: str) -> Task | None:
        home = SERVICES[service].home
        possible = [p for p in self.nodes.places if p.reserved == bool(home) and home in ("", p.node.short)]
        free = [place for place in possible if place.process is None]
        if not free:
            return None
        place = self.random.choice(free)
        task = Task(f"{service}-{next(self.numbers)}", service, place, self.random.choice((1, 1, 2, 5)))
        place.start(task.name)
        self.tasks.append(task)
        self.all_tasks[task.name] = task
        return task

    def come(self) -> bool:
        """A task comes."""
        service = min(SERVICES, key=lambda name: (len(self._of(name)), self.random.random()))
        task = self._start(service)
        if task is None:
            return False
        self.admit(task)
        return True

    def _spare(self) -> Task | None:
        """One that is not its service's only."""
        found = [task for task in self.tasks if len(self._of(task.service)) > 1]
        return self.random.choice(found) if found else None

    def leave(self) -> bool:
        """A task is drained, and ends when its flows have: nobody is to notice."""
        task = self._spare()
        if task is None:
            return False
        self._drain(task)
        return True

    def _drain(self, task: Task) -> None:
        task.weight = 0
        self.publish()
        task.drained = time.monotonic()
        wait_for(lambda: all(c.oldest > task.drained for c in self.callers), f"end of the flows of {task.name}")
        begun = time.monotonic()
        self.tasks.remove(task)
        self.publish()
        task.killed = time.monotonic()
        task.place.kill()
        self.troubles.append(Trouble(task.service, begun, task.killed + 0.5, f"{task.name} had left", lossy=True))

    def weigh(self) -> bool:
        """A task gets another weight."""
        self.random.choice(self.tasks).weight = self.random.choice((1, 2, 3, 7))
        self.publish()
        return True

    def crash(self) -> bool:
        """A task dies, and the tables learn it a little later."""
        task = self._spare()
        if task is None:
            return False
        begun = task.killed = time.monotonic()
        task.place.kill()
        time.sleep(self.random.uniform(0, 0.4))
        self.tasks.remove(task)
        self.publish()
        self.troubles.append(Trouble(task.service, begun, time.monotonic() + SETTLED, f"{task.name} died"))
        return True

    def vanish(self) -> bool:
        """A service has no task for a moment."""
        service = self.random.choice(list(SERVICES))
        begun = time.monotonic()
        for task in self._of(service):
            task.killed = time.monotonic()
            task.place.kill()
            self.tasks.remove(task)
        self.publish()
        time.sleep(self.random.uniform(0, 0.5))
        self.admit(self._start(service), self._start(service))
        self.troubles.append(Trouble(service, begun, time.monotonic() + SETTLED, f"{service} had no task"))
        return True

    def restart(self) -> bool:
        """A node's agent is replaced by another one: the programs forward on, the proxy beside them does not."""
        begun, node = time.monotonic(), self.random.choice(self.nodes.nodes)
        self.history.append((time.monotonic(), f"agent of {node.short} ends"))
        self.nodes.restart(node)
        self.history.append((time.monotonic(), f"agent of {node.short} is there again"))
        self.troubles.append(Trouble("", begun, time.monotonic() + SETTLED, f"no agent on {node.short}"))
        return True

    def run(self, flows: int, datagram: int, *, at_once: int = 160) -> None:
        """Make changes until all callers are done with their shares of the flows.

        Raises:
            TimeoutError: they do not come to an end.
        """
        shares = (4, 1, 1)
        try:
            for namespace, share in zip(self.nodes.callers, shares, strict=True):
                seed, whole = self.random.getrandbits(60), sum(shares)
                more = (seed, flows * share // whole + 1, at_once * share // whole + 1, datagram)
                self.callers.append(Caller(self.nodes, namespace, *more))
            while any(caller.running for caller in self.callers):
                before = sum(len(caller.lines) for caller in self.callers)
                begun = time.monotonic()
                self.step()
                if time.monotonic() - begun > PATIENCE and sum(len(c.lines) for c in self.callers) == before:
                    raise TimeoutError("no flow has come to an end")
        finally:
            for caller in self.callers:
                caller.close()
