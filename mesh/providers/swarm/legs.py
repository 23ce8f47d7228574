# SPDX-License-Identifier: Apache-2.0
"""Where this node reaches its tasks that Docker has given no place on docker_gwbridge.

Docker gives a task such a place only while none of its own networks leads out of the node. A task with a bridge of the
node, or with macvlan, has none, and `docker network connect` takes it from a task that runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.errors import ProviderError
from mesh.model import Address
from mesh.providers.swarm import schema
from mesh.providers.swarm.schema import address_of, parse

Get = Callable[[str], Awaitable[bytes]]
"""GET of a path, such as `/networks`.

Raises:
    ProviderError: no answer that can be used.
"""

_APART: Final = frozenset({"host", "none", "bridge"})  # who is on these only publishes nothing through the mesh
_SECONDS: Final = 2.0  # for one container: a single one that Docker has locked must not hold up all others
_Seen = frozenset[tuple[str, str]]  # network and endpoint ids


@dataclass(frozen=True, slots=True)
class Leg:
    """By what a task leaves its node. `address`: where the node reaches it there; None: it does not, `why` says so."""

    address: Address | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a network is: its driver, and whether it leads nowhere else (`--internal`)."""

    driver: str
    internal: bool = False


def leg_of(attached: Mapping[str, schema.Attachment], kinds: Mapping[str, Kind]) -> Leg | None:
    """The way out of a task that is attached to these networks (by name). Pure.

    Docker lets a container leave by one of its networks. Its answers to clients take that way, so it has to be reached
    there and nowhere else.

    Args:
        kinds: by network id.

    Returns:
        None: no network leads out, so Docker gives it a place on docker_gwbridge, or is about to.
    """
    leaving = [
        (_order(name, at), name, at, kind)
        for name, at in attached.items()
        if (kind := kinds.get(at.network_id)) is not None
        and not kind.internal
        and kind.driver != "overlay"
        and (at.gateway or at.ipv6_gateway)
    ]
    if not leaving:
        return None
    _, name, at, kind = min(leaving, key=lambda each: each[0])
    address = address_of(at.ip_address) or address_of(at.global_ipv6_address)
    if kind.driver == "bridge" and address is not None:
        return Leg(address)
    return Leg(
        None, f"it leaves its node by network {name} ({kind.driver}), by which the node itself does not reach it"
    )


def _order(name: str, at: schema.Attachment) -> tuple[int, bool, bool, str]:
    """Docker's order of networks to leave by, the first first."""
    return -at.gw_priority, not (at.gateway and at.ipv6_gateway), not at.gateway, name


class Legs:
    """Remembers what it has asked: a container is asked for once, until its networks change."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[_Seen, Leg | None]] = {}
        self._kinds: dict[str, Kind] = {}

    async def find(self, containers: bytes, gateway: bytes, get: Get) -> dict[str, Leg]:
        """Legs of those containers that are not on docker_gwbridge and leave their node by another network.

        The Engine's list of containers shows a change of networks some time after it; the container itself shows it at
        once. A container that cannot be asked now is as it was.

        Args:
            containers: GET /containers/json.
            gateway: GET /networks/docker_gwbridge.

        Raises:
            ProviderError: either cannot be used, or the Engine does not name its networks.
        """
        listed = parse(containers, list[schema.Container], "GET /containers/json")
        on_gateway = parse(gateway, schema.Network, "GET /networks/docker_gwbridge").containers
        found: dict[str, tuple[_Seen, Leg | None]] = {}
        asking: dict[str, _Seen] = {}
        for container in listed:
            attached = (container.network_settings and container.network_settings.networks) or {}
            if container.id in on_gateway or attached.keys() <= _APART:
                continue
            seen = frozenset((at.network_id, at.endpoint_id) for at in attached.values())
            known = self._found.get(container.id)
            if known is not None:
                found[container.id] = known
            if known is None or known[0] != seen:
                asking[container.id] = seen
        for container_id, leg in await self._ask(asking, get):
            found[container_id] = asking[container_id], leg
        self._found = found
        return {container_id: leg for container_id, (_, leg) in found.items() if leg is not None}

    async def _ask(self, containers: Iterable[str], get: Get) -> list[tuple[str, Leg | None]]:
        """The legs of those that answer, all asked at once."""
        answers = await asyncio.gather(*(_attached(container, get) for container in containers))
        given = [(container, at) for container, at in zip(containers, answers, strict=True) if at is not None]
        if any(each.network_id not in self._kinds for _, at in given for each in at.values()):
            networks = parse(await get("/networks"), list[schema.NetworkSummary], "GET /networks")
            self._kinds = {network.id: Kind(network.driver, network.internal) for network in networks}
        return [(container, leg_of(at, self._kinds)) for container, at in given]


async def _attached(container: str, get: Get) -> Mapping[str, schema.Attachment] | None:
    """A container's networks, by name; None: it ends, or Docker is at work on it, so it is asked with the next read."""
    where = f"/containers/{container}/json"
    try:
        async with asyncio.timeout(_SECONDS):
            settings = parse(await get(where), schema.ContainerInspect, f"GET {where}").network_settings
    except (ProviderError, TimeoutError):
        return None
    return (settings and settings.networks) or {}
