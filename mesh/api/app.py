# SPDX-License-Identifier: Apache-2.0
"""The control API over HTTP: read-only on the loopback port, read and write on the control socket."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from mesh.api.endpoint import parse_endpoint
from mesh.api.view import AgentView
from mesh.errors import MeshError
from mesh.metrics.exposition import Exposition, Snapshot
from mesh.model import Flow, Protocol
from mesh.netaddr import is_mine, split_host_port, unmap
from mesh.text import printable

VIEW: Final = web.AppKey("view", AgentView)
_EXPOSITION: Final = web.AppKey("exposition", Exposition)
_TASKS: Final = web.AppKey("tasks", set[asyncio.Task[None]])
_HOSTS: Final[web.AppKey[frozenset[str]]] = web.AppKey("hosts", frozenset)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

INDEX: Final = """mesh
/metrics   Prometheus, OpenMetrics where asked for
/healthz   200 while the process runs
/readyz    200 while the node serves everything that it should, else 503 with reasons; how traffic fares
/state     the daemon's whole state, JSON
/cluster   all nodes compared, on a manager
/nodes     the cluster's nodes, on any node
/keys      the swarm's keys by which nodes prove themselves, without their secrets
/drains    what is drained, how the nodes follow, and connections left
/rates?seconds=1   what each backend has to do: open, new and failed connections
/explain?source=192.0.2.7:40000&destination=192.0.2.1:80&protocol=tcp   which backend a connection gets, and why
"""


def make_app(view: AgentView, *, control: bool, hosts: Iterable[str] = ()) -> web.Application:
    """The HTTP application for a view.

    Args:
        control: also serve POST /drain, /undrain, /probe, /connectivity, /keys/rotate and /stop. For the control
            socket only, which only root can open.
        hosts: names and addresses by which it may be called besides the node's own. Not for the control socket.
    """
    app = web.Application(middlewares=[_errors] if control else [_errors, _own_name])
    app[VIEW] = view
    own: frozenset[str] = frozenset(_plain(host) for host in (*hosts, "localhost", socket.gethostname()))
    app[_HOSTS] = own
    app[_EXPOSITION] = Exposition()
    app[_TASKS] = set()
    app.router.add_get("/", _index)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/state", _state)
    app.router.add_get("/cluster", _cluster)
    app.router.add_get("/nodes", _nodes)
    app.router.add_get("/drains", _drains)
    app.router.add_get("/keys", _keys)
    app.router.add_get("/rates", _rates)
    app.router.add_get("/explain", _explain)
    if control:
        app.router.add_post("/drain", _drain)
        app.router.add_post("/undrain", _undrain)
        app.router.add_post("/probe", _probe)
        app.router.add_post("/connectivity", _connectivity)
        app.router.add_post("/keys/rotate", _rotate_keys)
        app.router.add_post("/stop", _stop)
    return app


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors into JSON: 400 for a request that is wrong."""
    try:
        return await handler(request)
    except MeshError as error:
        return _refusal(str(MeshError(error.message, where=error.where)), error.remedy, 400)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _refusal(f"{request.method} {request.path}: {error.reason}", "see GET /", error.status)
    except UnicodeError:
        return _refusal(f"{request.method} {request.path}: not UTF-8", "see GET /", 400)


def _refusal(error: str, remedy: str, status: int) -> web.Response:
    """Of a request whose own words may be in it."""
    return _json({"error": printable(error), "remedy": printable(remedy)}, status)


def _plain(host: str) -> str:
    return host.strip().rstrip(".").lower()


@web.middleware
async def _own_name(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse a request that was meant for another host: a page whose name was made to mean this node's address could
    otherwise read everything (DNS rebinding). Browsers always say which host they mean; who does not is none."""
    host = request.headers.get("Host")
    if host is not None and not _is_own(host, request):
        own = request.app[_HOSTS]
        remedy = f"call it by an address of this node or one of: {', '.join(sorted(own))}; http_hosts has further names"
        return _refusal(f"{host!r} is not this node's name", remedy, 421)
    return await handler(request)


def _is_own(host: str, request: web.Request) -> bool:
    try:
        name = _plain(split_host_port(host, default=80)[0])
        if name in request.app[_HOSTS]:
            return True
        address = unmap(ipaddress.ip_address(name))
    except ValueError:
        return False
    return is_mine(address)


async def _index(request: web.Request) -> web.Response:
    return web.Response(text=INDEX)


async def _metrics(request: web.Request) -> web.Response:
    view, exposition = request.app[VIEW], request.app[_EXPOSITION]
    stats, accept = await view.stats(), request.headers.get("Accept", "")

    def write() -> tuple[bytes, str]:
        return exposition.render(Snapshot(stats, view.state(), view.ready()[0], view.nodes()["nodes"]), accept)

    body, content_type = await asyncio.to_thread(write)
    # Not compressed: the scraper is near, and compression would take longer than everything else.
    return web.Response(body=body, headers={"Content-Type": content_type})


async def _healthz(request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _readyz(request: web.Request) -> web.Response:
    view = request.app[VIEW]
    (ready, reasons), found = view.ready(), view.traffic()
    traffic = {"verdict": found.verdict.value, "reasons": list(found.reasons)}
    return _json({"ready": ready, "reasons": list(reasons), "traffic": traffic}, 200 if ready else 503)


async def _state(request: web.Request) -> web.Response:
    view = request.app[VIEW]
    return await asyncio.to_thread(lambda: _json(view.state()))


async def _cluster(request: web.Request) -> web.Response:
    return _json(await request.app[VIEW].cluster())


async def _nodes(request: web.Request) -> web.Response:
    return _json(request.app[VIEW].nodes())


async def _drains(request: web.Request) -> web.Response:
    return _json(await request.app[VIEW].drains())


async def _keys(request: web.Request) -> web.Response:
    return _json(request.app[VIEW].keys())


async def _rates(request: web.Request) -> web.Response:
    text = request.query.get("seconds", "1")
    try:
        seconds = float(text)
    except ValueError:
        raise MeshError(f"{text!r} is not a number", where="/rates", remedy="?seconds=1") from None
    return _json(await request.app[VIEW].rates(seconds))


async def _rotate_keys(request: web.Request) -> web.Response:
    return _json(request.app[VIEW].rotate_keys())


async def _explain(request: web.Request) -> web.Response:
    query = request.query
    if missing := [name for name in ("source", "destination") if name not in query]:
        raise MeshError(f"{missing[0]} is missing", where="/explain", remedy="?source=ADDRESS:PORT&destination=…")
    name = query.get("protocol", "tcp").upper()
    if name not in Protocol.__members__:
        raise MeshError(f"{name.lower()!r} is not a protocol", where="/explain", remedy="tcp or udp")
    source, source_port = parse_endpoint(query["source"])
    destination, destination_port = parse_endpoint(query["destination"])
    flow = Flow(source, source_port, destination, destination_port, Protocol[name])
    answer = await request.app[VIEW].explain(flow)
    return _json(answer, 404 if "error" in answer else 200)


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise MeshError(f"the body is not a JSON object: {error}", where=request.path) from error


async def _drain(request: web.Request) -> web.Response:
    return await _set_drained(request, drained=True)


async def _undrain(request: web.Request) -> web.Response:
    return await _set_drained(request, drained=False)


async def _set_drained(request: web.Request, *, drained: bool) -> web.Response:
    body = await _body(request)
    kind, name, local = body.get("kind"), body.get("name"), body.get("local", False)
    if kind not in ("backend", "node") or not isinstance(name, str) or not name:
        raise MeshError('expected {"kind": "backend" | "node", "name": "…", "local": false}', where=request.path)
    return _json(await request.app[VIEW].set_drained(kind, name, drained, local=local is True))


async def _probe(request: web.Request) -> web.Response:
    name = (await _body(request)).get("name")
    if not isinstance(name, str) or not name:
        raise MeshError('expected {"name": "…"}, a backend', where=request.path)
    return _json(await request.app[VIEW].probe(name))


async def _connectivity(request: web.Request) -> web.Response:
    services = (await _body(request)).get("services", [])
    if not isinstance(services, list) or not all(isinstance(name, str) for name in services):
        raise MeshError('expected {"services": ["…"]}', where=request.path)
    return _json(await request.app[VIEW].connectivity(services))


async def _stop(request: web.Request) -> web.Response:
    """Responds before the daemon exits, which may take until its connections end."""
    release = bool((await _body(request)).get("release", False))
    tasks = request.app[_TASKS]
    task = asyncio.create_task(request.app[VIEW].stop(release=release), name="stop")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return _json({"stopping": True, "release": release, "pid": os.getpid()}, 202)
