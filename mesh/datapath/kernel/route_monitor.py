# SPDX-License-Identifier: Apache-2.0
"""Tells the programs that routes have changed: cached next hops are no longer valid (bpf/lib/fib.h)."""

from __future__ import annotations

import threading
from typing import Final

import structlog

from mesh import _bpf, _linux
from mesh.datapath.netlink import Monitor, groups
from mesh.supervisor import FAULTS

GROUPS: Final = groups(
    _linux.RTNLGRP_LINK,
    _linux.RTNLGRP_IPV4_IFADDR,
    _linux.RTNLGRP_IPV4_ROUTE,
    _linux.RTNLGRP_IPV4_RULE,
    _linux.RTNLGRP_IPV6_IFADDR,
    _linux.RTNLGRP_IPV6_ROUTE,
    _linux.RTNLGRP_IPV6_RULE,
    _linux.RTNLGRP_NEXTHOP,
)
FOREVER: Final = 3600.0  # seconds
AGAIN: Final = 1.0  # seconds until a retry

log = structlog.get_logger(__name__)


class RouteMonitor:
    """A thread that does nothing else: until it reports a change, replies may take the old route.

    Args:
        routes: mesh_fib_gen, of which it is the only writer. It counts changes, and starts with one: nobody may have
            followed them before.

    Raises:
        DatapathError: the kernel does not announce changes.
    """

    def __init__(self, routes: _bpf.Map) -> None:
        self._count = _bpf.Mapping(routes)
        self._monitor = Monitor(GROUPS)
        self._changed()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mesh-kernel-routes", daemon=True)
        self._thread.start()

    def _changed(self) -> None:
        self._count.store32(0, (self._count.load32(0) + 1) & 0xFFFFFFFF)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._monitor.wait(FOREVER):
                    self._changed()
            except Exception as error:  # something may have changed meanwhile
                FAULTS.failed("route monitor", error)
                log.warning("cannot follow route changes; retrying", error=str(error))
                self._changed()
                self._stop.wait(AGAIN)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._monitor.wake()
        self._thread.join()
        self._monitor.close()
