# SPDX-License-Identifier: Apache-2.0
"""States and counters as an agent shows them, of any size, for the tests of metrics, HTTP and CLI."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mesh.api.view import Json, Traffic, Verdict
from mesh.cluster.agreement import Row, differences
from mesh.datapath.base import BackendKey, Stats
from mesh.datapath.counters import CONNECT_BUCKETS, Counters, Failure
from mesh.errors import MeshError
from mesh.metrics.exposition import Snapshot
from mesh.model import ANY_ADDRESS, Flow, Frontend, Protocol


def frontend(index: int) -> Frontend:
    return Frontend(ANY_ADDRESS, 10000 + index, Protocol.TCP)


def counters(n: int) -> Counters:
    return Counters(
        opened=n + 3,
        closed=n,
        active=3,
        retried=1,
        failed={Failure.REFUSED: 2, Failure.TIMEOUT: 0},
        bytes_in=1000 * n,
        bytes_out=2000 * n,
        connect_seconds=(n, *([0] * (len(CONNECT_BUCKETS) - 1)), 1),
        connect_seconds_sum=0.25,
    )


def target(service: int, index: int) -> dict[str, Any]:
    return {
        "backend": f"task{service}x{index}",
        "name": f"web{service}.{index}",
        "node": "node-a",
        "node_name": "a",
        "address": f"172.18.{index // 250}.{index % 250 + 1}",
        "own_address": f"172.18.{index // 250}.{index % 250 + 1}",
        "port": 80,
        "weight": 1,
        "intent": "active",
        "taking": "yes",
        "health": "up",
        "health_reason": "",
        "slots": 100,
        "local": True,
        "via": "",
        "masked": "",
        "path": "here",
    }


def state(services: int = 2, backends: int = 3) -> dict[str, Any]:
    """What AgentView.state() answers, `backends` per service."""
    return {
        "version": "0.1.0",
        "abi": "0123456789abcdef",
        "pid": 4711,
        "started": 1700000000.0,
        "engine": "proxy",
        "engine_reason": "asked for",
        "provider": {
            "kind": "static",
            "connected": True,
            "age_seconds": 1.5,
            "error": "",
            "doorbell": "poll",
            "certificate_expires": 1800000000.0,
            "left": False,
        },
        "generation": {"desired": 7, "applied": 7},
        "apply": {"count": 7, "failed": 1, "last_seconds": 0.002, "last_error": ""},
        "guard": {"holds": 0, "held": 0},
        "probes": {"ok": 12, "failed": 1},
        "node": {"id": "n1", "name": "node-a"},
        "problems": [],
        "paths_down": 0,
        "paths_refused": 0,
        "paths": [{"node": "node-b", "node_name": "b", "path": "tunnel", "state": "up"}],
        "traffic": {"verdict": "ok", "reasons": []},
        "services": [
            {
                "id": f"s{s}",
                "name": f"web{s}",
                "ports": [str(frontend(s))],
                "options": {},
                "replicas": backends,
                "frontends": [
                    {
                        "frontend": str(frontend(s)),
                        "table_size": 16381,
                        "tracked_slots": 5,
                        "digest": "d",
                        "panic": False,
                        "served": True,
                        "targets": [target(s, b) for b in range(backends)],
                    }
                ],
            }
            for s in range(services)
        ],
        "critical": [],
        "drained": {"backends": [], "nodes": [], "here": []},
        "stopping": False,
    }


def stats(services: int = 2, backends: int = 3) -> Stats:
    return Stats(
        frontends={frontend(s): counters(10) for s in range(services)},
        backends={
            (frontend(s), BackendKey(f"task{s}x{b}", 80, 6)): counters(b)
            for s in range(services)
            for b in range(backends)
        },
        verdicts={"pass": 4, "deliver": 5},
        gauges={"threads": 2},
        totals={},
    )


NODES = [
    {"id": "n1", "name": "node-a", "address": "192.0.2.1", "up": True, "engine": "proxy"},
    {"id": "n2", "name": "node-b", "address": "192.0.2.2", "up": False, "engine": "proxy"},
]


def snapshot(services: int = 2, backends: int = 3) -> Snapshot:
    return Snapshot(stats(services, backends), state(services, backends), True, NODES)


EXPLANATION = {
    "frontend": "*:10000/tcp",
    "service": "web0",
    "hash": 0xDEADBEEF,
    "table_size": 16381,
    "slot": 7,
    "current": target(0, 1),
    "previous": target(0, 1),
    "previous_backend": target(0, 1),
    "tracked": False,
    "backend": target(0, 1),
    "reasons": ["slot 7 belongs to web0.1"],
    "next": [target(0, 2), target(0, 0)],
    "program": None,
    "agree": None,
}


class SampleView:
    """An AgentView whose answers are set by the test and that notes what it was asked to change."""

    def __init__(self) -> None:
        self.shown = state()
        self.reasons: list[str] = []
        self.rows: list[Row] = []
        self.not_well: list[str] = []
        self.changed: list[tuple[str, str, bool]] = []
        self.local: list[bool] = []  # of each change
        self.follow = [{"node": "one", "state": "follows"}]
        self.notes: list[str] = []
        self.held: list[Json] = [{"id": "00c0ffee", "state": "in use", "age_seconds": 7200.0, "missing": []}]
        self.left: list[Json] = [{"drained": [], "nodes": []}]  # answers, in turn
        self.busy: list[Json] = []
        self.probed: Json = {}
        self.connected: Json = {}
        self.stopped = asyncio.Event()
        self.released = False
        self.flows: list[Flow] = []

    def state(self) -> Json:
        return self.shown

    async def cluster(self) -> Json:
        if not self.rows:
            raise MeshError("only a manager's agent knows all nodes", remedy="ask on a manager: 192.0.2.9")
        nodes = [{**asdict(row), "traffic": self.shown["traffic"]} for row in self.rows]
        return {"nodes": nodes, "differences": differences(self.rows), "not_well": self.not_well}

    def nodes(self) -> Json:
        nodes = [{"id": n.id, "name": n.name, "address": n.address, "up": n.up, "engine": n.engine} for n in self.rows]
        for node in nodes:
            node["paths"] = {} if node["id"] == self.rows[0].id else {"tunnel": "up", "peer": "down"}
        return {"node": self.rows[0].id if self.rows else "", "nodes": nodes}

    def traffic(self) -> Traffic:
        return Traffic(Verdict(self.shown["traffic"]["verdict"]), tuple(self.shown["traffic"]["reasons"]))

    def ready(self) -> tuple[bool, Sequence[str]]:
        return not self.reasons, self.reasons

    async def stats(self) -> Stats:
        return stats()

    async def rates(self, seconds: float) -> Json:
        return {"backends": self.busy}

    async def explain(self, flow: Flow) -> Json:
        self.flows.append(flow)
        if flow.destination_port == 1:
            return {"error": "no service publishes port 1/tcp", "remedy": "mesh services lists what is published"}
        if flow.destination_port == 2:
            return {**EXPLANATION, "current": None, "backend": None, "next": [], "reasons": ["no backend may be used"]}
        return EXPLANATION

    async def probe(self, name: str) -> Json:
        if name == "nobody":
            raise MeshError("there is no backend 'nobody'", remedy="`mesh backends` lists them")
        return self.probed

    async def connectivity(self, services: Sequence[str]) -> Json:
        if "nothing" in services:
            raise MeshError("there is no service 'nothing'", remedy="`mesh services` lists them")
        return self.connected

    async def set_drained(self, kind: str, name: str, drained: bool, *, local: bool = False) -> Json:
        if name == "nobody":
            raise MeshError("no backend has this name", where="nobody", remedy="mesh backends lists them")
        self.changed.append((kind, name, drained))
        self.local.append(local)
        answer = {"kind": kind, "id": name, "name": name, "drained": drained, "scope": "node" if local else "cluster"}
        return answer | {"nodes": [] if local else self.follow, "notes": self.notes}

    def keys(self) -> Json:
        return {"keys": self.held, "manager": True}

    def rotate_keys(self) -> Json:
        if self.held[:1] and self.held[0]["state"] == "waiting":
            raise MeshError(f"key {self.held[0]['id']} is not in use yet", remedy="mesh keys")
        self.held.insert(0, {"id": "0000beef", "state": "waiting", "age_seconds": 0.1, "missing": ["n2"]})
        return self.keys()

    async def drains(self) -> Json:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    async def stop(self, *, release: bool) -> None:
        self.released = release
        self.stopped.set()
