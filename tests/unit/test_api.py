# SPDX-License-Identifier: Apache-2.0
"""The HTTP application over real sockets, with a view that answers from samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from mesh.api.app import make_app
from mesh.api.endpoint import parse_endpoint
from mesh.errors import MeshError
from tests.support.metrics_samples import EXPLANATION, SampleView, state
from tests.support.polling import PATIENCE

WELL = {"verdict": "ok", "reasons": []}


@pytest.fixture(params=[True, False], ids=["control", "public"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[tuple[SampleView, aiohttp.ClientSession, bool]]:
    view = SampleView()
    runner = web.AppRunner(make_app(view, control=request.param))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        yield view, session, request.param
    await runner.cleanup()


Served = tuple[SampleView, aiohttp.ClientSession, bool]


async def test_reading(served: Served) -> None:
    view, session, _ = served
    async with session.get("/healthz") as answer:
        assert (answer.status, await answer.text()) == (200, "ok\n")
    async with session.get("/state") as answer:
        assert await answer.json() == state()
    async with session.get("/readyz") as answer:
        assert (answer.status, await answer.json()) == (200, {"ready": True, "reasons": [], "traffic": WELL})
    view.reasons.append("provider: nothing read yet")
    async with session.get("/readyz") as answer:
        assert (answer.status, (await answer.json())["reasons"]) == (503, view.reasons)
    async with session.get("/metrics") as answer:
        assert answer.content_type == "text/plain"
        assert "mesh_ready 0\n" in await answer.text()
    async with session.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}) as answer:
        assert answer.content_type == "application/openmetrics-text"
        assert (await answer.text()).endswith("# EOF\n")
    async with session.get("/") as answer:
        assert "/metrics" in await answer.text()


async def test_explain(served: Served) -> None:
    view, session, _ = served
    query = {"source": "[2001:db8::7]:40000", "destination": "192.0.2.1:80", "protocol": "udp"}
    async with session.get("/explain", params=query) as answer:
        assert (answer.status, await answer.json()) == (200, EXPLANATION)
    flow = view.flows[0]
    assert (str(flow.source), flow.source_port, str(flow.destination), flow.destination_port, str(flow.protocol)) == (
        "2001:db8::7", 40000, "192.0.2.1", 80, "udp",
    )  # fmt: skip
    async with session.get("/explain", params={**query, "destination": "192.0.2.1:1"}) as answer:
        assert answer.status == 404 and "no service" in (await answer.json())["error"]
    for wrong in ({"source": "web:80"}, {"protocol": "sctp"}, {"destination": "192.0.2.1"}):
        async with session.get("/explain", params=query | wrong) as answer:
            assert answer.status == 400 and (await answer.json())["remedy"]
    async with session.get("/explain") as answer:
        assert answer.status == 400


async def test_only_the_control_socket_changes(served: Served) -> None:
    view, session, control = served
    async with session.post("/drain", json={"kind": "node", "name": "node-a"}) as answer:
        assert answer.status == (200 if control else 404)
    async with session.post("/undrain", json={"kind": "backend", "name": "web.1"}) as answer:
        assert answer.status == (200 if control else 404)
    assert view.changed == ([("node", "node-a", True), ("backend", "web.1", False)] if control else [])
    async with session.post("/stop", json={"release": True}) as answer:
        assert answer.status == (202 if control else 404)
    if control:
        await asyncio.wait_for(view.stopped.wait(), PATIENCE)
        assert view.released


@pytest.mark.parametrize("served", [True], indirect=True)
async def test_errors_name_the_remedy(served: Served) -> None:
    _, session, _ = served
    async with session.post("/drain", json={"kind": "backend", "name": "nobody"}) as answer:
        assert (answer.status, (await answer.json())["remedy"]) == (400, "mesh backends lists them")
    for body in (b"{", b"[]", b'{"kind": "slot", "name": "x"}', b'{"kind": "node"}'):
        async with session.post("/drain", data=body) as answer:
            assert answer.status == 400 and (await answer.json())["error"]
    async with session.delete("/state") as answer:
        assert answer.status == 405 and (await answer.json())["error"]


@pytest.mark.parametrize(
    ("text", "address", "port"), [("192.0.2.7:80", "192.0.2.7", 80), ("[2001:db8::7]:65535", "2001:db8::7", 65535)]
)
def test_endpoints(text: str, address: str, port: int) -> None:
    assert tuple(map(str, parse_endpoint(text))) == (address, str(port))


@pytest.mark.parametrize(
    "text", ["", ":", "80", "192.0.2.7", "192.0.2.7:", "192.0.2.7:0", "192.0.2.7:65536", "192.0.2.7:-1", "host:80",
             "2001:db8::7:80", "[192.0.2.7]:80", "[2001:db8::7]80", "192.0.2.7:\uff18\uff10"]
)  # fmt: skip
def test_wrong_endpoints(text: str) -> None:
    with pytest.raises(MeshError, match="is not an address and a port"):
        parse_endpoint(text)
