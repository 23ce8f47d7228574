# SPDX-License-Identifier: Apache-2.0
"""Source rules (mesh.allow, mesh.deny) as the proxy engine takes them, by frontend and by backend. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mesh import netaddr
from mesh.datapath.base import FrontendEntry
from mesh.model import Network
from mesh.rules import compact

SourceRules = tuple[Sequence[Network], Sequence[Network]]  # allow, deny
Prefix = tuple[bytes, int]  # 16 bytes; prefix length of 128


def rules_of(frontends: Iterable[FrontendEntry]) -> dict[int, SourceRules]:
    """The rules of backends, by owner: those of their service, which all its frontends have.

    Owners without rules are left out.
    """
    found: dict[int, SourceRules] = {}
    for entry in frontends:
        options = entry.state.options
        if options.allow or options.deny:
            found |= dict.fromkeys(entry.backends, (options.allow, options.deny))
    return found


def prefixes(allow: Sequence[Network], deny: Sequence[Network]) -> tuple[list[Prefix], list[Prefix]]:
    """Both lists as the engine takes them: merged, sorted."""
    admitted, denied = compact(allow, deny)
    return _packed(admitted), _packed(denied)


def _packed(networks: Iterable[Network]) -> list[Prefix]:
    return [(netaddr.pack(n.network_address), netaddr.prefix_length(n)) for n in networks]
