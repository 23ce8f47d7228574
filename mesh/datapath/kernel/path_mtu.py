# SPDX-License-Identifier: Apache-2.0
"""Checks what ICMP errors say of the paths to other nodes: the programs note a hint, and this thread asks the path.

Anybody can send "too big" about the tunnel. So it counts only once probes of that size are lost or refused, and smaller
ones are answered by the other node's peer port. Where none is answered, nothing can be found out, and the hint counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import structlog

from mesh import _abi, _bpf, netaddr
from mesh.datapath.paths.peer_probe import PathMtu, path_mtu
from mesh.model import Address

INTERVAL: Final = 1.0  # seconds between two looks at the hints

log = structlog.get_logger(__name__)


class PathMtuCheck:
    """A thread that looks every INTERVAL seconds until it is closed, or `may` returns False.

    Args:
        nodes: the map mesh_nodes.
        port: the nodes' peer port.
        probe: as `path_mtu`.
    """

    def __init__(
        self,
        nodes: _bpf.Map,
        port: int,
        may: Callable[[], bool],
        probe: Callable[[Address, int, int], PathMtu] = path_mtu,
    ) -> None:
        self._nodes, self._port, self._may, self._probe = nodes, port, may, probe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mesh-kernel-pmtu", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL) and self._may():
            try:
                self.check()
            except Exception as error:  # the next look tries again
                log.warning("cannot check what a path to another node takes; retrying", error=str(error))

    def check(self) -> None:
        """Ask each path about which there is a hint."""
        for key, node in self._hinted():
            address = netaddr.unpack(key)
            found = believed(node, self._probe(address, self._port, node.mtu))
            now = self._nodes.lookup(key)
            if now is None:
                continue
            stamp = time.monotonic_ns() >> _abi.STAMP_SHIFT
            entry = _abi.NODE.unpack(now)._replace(hint=0, path_mtu=found, path_stamp=stamp & 0xFFFFFFFF)
            self._nodes.update(key, _abi.NODE.pack(entry))
            log.info("path MTU checked", node=str(address), said=node.hint, mtu=found or node.mtu)

    def _hinted(self) -> Iterator[tuple[bytes, _abi.Node]]:
        for key, value in self._nodes.rows():
            node = _abi.NODE.unpack(value)
            if node.hint:
                yield key, node

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


def believed(node: _abi.Node, found: PathMtu) -> int:
    """The path MTU to write, by what the probes have found; 0: the interface's. Pure."""
    if not found.mtu:
        return node.hint
    return found.mtu if found.mtu < node.mtu else 0
