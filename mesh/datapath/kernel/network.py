# SPDX-License-Identifier: Apache-2.0
"""This node's network as the kernel engine follows it: interfaces, addresses, routes, and where each backend is.

The kernel announces changes by netlink; the maps and the locations of backends follow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import structlog

from mesh import _linux
from mesh.config.keys import Config
from mesh.datapath.base import BackendEntry
from mesh.datapath.kernel.locator import Location, Locator, misplaced, unserved, wanted
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.tunnel import Nodes
from mesh.datapath.losses import LOOK as CHECK
from mesh.datapath.netlink import GROUPS, Monitor, Topology, groups
from mesh.model import Frontend
from mesh.supervisor import FAULTS

QUIET: Final = 0.05  # least seconds between two looks at the network, however fast it changes
LOOK: Final = 5.0  # seconds after which to look although nothing was announced
ANSWER: Final = (0.002, 0.004, 0.008, 0.016, 0.032)  # seconds between looks for backends that are new here to answer

log = structlog.get_logger(__name__)


class Network:
    """The node's network and the locations of its backends. Not thread-safe, except for the properties.

    Args:
        locator: finds backends.
        maps: get the node's addresses and the tunnel's port.
        nodes: the other nodes, whose routes follow the network.
    """

    def __init__(self, config: Config, locator: Locator, maps: KernelMaps, nodes: Nodes) -> None:
        self._locator = locator
        self._maps = maps
        self._nodes = nodes
        self._tunnel_port, self._peer_port = config.tunnel_port, config.peer_port
        self._patterns = [p.strip() for p in config.interfaces.split(",") if p.strip()]
        self._locations: dict[int, Location] = {}
        self._changed = True  # since all backends were last located

    @property
    def topology(self) -> Topology:
        """The network as last seen, with the floating addresses among the node's own."""
        return self._locator.topology

    @property
    def locations(self) -> Mapping[int, Location]:
        """Where backends of this node are, by their ids."""
        return self._locations

    def refresh(self) -> None:
        """Read the network anew and bring the maps in line with it."""
        self._changed = self._locator.refresh() or self._changed
        self._maps.set_addresses(self.topology.addresses, self._locator.floating)
        self._nodes.refresh(self.topology)
        if self._nodes.held:
            self._maps.listen(self._tunnel_port, self._peer_port)
        else:
            self._maps.listen(0, 0)

    def prepare(self, backends: Collection[BackendEntry]) -> None:
        """Locate backends that are about to be published.

        Waits a moment for those that nobody has spoken with yet: a flow that starts before the networks of its task are
        known keeps its source, although the task may take the client for a neighbour.
        """
        self.refresh()
        found = self._find(backends)
        new = [entry for entry in backends if entry.id in found and entry.id not in self._locations]
        for pause in ANSWER:
            new = [entry for entry in new if self._locator.awaits(entry.target.address)]
            if not new:
                break
            time.sleep(pause)
            self._changed = self._locator.refresh() or self._changed
            found |= self._find(new)
        self._locations |= found

    def follow(self, backends: Collection[BackendEntry]) -> bool:
        """See where all backends are now. Returns whether any may be somewhere else."""
        self.refresh()
        if self._changed:
            self._locations = self._find(backends)
            self._changed = False
            return True
        again = self._locator.open()
        found = self._find(e for e in backends if e.target.address in again) if again else {}
        self._locations |= found
        return bool(found)

    def forget(self, backends: Iterable[BackendEntry]) -> None:
        """These backends are gone."""
        for entry in backends:
            self._locations.pop(entry.id, None)
            self._locator.forget([entry.target.address])

    def _find(self, backends: Iterable[BackendEntry]) -> dict[int, Location]:
        return {e.id: self._locator.find(e.target.address) for e in backends if e.target.via is None}

    def programs(self) -> Mapping[int, str]:
        """Which program belongs on which interface."""
        nodes, guarded = self._nodes.interfaces, self._maps.has_rules
        return wanted(self.topology, self._locations.values(), self._patterns, nodes, guarded=guarded)

    def problems(self, frontends: Iterable[Frontend], backends: Iterable[BackendEntry]) -> Sequence[str]:
        """Nodes, frontends and backends that the network keeps from being served, one sentence each."""
        return [
            *self._nodes.problems(frontends, self._tunnel_port),
            *misplaced(backends, self._locations),
            *(unserved(self.topology.interfaces, self.programs()) if self._maps.has_rules else ()),
        ]


class Follower:
    """A thread that looks at the network when the kernel announces a change, and every LOOK seconds.

    Args:
        look: called with whether a change was announced; returns whether to go on. An exception is logged, and the
            next look tries again.
        check: called every CHECK seconds between looks, likewise.
        due: seconds until a look is due for another reason.
    """

    def __init__(self, look: Callable[[bool], bool], check: Callable[[], bool], due: Callable[[], float]) -> None:
        self._look, self._check, self._due = look, check, due
        self._monitor = Monitor(GROUPS | groups(_linux.RTNLGRP_TC))
        self._looked = 0.0  # monotonic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mesh-kernel-follow", daemon=True)

    def start(self) -> None:
        """Begin; changes since construction have been announced."""
        self._thread.start()

    def wake(self) -> None:
        """Look at once; any thread."""
        self._monitor.wake()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stop.is_set():
            try:
                asked, pause = time.monotonic(), min(CHECK, self._due())
                changed = self._monitor.wait(pause)
                started = time.monotonic()
                woken = started - asked < pause
                if self._stop.is_set() or not self._turn(changed, anew=woken or self._due() <= 0):
                    return
            except Exception as error:  # the next look tries again
                if not self._stop.is_set():
                    FAULTS.failed("network follower", error)
                    log.warning("cannot follow a network change; retrying", error=str(error))
            self._stop.wait(max(QUIET, 4 * (time.monotonic() - started)))

    def _turn(self, changed: bool, *, anew: bool) -> bool:
        now = time.monotonic()
        if changed or anew or now - self._looked >= LOOK:
            self._looked = now
            return self._look(changed)
        return self._check()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._monitor.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._monitor.close()
