# SPDX-License-Identifier: Apache-2.0
"""The proxy engine between nodes: which nodes may hand over flows, for which backends, and where (`peer_port`)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from mesh import netaddr
from mesh._fastpath import Engine, Front
from mesh._maglev import backend_seed
from mesh.config.keys import Config
from mesh.datapath.base import BackendEntry, BackendKey
from mesh.datapath.proof import NONE, Proof
from mesh.datapath.proxy.listeners import closed, listening_sockets, why
from mesh.datapath.proxy.rules import Prefix, SourceRules, prefixes
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol

SEED: Final = 8  # bytes of a backend's seed that name it between nodes


def tag_of(key: BackendKey) -> bytes:
    """A backend's name on its own node: the first bytes of its seed, and its port in network order."""
    return backend_seed(key.backend)[:SEED] + key.port.to_bytes(2, "big")


def place_of(entry: BackendEntry) -> tuple[bytes, int, int]:
    """(tag, protocol, owner) of a backend of this node."""
    return tag_of(entry.key), entry.key.protocol, entry.id


def is_peers(frontend: Frontend, config: Config) -> bool:
    """Whether a frontend stands for the peer port among the sockets that one process hands to the next."""
    return frontend.port == config.peer_port and frontend.address == ANY_ADDRESS


class Peers:
    """The port at which other nodes hand over flows. It opens when a second node is known, and stays open.

    A caller is admitted by its address, which must be a node's, and by the proof that it knows the swarm's key, as far
    as that node gives one (mesh.datapath.proof).
    """

    def __init__(self, config: Config, threads: int, inherited: Mapping[Frontend, Sequence[int]] | None = None) -> None:
        self._port = config.peer_port
        self._threads = threads
        self._inherited = {
            frontend: [socket.socket(fileno=fd) for fd in fds]
            for frontend, fds in (inherited or {}).items()
            if is_peers(frontend, config)
        }
        self._fronts: dict[Protocol, Front] = {}
        self._descriptors: dict[Frontend, tuple[int, ...]] = {}  # listening sockets
        self._nodes: tuple[Address, ...] | None = None  # admitted nodes; None: to be put again
        self._backends: dict[int, tuple[bytes, int, int]] = {}  # by owner
        self._rules: Mapping[int, SourceRules] = {}  # by owner
        self._proof = NONE
        self._stale = False  # backends were added or removed
        self.problem = ""

    def apply(
        self,
        engine: Engine,
        nodes: tuple[Address, ...],
        backends: Iterable[BackendEntry],
        rules: Mapping[int, SourceRules],
    ) -> None:
        """Admit these nodes to all local backends, those put so far and those in `backends`, for clients that these
        source rules admit."""
        for entry in backends:
            place = place_of(entry) if entry.target.via is None else None
            if self._backends.get(entry.id) != place:
                self.drop(entry.id)
                if place is not None:
                    self._backends[entry.id] = place
                self._stale = True
        if nodes == self._nodes and not self._stale and rules == self._rules:
            return
        self._nodes, self._rules, self._stale = nodes, rules, False
        self._admit(engine)
        if len(nodes) > 1 and len(self._fronts) < len(Protocol):
            try:
                self._listen(engine)
                self.problem = ""
            except DatapathError as error:
                self._nodes = None  # the next plan tries again
                self.problem = f"tasks of this node are not reachable through other nodes: {error}"
        elif nodes:
            self.close()

    def prove(self, engine: Engine, proof: Proof) -> None:
        """See Datapath.prove."""
        if proof != self._proof:
            self._proof = proof
            if self._nodes is not None:
                self._admit(engine)

    def _admit(self, engine: Engine) -> None:
        places = []
        packed: dict[tuple[int, int], tuple[list[Prefix], list[Prefix]]] = {}
        for tag, protocol, owner in sorted(self._backends.values()):
            rules = self._rules.get(owner, ((), ()))
            one = id(rules[0]), id(rules[1])  # of a service, which its backends share
            if one not in packed:
                packed[one] = prefixes(*rules)
            places.append((tag, protocol, owner, *packed[one]))
        proof = self._proof
        nodes = [(netaddr.pack(a), a in proof.proving, a in proof.checking) for a in self._nodes or ()]
        engine.put_peer_acl(nodes, places, list(proof.keys), proof.require)

    def drop(self, owner: int) -> None:
        """A backend is gone. The engine knows, so the next plan is early enough to remove its name."""
        self._stale = self._backends.pop(owner, None) is not None or self._stale

    def _listen(self, engine: Engine) -> None:
        for protocol in Protocol:
            if protocol in self._fronts:
                continue
            self._listen_on(engine, Frontend(ANY_ADDRESS, self._port, protocol), None)

    def _listen_on(self, engine: Engine, frontend: Frontend, front: Front | None) -> None:
        """Open a peer port for the engine's `front`, in place of what it has; None: for a new one."""
        sockets = self._inherited.pop(frontend, [])
        try:
            sockets += listening_sockets(frontend, self._port, max(self._threads - len(sockets), 0))
        except OSError as error:
            if not sockets:  # else fewer threads accept connections
                raise why(frontend, error) from None
        if front is not None:
            engine.unlisten(front)
        front = self._fronts[frontend.protocol] = front or engine.peers()
        six = sockets[0].family == socket.AF_INET6
        self._descriptors[frontend] = tuple(sock.detach() for sock in sockets)
        for thread, fd in enumerate(self._descriptors[frontend]):
            engine.listen(front, fd, stream=frontend.protocol is Protocol.TCP, six=six, thread=thread)

    def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """Descriptors of the listening sockets, by the frontends that stand for the peer port."""
        return dict(self._descriptors)

    def lost(self) -> list[Frontend]:
        """Those whose listening sockets somebody else has closed."""
        return [frontend for frontend, fds in self._descriptors.items() if closed(frontend, fds)]

    def restore(self, engine: Engine) -> None:
        """Listen again on the sockets that are lost.

        Raises:
            DatapathError: the port cannot be bound.
        """
        for frontend in self.lost():
            self._listen_on(engine, frontend, self._fronts[frontend.protocol])

    def yielded(self) -> None:
        """The engine has closed all sockets."""
        self._descriptors.clear()

    def close(self) -> None:
        """Close the inherited sockets that were not needed."""
        for sock in (sock for sockets in self._inherited.values() for sock in sockets):
            with contextlib.suppress(OSError):
                sock.close()
        self._inherited.clear()

    def stop(self, engine: Engine) -> None:
        """Accept no more connections. Datagrams are accepted until `close`: their flows have no end."""
        if Protocol.TCP in self._fronts:
            engine.unlisten(self._fronts[Protocol.TCP])
            self._descriptors.pop(Frontend(ANY_ADDRESS, self._port, Protocol.TCP), None)

    def totals(self) -> dict[str, int]:
        """Counters of the flows handed over, by metric name without prefix and suffix."""
        rows = [front.handed() for front in list(self._fronts.values())]
        named = {"peer_opened": 2, "peer_received_bytes": 6, "peer_sent_bytes": 7}
        return {name: sum(row[index] for row in rows) for name, index in named.items()}  # type: ignore[misc]
