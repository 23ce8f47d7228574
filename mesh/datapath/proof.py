# SPDX-License-Identifier: Apache-2.0
"""What a node proves to other nodes with, and what it demands of them. mesh/fastpath/proof.pyx has the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh._siphash import siphash
from mesh.model import Address

WINDOW: Final = 60.0  # seconds: PROOF_WINDOW of mesh/fastpath/types.pxd
TCP: Final = 1  # kinds: PROOF_* of mesh/fastpath/proof.pxd
UDP: Final = 2
SIZE: Final = 16


def write(key: tuple[int, bytes], kind: int, body: bytes, now: int) -> bytes:
    """A proof of `body`, SIZE bytes.

    Args:
        key: number and secret.
        now: Unix seconds.
    """
    number, secret = key
    head = number.to_bytes(4, "big") + (now & 0xFFFFFFFF).to_bytes(4, "big")
    return head + siphash(secret, bytes([kind]) + head + body).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Proof:
    """The state of the swarm's keys as an engine needs it.

    Attributes:
        keys: (number, secret) of those that are valid; this node proves by the first.
        proving: addresses of nodes from which nothing unproven is accepted.
        checking: of nodes that understand proofs, and answer with them.
        require: nothing unproven is accepted from any node.
        tunnel_proving: as `proving`, of the tunnel.
        tunnel_checking: as `checking`, of the tunnel.
        own: this node's address as the others know it; behind NAT none of its own interfaces has it. None: not known.
        known: the nodes are known; if not, what was demanded of them is, and they are sent what they were.
    """

    keys: tuple[tuple[int, bytes], ...] = ()
    proving: frozenset[Address] = frozenset()
    checking: frozenset[Address] = frozenset()
    require: bool = False
    tunnel_proving: frozenset[Address] = frozenset()
    tunnel_checking: frozenset[Address] = frozenset()
    known: bool = True
    own: Address | None = None

    def of(self, kind: int, body: bytes, now: int) -> bytes:
        """A proof of `body`; one that nobody believes where this node has no key."""
        return write(self.keys[0], kind, body, now) if self.keys else bytes(SIZE)


NONE: Final = Proof()
