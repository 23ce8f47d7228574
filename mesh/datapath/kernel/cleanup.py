# SPDX-License-Identifier: Apache-2.0
"""What an agent leaves when it goes: the kernel engine's programs forward on by tables which nobody keeps in step, and
where a proxy was killed its nftables table leads to sockets that are no more.

The next agent with the kernel engine adopts the programs. For those who want none there is the way to take them off.
`Cleanup` does it for a daemon that runs, `StaleState` for `mesh stop --release` after the daemon has gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import structlog

from mesh import _bpf
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import OWNER_PASS
from mesh.datapath.kernel import stats
from mesh.datapath.kernel.attach import Attachments
from mesh.datapath.kernel.journal import Journal
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.pins import CONTRACT, NAMES, OWNER, instance, netns_cookie, pin_home, remove_pins
from mesh.datapath.kernel.xdp import XdpStage
from mesh.datapath.netlink import Netlink
from mesh.datapath.proxy.nft import NftTable, table_name
from mesh.errors import BpfError, MeshError

GRACE: Final = 5.0  # seconds in which the other nodes learn that this one has another engine now
EVERY: Final = 10.0  # seconds between two looks for foreign instances
POLL: Final = 1.0  # seconds in which a thread waits for flows at a time

FOREIGN: Final = (
    "a daemon with another state directory has programs here too, which may serve flows by tables of its own: "
    "`mesh stop --release` with its --state-dir; if that is forgotten, rm -r {} and, before kernel 6.6, a reboot"
)

_Result = TypeVar("_Result")
log = structlog.get_logger("mesh")


def find(config: Config) -> StaleState | None:
    """What there may be; None where the kernel is too old for the kernel engine."""
    try:
        return StaleState(config)
    except OSError:
        return None


class StaleState:
    """Those of one state directory, of an agent that is gone. The caller has the lock of the state directory.

    Attributes:
        table: a proxy's in nftables, may be absent; a proxy that runs has one, too.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._home = pin_home(config)
        self._state = Path(config.state_dir)
        self.table = NftTable(table_name(config.state_dir))
        self._maps: KernelMaps | None = None

    @property
    def programs(self) -> bool:
        """Whether a kernel engine has left any, as far as this process may see."""
        try:
            return any(self._home.glob("*/mesh_ports"))
        except OSError:
            return False

    @property
    def owned(self) -> bool:
        """Whether the process that has them lives, and lets go of them by itself (a take-over)."""
        try:
            pid = int((self._state / OWNER).read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return False
        return pid != os.getpid() and Path(f"/proc/{pid}").exists()

    def hand_back(self) -> int:
        """Leave flows that start to the kernel, hence to whoever serves the ports besides.

        Returns:
            Flows that are under way and go on as before. 0 also where another build left the tables: it cannot tell.
        """
        directory = self._home / CONTRACT
        if (directory / "mesh_config").exists() and self._maps is None:
            pins = [pin for pin in directory.iterdir() if pin.name.startswith("mesh_")]
            self._maps = KernelMaps({pin.name: _bpf.Map.open(str(pin)) for pin in pins}, directory)
            hand_back(self._maps)
        return stats.live_flows(self._maps) if self._maps else 0

    def wait(self, seconds: float) -> int:
        """Wait until none is under way, at most so long. Returns how many are."""
        return stats.wait_for_flows(self._maps, seconds) if self._maps else 0

    def take_off(self) -> None:
        """Take the programs off and remove the pins; flows that are under way end.

        Filters, of kernels without tcx, say nothing of whose they are, and an interface has one: where another daemon
        is, it is that one's.
        """
        self.close()
        interfaces = {} if foreign_instances(self._config) else self._interfaces()
        for directory in [pin.parent for pin in self._home.glob("*/mesh_ports")]:
            attached = Attachments({}, directory / "links")
            attached.adopt(interfaces)
            XdpStage(None, directory / "links").detach()
            attached.detach()
        remove_pins(self._home)
        Journal(self._state / NAMES).remove()
        (self._state / OWNER).unlink(missing_ok=True)

    @staticmethod
    def _interfaces() -> Mapping[int, object]:
        netlink = Netlink()
        try:
            return netlink.topology().interfaces
        finally:
            netlink.close()

    def close(self) -> None:
        """Let go of the maps."""
        if self._maps is not None:
            self._maps.close()
            self._maps = None


def hand_back(maps: KernelMaps) -> None:
    """Have flows that start left to the kernel; those under way stay where they are."""
    maps.arenas.reserve(served.table.size for served in maps.served.values())
    for frontend, served in list(maps.served.items()):
        try:
            table = SlotTable.from_slots(maps.read_table(frontend))
        except ValueError:  # makes no sense: nor has anybody been served by it
            maps.drop_frontend(frontend)
            continue
        table = table.transition(SlotTable.uniform(table.size, OWNER_PASS))
        maps.put_frontend(frontend, table.to_bytes(), served.flags, None)


def foreign_instances(config: Config) -> list[Path]:
    """Pins of daemons with other state directories that have programs in this network namespace: what is attached first
    serves a flow, whatever this one's tables say. What this process may not see is left out."""
    found = []
    try:
        own, here = instance(config), netns_cookie().to_bytes(8, "little")
        for pin in sorted((Path(config.bpf_fs) / "mesh").glob("*/*/mesh_config")):
            home = pin.parent.parent
            if home.name != own and any((pin.parent / "links").glob("*")) and _cookie(pin) == here:
                found.append(home)
    except OSError:
        return []
    return found


def _cookie(pin: Path) -> bytes:
    """Of the network namespace that a pinned mesh_config is about; empty if it went meanwhile."""
    try:
        held = _bpf.Map.open(str(pin))
        try:
            return (held.lookup(bytes(4)) or b"")[:8]
        finally:
            held.close()
    except BpfError:
        return b""


async def _thread(work: Callable[..., _Result], *arguments: object) -> _Result:
    """In a thread, to its end: who is cancelled waits for it, for the next process may change the same things."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class Cleanup:
    """What a daemon that runs does about programs of earlier and other daemons.

    Attributes:
        problems: foreign instances in this network namespace, one sentence each.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.problems: Sequence[str] = ()

    async def clear_stale_state(self, serving: Callable[[], bool]) -> None:
        """Once the proxy engine serves: take off what the kernel engine has left in the same state directory.

        Flows that start are the proxy's from then on; those under way go on, and the programs go with the last.

        Args:
            serving: whether the proxy engine serves all that is known.
        """
        state = find(self._config)
        if state is None or not state.programs:
            return
        while not serving() or state.owned:  # noqa: ASYNC110 -- any cause, polled
            await asyncio.sleep(0.2)
        if not state.programs:
            return
        try:
            flows = await _thread(state.hand_back)
            log.info("the kernel engine served here before: its programs go with the flows under way", flows=flows)
            await asyncio.sleep(GRACE)
            while await _thread(state.wait, POLL):
                pass
            await _thread(state.take_off)
            log.info("the kernel engine's programs are taken off")
        except (MeshError, OSError, ValueError, KeyError) as error:
            log.warning("the kernel engine's programs of before are in the way: mesh stop --release", error=str(error))

    async def watch_foreign_instances(self) -> None:
        """Keep `problems`, until cancelled."""
        while True:
            found = [FOREIGN.format(path) for path in await asyncio.to_thread(foreign_instances, self._config)]
            for line in found if found != self.problems else ():
                log.warning(line)
            self.problems = found
            await asyncio.sleep(EVERY)
