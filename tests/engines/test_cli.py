# SPDX-License-Identifier: Apache-2.0
"""The command as a process of its own against the real HTTP application on a real control socket."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mesh.api.app import make_app
from mesh.cli.exit import Exit
from mesh.cli.main import COMMANDS
from tests.support.metrics_samples import SampleView
from tests.support.process import Done
from tests.support.process import run_mesh as mesh
from tests.support.rows import ONE, TWO

Daemon = tuple[SampleView, Callable[..., Awaitable[Done]]]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    view = SampleView()
    runner = web.AppRunner(make_app(view, control=True))
    await runner.setup()
    await web.UnixSite(runner, tmp_path / "mesh.sock").start()

    async def stopped() -> None:
        await view.stopped.wait()
        await runner.cleanup()

    stopping = asyncio.create_task(stopped())
    yield view, lambda *args: mesh(*args, MESH_STATE_DIR=str(tmp_path))
    stopping.cancel()
    await runner.cleanup()


async def test_status(daemon: Daemon) -> None:
    view, run = daemon
    done = await run("status")
    assert (done.code, done.err) == (Exit.OK, "")
    assert "ready      yes" in done.out and "2 services, 2 of 2 ports, 6 backends" in done.out
    view.shown["traffic"] = {"verdict": "degraded", "reasons": ["service web0: 2 of its 3 tasks get nothing"]}
    done = await run("status")
    assert done.code == Exit.DEGRADED and "traffic    DEGRADED" in done.out and "2 of its 3 tasks" in done.out
    view.shown["traffic"]["verdict"] = "failing"
    assert (await run("status")).code == Exit.NOT_READY
    view.shown["traffic"] = {"verdict": "ok", "reasons": []}
    view.reasons.append("*:10000/tcp is not served: the port is taken")
    view.shown["problems"].append("service web0, label mesh.affinity: 'sticky' is not one of: flow, client-ip")
    view.shown["problems"].append("service web1, label mesh.allow: is empty")
    view.shown["critical"] = ["service web1, label mesh.allow: is empty"]
    done = await run("status")
    assert done.code == Exit.NOT_READY
    assert all(text in done.out for text in ("ready      NO", view.reasons[0], "mesh.affinity"))
    assert "Critical:\n  - service web1, label mesh.allow" in done.out and done.out.count("mesh.allow") == 1
    view.rows = [ONE, replace(TWO, up=False)]
    view.shown["drained"] = {"backends": ["task0x1", "gone"], "nodes": [TWO.id], "here": ["gone"]}
    for target in view.shown["services"][1]["frontends"][0]["targets"]:
        target["weight"] = 0
    done = await run("status")
    assert "nodes      1 of 2 up; down or silent: two" in done.out
    assert "drained    node two, backend web0.1, backend gone (on this node only)" in done.out
    assert "no backend web1 (*:10001/tcp): new connections fail" in done.out
    done = await run("status", "--json")
    assert (done.code, done.json()["ready"], done.json()["reasons"]) == (Exit.NOT_READY, False, view.reasons)


async def test_status_of_the_cluster(daemon: Daemon) -> None:
    view, run = daemon
    done = await run("status", "--cluster")
    assert done.code != Exit.OK and "ask on a manager: 192.0.2.9" in done.err
    view.rows = [ONE, TWO]
    done = await run("status", "--cluster")
    assert (done.code, done.err) == (Exit.OK, "")
    assert "All nodes agree on 2 tables." in done.out and "192.0.2.1" in done.out
    view.not_well = ["node two, traffic degraded: service web: 2 of its 3 tasks get no new connections from here"]
    done = await run("status", "--cluster")
    assert done.code == Exit.DEGRADED and "All nodes agree on 2 tables." in done.out and view.not_well[0] in done.out
    view.shown["traffic"] = {"verdict": "failing", "reasons": ["service web: *:80/tcp is not served"]}
    assert (await run("status", "--cluster")).code == Exit.NOT_READY
    view.shown["traffic"] = {"verdict": "ok", "reasons": []}
    view.rows = [ONE, replace(TWO, up=False)]
    done = await run("status", "--cluster")
    assert done.code == Exit.NOT_READY and "node two does not answer" in done.out


async def test_status_waits_until_all_is_well(daemon: Daemon) -> None:
    view, run = daemon
    view.shown["traffic"] = {"verdict": "degraded", "reasons": []}
    asyncio.get_running_loop().call_later(0.5, view.shown["traffic"].update, {"verdict": "ok"})
    assert (await run("status", "--wait", "60")).code == Exit.OK
    view.shown["traffic"]["verdict"] = "failing"
    assert (await run("status", "--wait", "0.3")).code == Exit.NOT_READY


async def test_status_waits_for_a_daemon_that_starts(tmp_path: Path) -> None:
    runner = web.AppRunner(make_app(SampleView(), control=True))
    await runner.setup()
    asyncio.get_running_loop().call_later(
        0.5, lambda: asyncio.create_task(web.UnixSite(runner, tmp_path / "mesh.sock").start())
    )
    assert (await mesh("status", "--wait", "60", MESH_STATE_DIR=str(tmp_path))).code == Exit.OK
    await runner.cleanup()
    assert (await mesh("status", "--wait", "0.3", MESH_STATE_DIR=str(tmp_path))).code == Exit.UNREACHABLE


async def test_nodes(daemon: Daemon) -> None:
    view, run = daemon
    view.rows = [ONE, replace(TWO, up=False)]
    done = await run("nodes")
    assert done.code == Exit.OK and "this node" in done.out and "tunnel up, peer down" in done.out
    assert [node["id"] for node in (await run("nodes", "--json")).json()["nodes"]] == [ONE.id, TWO.id]


async def test_services_and_backends(daemon: Daemon) -> None:
    view, run = daemon
    view.shown["services"][1]["options"] = {"affinity": "client-ip", "allow": ["10.0.0.0/8", "::1/128"]}
    view.shown["services"][1]["frontends"][0]["targets"][0].update(weight=0, health="down", health_reason="refused")
    done = await run("services")
    assert done.code == 0 and "2/3" in done.out and "affinity=client-ip; allow=10.0.0.0/8, ::1/128" in done.out
    done = await run("services", "web1", "--json")
    assert [service["name"] for service in done.json()] == ["web1"]
    done = await run("backends", "web1")
    assert done.code == 0 and "down (refused)" in done.out and "172.18.0.1:80" in done.out and "web0" not in done.out
    assert len((await run("backends", "--json")).json()) == 6
    first = view.shown["services"][0]["frontends"][0]
    row = {"frontend": first["frontend"], "backend": first["targets"][0]["backend"]}
    view.busy = [row | {"open": 12, "new_per_second": 3.25, "failed_per_second": 0.5}]
    done = await run("backends", "web0")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0][-3:] == ["OPEN", "NEW/S", "FAILED/S"] and lines[2][-3:] == ["12", "3.2", "0.5"]
    assert lines[3][-3:] == ["-", "-", "-"]
    assert (await run("backends", "web0", "--json")).json()[0]["new_per_second"] == 3.25
    view.busy = []
    assert "NEW/S" not in (await run("backends", "--seconds", "0")).out
    frontend = view.shown["services"][1]["frontends"][0]
    frontend["targets"] = []
    assert "NO BACKEND" in (await run("services", "web1")).out
    done = await run("backends", "web1")
    assert "web1: no backend" in done.out and "the static file" in done.out
    view.shown["provider"]["kind"] = "relay"
    assert "`docker service ps web1` says why" in (await run("backends", "web1")).out
    view.shown["services"][1]["frontends"] = []
    done = await run("services")
    assert "*:10001/tcp" in done.out and "left to Docker's own mesh" in done.out
    assert "left to Docker's own mesh" in (await run("backends", "web1")).out
    done = await run("backends", "nobody")
    assert done.code == Exit.REFUSED and "no service 'nobody'" in done.err and "mesh services" in done.err


async def test_explain(daemon: Daemon) -> None:
    view, run = daemon
    done = await run("explain", "[2001:db8::7]:40000", "[2001:db8::1]:53", "--proto", "udp")
    assert done.code == 0 and "web0.1 at 172.18.0.2:80" in done.out and "7 of 16381" in done.out
    assert "1. web0.2" in done.out and "2. web0.0" in done.out
    assert (view.flows[0].source_port, str(view.flows[0].protocol)) == (40000, "udp")
    done = await run("explain", "192.0.2.7:40000", "192.0.2.1:1")
    assert done.code == Exit.REFUSED and "no service publishes" in done.err and "mesh services" in done.err
    done = await run("explain", "192.0.2.7:40000", "192.0.2.1:2")
    assert done.code == Exit.NOT_READY and "no backend may be used" in done.out
    done = await run("explain", "web:40000", "192.0.2.1:80")
    assert done.code == Exit.USAGE and "names are not looked up" in done.err
    assert (await run("explain", "192.0.2.7:1", "192.0.2.1:80", "--json")).json()["slot"] == 7


async def test_drain_and_undrain(daemon: Daemon) -> None:
    view, run = daemon
    done = await run("drain", "node", "node-a")
    assert done.code == 0 and "gets no new connections" in done.out
    done = await run("undrain", "backend", "web0.1", "--json")
    assert done.code == 0 and done.json()["drained"] is False
    assert view.changed == [("node", "node-a", True), ("backend", "web0.1", False)]
    done = await run("drain", "backend", "nobody")
    assert done.code == Exit.REFUSED and "mesh backends lists them" in done.err
    assert (await run("drain", "service", "web0")).code == Exit.USAGE
    assert (await run("drain", "backend", "")).code == Exit.USAGE
    assert (await run("backends", "")).code == Exit.REFUSED


async def test_a_drain_says_where_it_holds(daemon: Daemon) -> None:
    view, run = daemon
    view.follow += [{"node": "two", "state": "no agent"}]
    done = await run("drain", "node", "node-a")
    assert (done.code, view.local) == (0, [False])
    assert "on this node" not in done.out and "one: follows" in done.out and "two: no agent" in done.out
    view.follow += [{"node": "three", "state": "its build knows no drains of all nodes"}]
    done = await run("drain", "node", "node-a")
    assert done.code == Exit.NOT_READY and "three: its build knows no drains" in done.out
    done = await run("drain", "node", "node-a", "--local")
    assert (done.code, view.local[-1]) == (0, True) and "no new connections on this node" in done.out
    view.follow, view.notes = [], ["still no new connections: node weight 0 (label mesh.weight)"]
    done = await run("undrain", "node", "node-a")
    assert done.code == 0 and "again" not in done.out and "node weight 0" in done.out


async def test_a_drain_waits_until_no_connection_is_left(daemon: Daemon) -> None:
    view, run = daemon

    def left(count: int, *untold: str) -> dict[str, Any]:
        thing = {"kind": "backend", "id": "web0.1", "name": "", "scope": "cluster"}
        return {"drained": [{**thing, "connections": count, "untold": list(untold)}], "nodes": []}

    view.left = [left(3, "two"), left(2), left(0), left(0)]
    done = await run("drain", "backend", "web0.1", "--wait", "--timeout", "60")
    assert done.code == 0 and "3 connections left; two did not tell" in done.out and len(view.left) == 1
    view.left = [left(2)]
    done = await run("drain", "backend", "web0.1", "--wait", "--timeout", "1.5")
    assert done.code == Exit.NOT_READY and "2 connections left" in done.out
    view.left = [left(0, "three")]
    done = await run("drain", "backend", "web0.1", "--wait", "--timeout", "1.5", "--json")
    assert done.code == Exit.NOT_READY and done.json()["left"] == {"connections": 0, "untold": ["three"]}


async def test_trace_of_a_service_that_nobody_knows(daemon: Daemon) -> None:
    done = await daemon[1]("trace", "--service", "nobody")
    assert done.code == Exit.REFUSED and "no service 'nobody'" in done.err


async def test_stop_waits_until_it_is_gone(daemon: Daemon) -> None:
    view, run = daemon
    done = await run("stop", "--release")
    assert (done.code, view.released) == (0, True) and f"daemon {os.getpid()} stopped" in done.out
    done = await run("status")
    assert done.code == Exit.UNREACHABLE


async def test_nobody_answers(tmp_path: Path) -> None:
    done = await mesh("status", "--state-dir", tmp_path)
    assert done.code == Exit.UNREACHABLE and f"{tmp_path}/mesh.sock" in done.err and "mesh run" in done.err
    assert done.err.count("\n") == 1


async def test_what_answers_is_not_the_daemon(tmp_path: Path) -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_unix_server(garbage, tmp_path / "mesh.sock")
    async with server:
        done = await mesh("services", "--state-dir", tmp_path)
    assert done.code == Exit.UNREACHABLE and done.err.count("\n") == 1


async def test_check_judges_the_configuration_that_would_run(tmp_path: Path) -> None:
    args = ("check", "--json", "--provider", "demo", "--state-dir", tmp_path / "new", "--http-listen", "127.0.0.1:0")
    done = await mesh(*args)
    levels = {finding["what"]: finding["level"] for finding in done.json()}
    assert levels["configuration"] == levels["state directory"] == levels["HTTP port"] == "ok"
    assert levels["Docker"] == "ok"
    assert done.code == (Exit.NOT_READY if "fail" in levels.values() else Exit.OK)
    assert not (tmp_path / "new").exists()


async def test_check_names_remedies(tmp_path: Path) -> None:
    (tmp_path / "mesh.toml").write_text("engin = 'proxy'\n")
    done = await mesh("check", "--config", tmp_path / "mesh.toml")
    assert done.code == Exit.NOT_READY and "did you mean engine?" in done.out
    file = tmp_path / "file"
    file.touch(mode=stat.S_IRUSR)
    done = await mesh("check", "--provider", "swarm", "--docker-host", f"unix://{file}", "--state-dir", file)
    assert done.code == Exit.NOT_READY
    assert f"{file} is not a directory" in done.out and "start Docker" in done.out
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    async with server:
        taken = server.sockets[0].getsockname()[1]
        done = await mesh("check", "--http-listen", f"127.0.0.1:{taken}", "--json")
    (finding,) = [f for f in done.json() if f["what"] == "HTTP port"]
    assert finding["level"] == "fail" and "free one" in finding["remedy"]


async def test_check_sees_the_running_daemon(daemon: Daemon) -> None:
    _, run = daemon
    done = await run("check", "--json", "--provider", "demo")
    (finding,) = [f for f in done.json() if f["what"] == "state directory"]
    assert finding["level"] == "warn" and "pid 4711" in finding["found"] and "--take-over" in finding["remedy"]


async def test_check_asks_a_docker_engine(tmp_path: Path) -> None:
    """The Engine's documented answers of a manager and of a worker, over a real socket."""
    manager = True
    managers: list[dict[str, str]] = []

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"Version": "20.10.24", "ApiVersion": "1.41"})

    async def info(request: web.Request) -> web.Response:
        swarm = {"LocalNodeState": "active", "ControlAvailable": manager, "NodeID": "n1", "RemoteManagers": managers}
        return web.json_response({"Swarm": swarm})

    async def services(request: web.Request) -> web.Response:
        ports = [
            {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": port, "PublishMode": "ingress"}
            for port in (80, listener.getsockname()[1])
        ]
        return web.json_response([{"Endpoint": {"Ports": ports}}, {"Endpoint": {}}])

    listener = socket.create_server(("127.0.0.1", 0))  # a process of the host has a published port
    app = web.Application()
    app.add_routes([web.get("/version", version), web.get("/info", info), web.get("/services", services)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, tmp_path / "docker.sock").start()
    args = ("check", "--json", "--provider", "swarm", "--docker-host", f"unix://{tmp_path}/docker.sock")
    findings = (await mesh(*args)).json()
    warned = [f["found"] for f in findings if (f["what"], f["level"]) == ("published ports", "warn")]
    assert len(warned) == 1 and f"(pid {os.getpid()})" in warned[0] and str(listener.getsockname()[1]) in warned[0]
    listener.close()
    found = {f["what"]: (f["level"], f["found"]) for f in findings}
    assert found["Docker"] == ("ok", "Engine 20.10.24, API 1.41")
    assert found["swarm"] == ("ok", "manager n1") and found["published ports"][1].startswith("2 published")
    manager = False
    done = await mesh(*args)
    assert done.code == Exit.NOT_READY and "worker that knows no manager" in done.out
    managers.append({"NodeID": "n2", "Addr": "192.0.2.2:2377"})
    found = {f["what"]: (f["level"], f["found"]) for f in (await mesh(*args)).json()}
    assert found["swarm"] == ("ok", "worker n1, told by 192.0.2.2:2377")
    await runner.cleanup()


async def test_keys(daemon: Daemon) -> None:
    _, run = daemon
    done = await run("keys")
    assert done.code == Exit.OK and "00c0ffee  in use" in done.out and "2 h" in done.out
    done = await run("keys", "rotate")
    assert done.code == Exit.OK and "0000beef  waiting" in done.out and "n2" in done.out
    assert [key["id"] for key in (await run("keys", "--json")).json()["keys"]] == ["0000beef", "00c0ffee"]
    done = await run("keys", "rotate")
    assert done.code == Exit.REFUSED and "is not in use yet" in done.err


@pytest.mark.parametrize("command", [None, *COMMANDS])
async def test_help_teaches(command: str | None) -> None:
    done = await mesh(*([command] if command else []), "--help")
    assert done.code == 0 and ("Example" in done.out or command is None)
    assert command is not None or all(name in done.out for name in COMMANDS)


async def test_wrong_usage() -> None:
    assert (await mesh("stats")).code == Exit.USAGE
    done = await mesh("run", "--threads", "many")
    assert done.code == Exit.USAGE and "--threads: threads must be a whole number" in done.err


async def test_commands_that_ask_the_daemon_import_neither_agent_nor_server() -> None:
    """Imports are most of what a command costs."""
    commands = ["status", "nodes", "services", "backends", "explain", "maps", "drain", "undrain", "keys", "stop"]
    code = (
        "import sys; from mesh.cli.main import main\n"
        f"for command in {commands}: main([command, '--help'], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    modules = set(said.decode().split())
    assert "mesh.cli.status" in modules
    assert not modules & {"aiohttp", "asyncio", "cryptography", "prometheus_client", "mesh.agent.agent", "mesh.api.app"}


PROBED = {
    "backend": "0123456789abcdefghijklmno",
    "name": "web.3",
    "node": "n2",
    "node_name": "node-b",
    "node_address": "192.0.2.2",
    "address": "172.18.0.5",
    "ports": [
        {"port": 8080, "published": ["*:80/tcp"], "ok": True, "said": "", "seconds": 0.002, "by": "tcp"},
        {
            "port": 8081,
            "published": ["*:81/tcp", "*:82/tcp"],
            "ok": False,
            "said": "172.18.0.5:8081: connection refused",
            "seconds": 0.001,
            "by": "http /ready",
        },
    ],
    "ok": False,
    "error": "",
    "remedy": "",
    "path": {"by": "tunnel", "proven": True, "masked": "", "states": {"tunnel": "up", "peer": "down"}},
}


async def test_probe_tells_the_tasks_own_address_each_port_and_the_path(daemon: Daemon) -> None:
    view, run = daemon
    view.probed = PROBED
    done = await run("probe", "web.3")
    assert done.code == Exit.NOT_READY
    assert done.out.splitlines() == [
        "web.3 (0123456789ab) on node node-b (192.0.2.2), address 172.18.0.5",
        "  172.18.0.5:8080 (tcp; published as *:80/tcp): answers, 2.0 ms",
        "  172.18.0.5:8081 (http /ready; published as *:81/tcp, *:82/tcp): 172.18.0.5:8081: connection refused",
        "  path from here: tunnel, proven (tunnel up, peer down)",
    ]
    view.probed = PROBED | {"ports": PROBED["ports"][:1], "ok": True}  # type: ignore[index]
    assert (await run("probe", "web.3")).code == Exit.OK
    assert (await run("probe", "web.3", "--json")).json() == view.probed
    path = {"by": "tunnel", "proven": False, "masked": "no path to node-b", "states": {"tunnel": "down"}}
    view.probed = view.probed | {"path": path}
    done = await run("probe", "web.3")
    assert done.code == Exit.NOT_READY and "path from here: NOT proven (no path to node-b; tunnel down)" in done.out
    assert (await run("probe", "nobody")).code == Exit.REFUSED


async def test_probe_says_once_why_a_node_cannot_be_asked(daemon: Daemon) -> None:
    view, run = daemon
    error = {"error": "its build does not know the question", "remedy": "upgrade mesh there"}
    view.probed = PROBED | error | {"ports": [], "address": ""}
    done = await run("probe", "web.3")
    assert done.code == Exit.NOT_READY and done.err == ""
    assert "node-b cannot say whether it answers: its build does not know the question (upgrade mesh there)" in done.out


def calls(through: str, answered: int, *failed: tuple[str, str], **more: object) -> dict[str, Any]:
    rows = [{"backend": name, "name": name, "said": said, "calls": 1} for name, said in failed]
    row = {"through": through, "service": "web", "frontend": "*:80/tcp", "asked": answered + len(rows), "failed": rows}
    return row | {"answered": answered, "left_out": 0, "denied": False} | more


async def test_connectivity_test_prints_a_matrix_and_what_failed(daemon: Daemon) -> None:
    view, run = daemon
    one: dict[str, Any] = {"id": "n1", "name": "node-a", "state": "asked", "masked": [], "remedy": ""}
    masked = [{"service": "web", "backend": f"b{i}", "name": f"web.{i}", "why": "no proven path to n3"} for i in (1, 3)]
    two, three = one | {"id": "n2", "name": "node-b"}, one | {"id": "n3", "name": "node-c", "rows": []}
    view.connected = {
        "ok": False,
        "nodes": [
            one | {"rows": [calls("n1", 3), calls("n2", 2, ("web.2", "timed out"))]},
            two | {"rows": [calls("n1", 3), calls("n2", 3, left_out=4)], "masked": masked},
            three | {"state": "its build does not know the test"},
        ],
    }
    done = await run("connectivity-test")
    assert done.code == Exit.NOT_READY
    lines = [line.split() for line in done.out.splitlines()]
    assert ["node-a", "3/3", "2/3", "FAILED"] in lines and ["node-b", "3/3", "3/3"] in lines
    assert "node-a -> node-b *:80/tcp (web): timed out, 1 of 3 calls, given to web.2" in done.out
    assert "node-c: its build does not know the test" in done.out and "4 tasks were left out" in done.out
    said = "node-b gives no new connections to web.1, web.3 (web): masked there, no proven path to n3"
    assert said in done.out.splitlines()
    view.connected = view.connected | {"ok": True}
    assert (await run("connectivity-test", "web", "--json")).json() == view.connected
    assert (await run("connectivity-test", "nothing")).code == Exit.REFUSED
    view.connected = {"ok": True, "nodes": [one | {"rows": []}]}
    done = await run("connectivity-test")
    assert done.code == Exit.OK and "nothing was called" in done.out
