# SPDX-License-Identifier: Apache-2.0
"""An inventory of one service, part by part."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from mesh.model import Backend, Inventory, Node, Protocol, PublishedPort, Service, ServiceOptions

ADDRESS = ipaddress.IPv4Address("172.18.0.2")


def service(name: str = "web", port: int = 8080, **options: object) -> Service:
    return Service(name, name, (PublishedPort(port, 80, Protocol.TCP),), ServiceOptions(**options))  # type: ignore[arg-type]


def backend(name: str, **changes: object) -> Backend:
    plain = Backend(id=name, service="web", node="n", address=ADDRESS)
    return replace(plain, **changes)  # type: ignore[arg-type]


def of(*backends: Backend, node: Node | None = None, **options: object) -> Inventory:
    return Inventory((service(**options),), backends, (node,) if node else ())  # type: ignore[arg-type]
