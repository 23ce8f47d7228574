# SPDX-License-Identifier: Apache-2.0
"""Client of Docker's Engine API: negotiated version, complete reads, the stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Collection
from dataclasses import replace
from typing import Final
from urllib.parse import quote, urlsplit

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from mesh.errors import ConfigError, ProviderError, plain
from mesh.providers.swarm import schema
from mesh.providers.swarm.decode import NO_GATEWAY, TASK_LABEL, Answers
from mesh.providers.swarm.legs import Legs
from mesh.providers.swarm.schema import parse

API_NEWEST: Final = (1, 51)
"""The newest version whose answers were checked against what is read of them."""
BODY_LIMIT: Final = 256 * 1024 * 1024
_REQUEST_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 3.0
_INFO_SECONDS: Final = 1.5  # how old /info may be: it takes the Engine several times as long as all the rest
_FAILURES: Final = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
_DOWN: Final = "is dockerd running?"
_ELSE: Final = "is docker_host a Docker Engine?"
_DENIED: Final = "run as root or in group docker"

_EVENTS: Final = {
    "type": ["container", "service", "node", "network"],
    # Not exec_*: every HEALTHCHECK of every container causes three of those.
    "event": [
        "start",
        "die",
        "kill",
        "health_status",
        "pause",
        "unpause",
        "destroy",
        "create",
        "update",
        "remove",
        "connect",
        "disconnect",
    ],
}


def _filters(value: object) -> str:
    return "?filters=" + quote(json.dumps(value))


_CONTAINERS: Final = "/containers/json" + _filters({"label": [TASK_LABEL]})
_UNREADY: Final = "/containers/json" + _filters({"label": [TASK_LABEL], "health": ["starting", "unhealthy"]})


_HERE: Final = (_CONTAINERS, _UNREADY, "/networks/docker_gwbridge")


def engine_url(host: str) -> tuple[str, str]:
    """Base URL and socket path (empty for TCP) of a DOCKER_HOST.

    Raises:
        ConfigError: it is no address of an Engine.
    """
    with contextlib.suppress(ValueError):  # a port that is none
        url = urlsplit(host)
        if url.scheme == "unix" and url.path:
            return "http://docker", url.path
        if url.scheme in ("tcp", "http") and url.hostname and url.port != 0:
            return f"http://{url.netloc}", ""
    raise ConfigError(
        f"{host!r} is no address of a Docker Engine",
        where="docker_host",
        remedy="such as unix:///var/run/docker.sock or tcp://127.0.0.1:2375",
    )


class Engine:
    """One Engine, by its DOCKER_HOST. Create and close on the event loop that uses it.

    Raises:
        ConfigError: `host` is no address of an Engine.
    """

    def __init__(self, host: str, *, request_seconds: float = _REQUEST_SECONDS) -> None:
        self.host = host
        self._base, path = engine_url(host)
        connector = aiohttp.UnixConnector(path=path, limit=0) if path else aiohttp.TCPConnector(limit=0)
        self._prefix = ""
        self._info = b""
        self._info_read = 0.0  # when, monotonic
        self._legs = Legs()
        timeout = aiohttp.ClientTimeout(total=request_seconds, sock_connect=_CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20)

    async def close(self) -> None:
        await self._session.close()

    async def negotiate(self) -> str:
        """Choose the API version: the newest that both sides know. Returns it, such as "1.41".

        Raises:
            ProviderError: the Engine is away, or answers what cannot be used.
        """
        self._prefix = ""
        version = parse(await self._get("/version"), schema.Version, "GET /version")
        newest, oldest = _number(version.api_version), _number(version.min_api_version)
        chosen = ".".join(map(str, max(min(newest, API_NEWEST), oldest)))
        self._prefix = f"/v{chosen}"
        return chosen

    async def read(self) -> Answers:
        """All that makes an inventory, whole or not at all. What the node is may be known from a moment before.

        Raises:
            ProviderError: the Engine is away, too slow, no manager, or answers half.
        """
        return await self._with_legs(Answers(*await self._read("/services", "/tasks", "/nodes", *_HERE)))

    async def read_tasks(self, ids: Collection[str]) -> Answers:
        """These tasks, as far as there are any, and what the node knows of itself; services and nodes are empty.

        Raises:
            ProviderError: as `read`.
        """
        named = ["/tasks" + _filters({"id": sorted(ids)})] if ids else []
        info, *rest = await self._read(*named, *_HERE)
        return await self._with_legs(Answers(info, b"[]", rest[0] if named else b"[]", b"[]", *rest[len(named) :]))

    async def read_here(self) -> Answers:
        """What every node knows of itself; services, tasks and nodes are empty.

        Raises:
            ProviderError: the Engine is away, too slow, or answers half.
        """
        info, *here = await self._read(*_HERE)
        return await self._with_legs(Answers(info, b"[]", b"[]", b"[]", *here))

    async def _with_legs(self, answers: Answers) -> Answers:
        return replace(answers, legs=await self._legs.find(answers.containers, answers.gateway, self._get))

    async def _read(self, *paths: str) -> list[bytes]:
        """/info and these."""
        now = time.monotonic()
        if not self._prefix:
            await self.negotiate()
        known = bool(self._info) and now - self._info_read < _INFO_SECONDS
        # No TaskGroup: before Python 3.13 it prefers a request's error to a cancellation that comes at the same moment.
        reads = [asyncio.create_task(self._get(path)) for path in (*(() if known else ("/info",)), *paths)]
        try:
            answers = await asyncio.gather(*reads)
        except BaseException:
            self._prefix, self._info = "", b""  # another Engine may be there next time
            raise
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
        if known:
            return [self._info, *answers]
        self._info, self._info_read = answers[0], now
        return answers

    async def info(self) -> schema.Info:
        """GET /info.

        Raises:
            ProviderError: the Engine is away, or answers what cannot be used.
        """
        return parse(await self._get("/info"), schema.Info, "GET /info")

    async def encrypted_ingress(self) -> str:
        """The name of the swarm's ingress network if it is encrypted (`--opt encrypted`), else empty.

        Raises:
            ProviderError: as `info`.
        """
        overlays = await self._get("/networks" + _filters({"driver": ["overlay"]}))
        networks = parse(overlays, list[schema.NetworkSummary], "GET /networks")
        return next((n.name for n in networks if n.ingress and "encrypted" in (n.options or {})), "")

    async def _get(self, path: str) -> bytes:
        name = path.partition("?")[0]
        where = f"{self.host} GET {name}"
        try:
            async with self._session.get(self._base + self._prefix + path) as reply:
                body = await reply.content.read(BODY_LIMIT) if reply.status >= 400 else await _whole(reply, where)
                status = reply.status
        except TimeoutError:
            raise ProviderError("the Engine does not answer in time", where=where, remedy=_DOWN) from None
        except _FAILURES as error:
            raise _away(error, where) from None
        if status == 404 and name.startswith("/networks/"):
            return NO_GATEWAY  # no task has run here yet
        if status != 200:
            raise ProviderError(
                f"the Engine answers {status}: {_said(body)}", where=where, remedy=_ELSE * (status == 404)
            )
        return body

    async def events(self) -> AsyncGenerator[schema.Event | None, None]:
        """Events of local containers, services and nodes as they happen; first None, once the stream is open.

        Raises:
            ProviderError: the stream cannot be opened, has ended, or carries what cannot be used.
        """
        where = f"{self.host} GET /events"
        url = self._base + self._prefix + "/events" + _filters(_EVENTS)
        forever = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        try:
            async with self._session.get(url, timeout=forever) as reply:
                if reply.status != 200:
                    raise ProviderError(f"the Engine answers {reply.status}", where=where)
                yield None
                async for line in reply.content:
                    yield parse(line, schema.Event, where)
        except _FAILURES as error:
            raise _away(error, where) from None
        raise ProviderError("the stream has ended", where=where)


async def _whole(reply: aiohttp.ClientResponse, where: str) -> bytes:
    parts = bytearray()
    async for part in reply.content.iter_any():
        parts += part
        if len(parts) > BODY_LIMIT:
            raise ProviderError(f"the answer is longer than {BODY_LIMIT >> 20} MiB", where=where)
    return bytes(parts)


def _away(error: Exception, where: str) -> ProviderError:
    """Why nobody, or nothing that can be used, answered."""
    cause = getattr(error, "os_error", error)
    remedy = _DENIED if isinstance(cause, PermissionError) else _DOWN if isinstance(cause, OSError) else _ELSE
    return ProviderError(plain(error), where=where, remedy=remedy)


def _said(body: bytes) -> str:
    """The message of an Engine's error; of another program's the beginning, in one line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["message"])
    return " ".join(body[:200].decode(errors="replace").split())[:80]


def _number(version: str) -> tuple[int, int]:
    try:
        major, minor = version.split(".")
        return int(major), int(minor)
    except ValueError:
        raise ProviderError(f"{version!r} is no API version", where="GET /version") from None
