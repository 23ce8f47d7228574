# SPDX-License-Identifier: Apache-2.0
"""ADDRESS:PORT as requests and commands write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.errors import MeshError
from mesh.netaddr import split_address_port

if TYPE_CHECKING:
    from mesh.model import Address


def parse_endpoint(text: str) -> tuple[Address, int]:
    """`192.0.2.7:80` or `[2001:db8::7]:80` as address and port.

    Raises:
        MeshError: it is neither; the message shows both forms.
    """
    try:
        address, port = split_address_port(text)
    except ValueError:
        port = 0
    if not port:
        raise MeshError(
            f"{text!r} is not an address and a port",
            remedy="write 192.0.2.7:40000, or [2001:db8::7]:40000 for IPv6; names are not looked up",
        )
    return address, port
