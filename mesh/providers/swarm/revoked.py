# SPDX-License-Identifier: Apache-2.0
"""Certificates that the swarm has revoked: those of nodes that were removed, until they expire.

Only swarmkit's own API tells them: Control.ListClusters on the manager's control socket. Source of names and numbers:
swarmkit's api/control.proto and api/objects.proto.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from mesh.errors import ProviderError
from mesh.providers.swarm.watch import frames
from mesh.providers.swarm.watch_message import fields

_CALL: Final = "/docker.swarmkit.v1.Control/ListClusters"
_NOTHING: Final = bytes(5)  # an empty message
_CLUSTERS, _REVOKED, _NAME = 1, 8, 1  # ListClustersResponse.clusters, Cluster.blacklisted_certificates, its key
_HEAD: Final = 5  # bytes ahead of a message: whether it is compressed, its length
_SECONDS: Final = 5.0


def names(message: bytes) -> frozenset[str]:
    """The nodes whose certificates a ListClustersResponse calls revoked.

    Raises:
        ProviderError: it is none.
    """
    try:
        return frozenset(
            name.decode("ascii")
            for number, cluster in fields(message)
            if number == _CLUSTERS
            for number, entry in fields(cluster)
            if number == _REVOKED
            for number, name in fields(entry)
            if number == _NAME
        )
    except ValueError as error:
        raise ProviderError(f"the manager's answer makes no sense: {error}", where=_CALL) from None


async def revoked(control_socket: Path, certificates: Path) -> frozenset[str]:
    """The nodes whose certificates the swarm has revoked.

    Raises:
        ProviderError: this node is no manager, or its Engine does not answer.
    """
    data = b""
    try:
        async with asyncio.timeout(_SECONDS):
            async with contextlib.aclosing(frames(control_socket, certificates, _CALL, _NOTHING)) as pieces:
                async for piece in pieces:
                    data += piece
                    end = _HEAD + int.from_bytes(data[1:_HEAD], "big")
                    if len(data) >= max(_HEAD, end):
                        return names(data[_HEAD:end])
    except TimeoutError:
        raise ProviderError("the manager does not answer in time", where=str(control_socket)) from None
    raise ProviderError("the manager has answered nothing", where=str(control_socket))
