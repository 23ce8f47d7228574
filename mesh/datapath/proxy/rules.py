# SPDX-License-Identifier: Apache-2.0
"""Source rules (mesh.allow, mesh.deny) as the proxy engine takes them, by frontend and by backend. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mesh import netaddr
from mesh.datapath.base import FrontendEntry
from mesh.model import Network

Rules = tuple[Sequence[Network], Sequence[Network]]  # allow, deny


def rules_of(frontends: Iterable[FrontendEntry]) -> dict[int, Rules]:
    """The rules of backends, by owner: those of their service, which all its frontends have.

    Owners without rules are left out.
    """
    found: dict[int, Rules] = {}
    for entry in frontends:
        options = entry.state.options
        if options.allow or options.deny:
            found |= dict.fromkeys(entry.backends, (options.allow, options.deny))
    return found


def prefixes(networks: Iterable[Network]) -> list[tuple[bytes, int]]:
    """Networks as (16 bytes, prefix length of 128)."""
    return [(netaddr.pack(n.network_address), netaddr.prefix_length(n)) for n in networks]
