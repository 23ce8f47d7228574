# SPDX-License-Identifier: Apache-2.0
"""The proxy engine between nodes: who may hand flows over to this node, for what, and where (config `peer_port`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mesh._fastpath import Engine, Front
from mesh._maglev import backend_seed
from mesh.config import Config
from mesh.datapath.base import Applied, BackendEntry, BackendKey
from mesh.datapath.intercept import listening_sockets, why
from mesh.datapath.proxy_books import sixteen
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol

SEED: Final = 8  # bytes of a backend's seed that name it between nodes


def tag_of(key: BackendKey) -> bytes:
    """What names a backend's port to its own node: the beginning of its seed, the port in network order."""
    return backend_seed(key.backend)[:SEED] + key.port.to_bytes(2, "big")


def places_of(backends: Iterable[BackendEntry]) -> list[tuple[bytes, int, int]]:
    """(tag, protocol, owner) of the backends that run here, sorted."""
    return sorted((tag_of(b.key), b.key.protocol, b.id) for b in backends if b.target.via is None)


class Peers:
    """The port at which other nodes hand flows over. It opens when a second node is known, and stays open.

    It carries no secret: what admits a caller is its address, which must be a node's. So the network between nodes is
    trusted not to carry forged sources, as Swarm's own overlay data path trusts it.
    """

    def __init__(self, config: Config, threads: int) -> None:
        self._port = config.peer_port
        self._threads = threads
        self._fronts: dict[Protocol, Front] = {}
        self._held: tuple[object, object] | None = None
        self.problem = ""

    def apply(self, engine: Engine, nodes: tuple[Address, ...], backends: Iterable[BackendEntry]) -> None:
        """Admit these nodes to those of the backends that run here."""
        places = places_of(backends)
        if (nodes, places) == self._held:
            return
        engine.put_doors([sixteen(address) for address in nodes], places)
        self._held = (nodes, places)
        if len(nodes) > 1 and len(self._fronts) < len(Protocol):
            try:
                self._listen(engine)
                self.problem = ""
            except DatapathError as error:
                self._held = None  # the next plan tries again
                self.problem = f"tasks of this node are not reachable through other nodes: {error}"

    def _listen(self, engine: Engine) -> None:
        for protocol in Protocol:
            if protocol in self._fronts:
                continue
            frontend = Frontend(ANY_ADDRESS, self._port, protocol)
            try:
                sockets = listening_sockets(frontend, self._port, self._threads)
            except OSError as error:
                raise why(frontend, error) from None
            front = self._fronts[protocol] = engine.peers()
            for thread, sock in enumerate(sockets):
                six = sock.family.name == "AF_INET6"
                engine.listen(front, sock.detach(), stream=protocol is Protocol.TCP, six=six, thread=thread)

    def stop(self, engine: Engine) -> None:
        """Take no connection over any more. Datagrams are, until the end: they have none."""
        if Protocol.TCP in self._fronts:
            engine.unlisten(self._fronts[Protocol.TCP])

    def totals(self) -> dict[str, int]:
        """Counters of what was handed over, by metric name without prefix and suffix."""
        rows = [front.handed() for front in list(self._fronts.values())]
        named = {"peer_opened": 2, "peer_bytes_in": 6, "peer_bytes_out": 7}
        return {name: sum(row[index] for row in rows) for name, index in named.items()}  # type: ignore[misc]


def all_backends(applied: Applied, coming: Iterable[BackendEntry]) -> list[BackendEntry]:
    """What is held and what is about to be."""
    return list({entry.id: entry for entry in (*applied.backends.values(), *coming)}.values())
