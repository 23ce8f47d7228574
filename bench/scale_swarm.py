# SPDX-License-Identifier: Apache-2.0
"""A swarm that exists in memory only: what its Engines would answer, what changes, and the agents of its other nodes.

A process of its own (`python -m bench.scale_swarm SETTINGS`), told by lines of JSON what to do. The answers have the
fields, and so the size, of a real Engine's. Times are Unix seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import h2.config
import h2.connection
import h2.events
import uvloop
from aiohttp import web

from bench.scale_bodies import FIRST_PORT, Task, ident, node_body, service_body, task_body, watch_message
from bench.scale_certificates import Authority
from mesh.cluster import wire
from mesh.cluster.heartbeat import Heartbeats

DRAIN: Final = 2.0  # seconds from the order to stop a task until its container ends
PROBE: Final = 0.05  # seconds from the start of a task until its node's agent has probed it
REPORT: Final = 1.0  # seconds between reports of an agent
CALL: Final = 15.0  # seconds that a call may take
MANAGERS: Final = 3  # among which the other nodes' agents spread for the inventory
SLICE: Final = 0.02  # seconds between looks at what should have changed by now


@dataclass(frozen=True)
class Settings:
    """What is simulated, and where."""

    directory: str
    nodes: int
    services: int
    tasks: int
    peers: int  # nodes whose agents call
    manager: str  # address of the manager that is measured
    worker: str
    port: int  # at which the manager's agent is called


@dataclass
class Swarm:
    """All of it. Node 0 is the manager that is measured, node 1 the worker."""

    settings: Settings
    tasks: dict[int, Task] = field(default_factory=dict)  # by number; dead ones stay, as swarm keeps them
    by_id: dict[str, Task] = field(default_factory=dict)
    by_node: dict[int, dict[str, Task]] = field(default_factory=dict)  # running
    changes: list[tuple[float, str, str, int]] = field(default_factory=list)  # (when, what, task's id, node)
    changed: set[int] = field(default_factory=set)  # services, since the last report of the agents
    counts: Counter[str] = field(default_factory=Counter)
    rings: dict[int, asyncio.Event] = field(default_factory=dict)  # by node: its tasks have changed
    watchers: set[asyncio.Queue[Task]] = field(default_factory=set)
    next: int = 0

    def __post_init__(self) -> None:
        s = self.settings
        self.random = random.Random(1)
        self.pulses = Heartbeats()
        for number in range(s.tasks):
            self._start(number % s.services, number // s.services + 1, number % s.nodes)
        self.services = json.dumps([service_body(i, s.tasks // s.services) for i in range(s.services)]).encode()
        self.nodes = json.dumps([node_body(i, self.address(i)) for i in range(s.nodes)]).encode()

    def address(self, node: int) -> str:
        own = {0: self.settings.manager, 1: self.settings.worker}
        return own.get(node, f"10.93.{node >> 8 & 255}.{node & 255}")

    def _start(self, service: int, slot: int, node: int) -> Task:
        task = Task(self.next, service, slot, node)
        self.next += 1
        self._store(task)
        self.by_node.setdefault(node, {})[task.id] = task
        return task

    def _store(self, task: Task) -> None:
        task.body = task_body(task)
        self.tasks[task.number] = self.by_id[task.id] = task

    def replace(self) -> Task:
        """A task is told to stop, another of its service starts on a third node; two changes. Returns the old one."""
        while True:
            node = self.random.randrange(2, self.settings.nodes)
            mine = [task for task in self.by_node.get(node, {}).values() if task.desired == "running"]
            if mine:
                break
        old = self.random.choice(mine)
        old.desired = "shutdown"
        self._store(old)
        new = self._start(old.service, old.slot, self.random.randrange(2, self.settings.nodes))
        self._note(old, "draining")
        self._note(new, "new")
        return old

    def end(self, task: Task) -> None:
        """Its container has ended."""
        task.state = "shutdown"
        self._store(task)
        del self.by_node[task.node][task.id]
        self._note(task, "gone")

    def _note(self, task: Task, what: str) -> None:
        self.changes.append((time.time(), what, task.id, task.node))
        self.changed.add(task.service)
        if task.node in self.rings:
            self.rings[task.node].set()
        for watcher in self.watchers:
            watcher.put_nowait(task)

    async def churn(self, rate: float) -> None:
        """`rate` changes a second, of which a replaced task has three."""
        began, done = time.monotonic(), 0
        ending: list[tuple[float, Task]] = []
        while True:
            now = time.monotonic()
            while ending and ending[0][0] <= now:
                self.end(ending.pop(0)[1])
                done += 1
            while done + len(ending) < (now - began) * rate:
                ending.append((now + DRAIN, self.replace()))
                done += 2
            await asyncio.sleep(SLICE)

    # ---- Engines ----

    def engine(self, node: int) -> web.Application:
        """A node's Engine, as far as it is asked."""
        app = web.Application()
        addresses = {task.container: task for task in self.by_node.get(node, {}).values()}
        containers = [
            {"Id": c, "State": "running", "Labels": {"com.docker.swarm.task.id": t.id}} for c, t in addresses.items()
        ]
        reached = {c: {"IPv4Address": f"172.18.1.{1 + i}/16"} for i, c in enumerate(addresses)}
        remote = [{"NodeID": ident("n", 0), "Addr": f"{self.settings.manager}:2377"}]
        about = {"NodeID": ident("n", node), "NodeAddr": self.address(node), "LocalNodeState": "active"}
        answers: dict[str, Any] = {
            "/version": {"ApiVersion": "1.41", "MinAPIVersion": "1.12"},
            "/info": {"Name": "host", "Swarm": {**about, "ControlAvailable": not node, "RemoteManagers": remote}},
            "/networks/docker_gwbridge": {"Name": "docker_gwbridge", "Containers": reached},
        }

        async def answer(request: web.Request) -> web.StreamResponse:
            path = request.path.removeprefix("/v1.41")
            if path == "/events":
                reply = web.StreamResponse()
                await reply.prepare(request)
                await asyncio.Event().wait()
            if path == "/tasks":
                named = json.loads(request.query.get("filters", "{}")).get("id")
                chosen = self.tasks.values() if named is None else filter(None, map(self.by_id.get, named))
                body = b"[" + b",".join(task.body for task in chosen) + b"]"
            elif path == "/containers/json":
                body = json.dumps([] if "health" in request.query_string else containers).encode()
            else:
                body = {"/services": self.services, "/nodes": self.nodes}.get(path) or json.dumps(
                    answers[path]
                ).encode()
            if not node:
                self.counts["engine_bytes"] += len(body)
                self.counts["reads"] += path == "/containers/json" and "health" in request.query_string
            return web.Response(body=body, content_type="application/json")

        app.router.add_get("/{path:.*}", answer)
        return app

    async def watch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Swarmkit's Watch: a message for every change of a task."""
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        changed: asyncio.Queue[Task] = asyncio.Queue()
        self.watchers.add(changed)

        async def ring(stream: int) -> None:
            while True:
                message = watch_message(await changed.get())
                while http.local_flow_control_window(stream) < len(message):  # noqa: ASYNC110 -- opened by `watch`
                    await asyncio.sleep(SLICE)
                http.send_data(stream, message)
                writer.write(http.data_to_send())

        rings: list[asyncio.Task[None]] = []
        try:
            writer.write(http.data_to_send())
            while data := await reader.read(65536):
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        http.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                        rings.append(asyncio.create_task(ring(event.stream_id)))
                writer.write(http.data_to_send())
        except (OSError, ssl.SSLError):
            pass
        finally:
            for each in rings:
                each.cancel()
            self.watchers.discard(changed)
            writer.close()

    # ---- agents of the other nodes ----

    def report(self, node: int, told: dict[str, str]) -> bytes:
        """As a node's agent says it that has `told` digests before."""
        verdicts = {task.id: wire.HealthReport("up") for task in self.by_node.get(node, {}).values()}
        digests = {frontend: digest for frontend, digest in self.digests.items() if told.get(frontend) != digest}
        return wire.encode(wire.Report(verdicts, digests, 1, "proxy", changes=bool(told)))

    async def agent(self, node: int, session: aiohttp.ClientSession, context: ssl.SSLContext) -> None:
        """Calls the manager, reports every second and soon after its tasks have changed."""
        url = f"https://{self.settings.manager}:{self.settings.port}/v1/relay"
        while True:
            with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
                calling = session.ws_connect(
                    url, ssl=context, server_hostname="swarm-manager", autoping=False, max_msg_size=wire.MAX_MESSAGE
                )
                async with await asyncio.wait_for(calling, CALL) as socket:
                    await socket.send_bytes(wire.encode(wire.Hello(wire.VERSION, wire.OLDEST, "simulated", "proxy")))
                    if node % MANAGERS == 0:
                        await socket.send_bytes(wire.encode(wire.Subscribe()))
                    reports = asyncio.create_task(self._report_forever(node, socket))
                    self.counts["agents"] += 1
                    try:
                        async with asyncio.timeout(None) as patience:
                            await self._listen(socket, patience)
                    finally:
                        self.counts["agents"] -= 1
                        reports.cancel()
            self.counts["agents_lost"] += 1
            await asyncio.sleep(1.0)

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse, patience: asyncio.Timeout) -> None:
        """Count what comes, and judge silence as agents do (mesh.cluster.relay_client)."""
        loop = asyncio.get_running_loop()
        sock = socket.get_extra_info("socket")
        pulse = self.pulses.watch(sock, socket.ping, lambda: patience.reschedule(loop.time()))
        try:
            async for message in socket:
                pulse.heard()
                if message.type is aiohttp.WSMsgType.PING:
                    await socket.pong(message.data)
                elif message.type is aiohttp.WSMsgType.BINARY:
                    self.counts["relay_frames"] += 1
                    self.counts["relay_bytes"] += len(message.data)
        finally:
            pulse.end()

    async def _report_forever(self, node: int, socket: aiohttp.ClientWebSocketResponse) -> None:
        await asyncio.sleep(self.random.random() * REPORT)
        told, changed = dict[str, str](), self.rings.setdefault(node, asyncio.Event())
        while True:
            changed.clear()
            await socket.send_bytes(self.report(node, told))
            told = dict(self.digests)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT):
                    await changed.wait()
                    await asyncio.sleep(PROBE)

    async def digest_forever(self) -> None:
        """What all agents say of their tables: those that have changed are new."""
        self.digests = {f"*:{FIRST_PORT + i}/tcp": f"{i:016x}" for i in range(self.settings.services)}
        while True:
            for service in self.changed:
                self.digests[f"*:{FIRST_PORT + service}/tcp"] = f"{self.random.getrandbits(64):016x}"
            self.changed.clear()
            await asyncio.sleep(REPORT / 2)


@contextlib.asynccontextmanager
async def serving(swarm: Swarm, authority: Authority) -> AsyncIterator[None]:
    """Both Engines, the control socket, the other nodes' agents."""
    directory = Path(swarm.settings.directory)
    servers: list[object] = []  # uvloop closes those that nobody holds
    for node, name in enumerate(("manager", "worker")):
        runner = web.AppRunner(swarm.engine(node), access_log=None, max_line_size=1 << 20)  # as Docker has it
        await runner.setup()
        await web.UnixSite(runner, str(directory / name / "docker.sock")).start()
        servers.append(runner)
    control = directory / "manager" / "exec" / "swarm" / "control.sock"
    context = authority.server(ident("n", 0))
    context.set_alpn_protocols(["h2"])
    servers.append(await asyncio.start_unix_server(swarm.watch, str(control), ssl=context))
    tasks = [asyncio.create_task(swarm.digest_forever()), asyncio.create_task(swarm.pulses.run())]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for node in range(2, 2 + swarm.settings.peers):
            context = authority.client(ident("n", node))
            tasks.append(asyncio.create_task(swarm.agent(node, session, context)))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def main(settings: Settings) -> None:
    """Commands: {"churn": rate}, {"counts": true}, {"changes": true}; each is answered by a line."""
    swarm = Swarm(settings)
    authority = Authority()
    for node, (name, role) in enumerate((("manager", "swarm-manager"), ("worker", "swarm-worker"))):
        (Path(settings.directory) / name / "exec" / "swarm").mkdir(parents=True)
        authority.write(Path(settings.directory) / name / "data" / "swarm" / "certificates", ident("n", node), role)
    async with serving(swarm, authority):
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        churn: asyncio.Task[None] | None = None
        print("{}", flush=True)
        while line := await reader.readline():
            asked = json.loads(line)
            if churn is not None and "churn" in asked:
                churn.cancel()
                churn = None
            if asked.get("churn"):
                churn = asyncio.create_task(swarm.churn(asked["churn"]))
            spent = resource.getrusage(resource.RUSAGE_SELF)
            answer: dict[str, Any] = {**swarm.counts, "cpu": spent.ru_utime + spent.ru_stime}
            if "changes" in asked:
                answer["changes"] = swarm.changes
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(main(Settings(**json.loads(sys.argv[1]))))
