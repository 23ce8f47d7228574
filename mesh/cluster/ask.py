# SPDX-License-Identifier: Apache-2.0
"""Questions of one node's agent to another's: one request over mutual TLS at the other's `cluster_port`.

Agents of managers and of workers answer alike, each about its own node. A node that cannot be called from here is asked
by way of a manager. An agent of a build before these questions answers 404, and is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from mesh.cluster.credentials import CredentialsWatch
from mesh.errors import MeshError, plain
from mesh.model import Address
from mesh.netaddr import join_host_port
from mesh.providers.base import EarlierBuildError

PATH: Final = "/v1/ask/"
NODE: Final = "node"  # the parameter that names who is asked, where that is not who is called
CONNECT: Final = 2.0  # seconds for the connection and the handshake
MANAGER: Final = "swarm-manager"  # a DNS name in managers' certificates only
MOST: Final = 4 << 20  # bytes of an answer

Query = Mapping[str, str]
Answer = Callable[[Query], Awaitable[Mapping[str, Any]]]
"""Answers a question about this node, given its parameters. Raises MeshError for what cannot be answered."""


@dataclass(frozen=True, slots=True)
class Place:
    """Who is called: where, and the name in the certificate."""

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


class UnreachableError(MeshError):
    """No agent could be called there."""


class Asker:
    """Asks other nodes.

    Args:
        port: `cluster_port`, the same on all nodes.
        managers: the managers' addresses and ports now.
    """

    def __init__(
        self,
        credentials: CredentialsWatch,
        port: int,
        managers: Callable[[], Awaitable[Sequence[tuple[str, int]]]],
    ) -> None:
        self._credentials = credentials
        self._port = port
        self._managers = managers

    async def ask(self, node: str, address: Address | None, question: str, query: Query, seconds: float) -> Any:
        """A node's answer.

        Args:
            node: its id, which its certificate has to name.
            seconds: for everything.

        Raises:
            EarlierBuildError: its build does not know the question.
            MeshError: it cannot be called, or refused; the message says why.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._ask(node, address, question, query)
        except TimeoutError:
            raise MeshError(f"no answer within {seconds:g} s", remedy="`mesh check --cluster` tries the port") from None

    async def _ask(self, node: str, address: Address | None, question: str, query: Query) -> Any:
        try:
            return await self.ask_directly(node, address, question, query)
        except UnreachableError as error:
            refusal = error
        for host, port in await self._managers():
            if address is not None and host == str(address):
                continue
            try:
                return await self._call(Place(host, port, MANAGER), question, {**query, NODE: node})
            except (UnreachableError, EarlierBuildError):
                continue
        raise refusal

    async def ask_directly(self, node: str, address: Address | None, question: str, query: Query) -> Any:
        """The same, without the help of a manager.

        Raises:
            UnreachableError: it cannot be called from here.
        """
        if address is None:
            raise UnreachableError("its address is not known")
        return await self._call(Place(str(address), self._port, node), question, query)

    async def _call(self, place: Place, question: str, query: Query) -> Any:
        credentials = self._credentials.current()
        url = f"https://{join_host_port(place.host, place.port)}{PATH}{question}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, params=query, ssl=credentials.client, server_hostname=place.name) as response,
            ):
                body = await response.content.read(MOST)
                status = response.status
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(
                f"{place}: {plain(error)}", remedy="`mesh check --cluster` tries the port; is mesh running there?"
            ) from None
        if status == 404:
            raise EarlierBuildError("its build does not know the question", remedy="upgrade mesh there")
        return _decoded(place, status, body)


def _decoded(place: Place, status: int, body: bytes) -> Any:
    try:
        answer = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        raise MeshError(f"{place}: {body[:80].decode(errors='replace').strip() or f'status {status}'}") from None
    if status >= 400:
        raise MeshError(str(answer.get("error", f"status {status}")), remedy=str(answer.get("remedy", "")))
    return answer
