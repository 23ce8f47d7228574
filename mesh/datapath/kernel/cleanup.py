# SPDX-License-Identifier: Apache-2.0
"""Removes what an agent leaves behind. The kernel engine's programs keep forwarding by tables that nobody updates, and
the nftables table of a proxy that was killed redirects to sockets that no longer exist.

The next agent with the kernel engine takes the programs over. Everyone else removes them here: `Cleanup` for a daemon
that runs, `StaleState` for `mesh stop --release` after the daemon has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import structlog

from mesh import _bpf
from mesh._abi import CONFIG, OWNER_PASS
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.kernel import heartbeat, stats
from mesh.datapath.kernel.hooks import Hooks
from mesh.datapath.kernel.journal import Journal
from mesh.datapath.kernel.kept import Kept
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.namespaces import living_cookies
from mesh.datapath.kernel.pins import CONTRACT, NAMES, Owner, instance, netns_cookie, pin_home, remove_pins
from mesh.datapath.netlink import Netlink
from mesh.datapath.proxy.nft import NftTable, table_name
from mesh.errors import BpfError, MeshError

GRACE: Final = 5.0  # seconds in which the other nodes learn that this one has another engine now
EVERY: Final = 10.0  # seconds between two looks for foreign instances
COLLECT: Final = 300.0  # seconds between two looks for namespaces that are gone
POLL: Final = 1.0  # seconds in which a thread waits for flows at a time

FOREIGN: Final = (
    "a daemon with another state directory has programs here too, which may serve flows by tables of its own: "
    "`mesh stop --release` with its --state-dir; if that is forgotten, rm -r {} and, before kernel 6.6, a reboot"
)

_Result = TypeVar("_Result")
log = structlog.get_logger("mesh")


def find(config: Config) -> StaleState | None:
    """The stale state of a configuration; None: the kernel is too old for the kernel engine."""
    try:
        return StaleState(config)
    except OSError:
        return None


class StaleState:
    """What an agent that is gone has left, for one state directory, whose lock the caller holds.

    Attributes:
        table: the proxy's nftables table. It may be absent, and may be that of a running proxy.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._home = pin_home(config)
        self._state = Path(config.state_dir)
        self.table = NftTable(table_name(config.state_dir))
        self._maps: KernelMaps | None = None

    @property
    def programs(self) -> bool:
        """Whether a kernel engine has left programs, as far as this process may see."""
        try:
            return any(self._home.glob("*/mesh_ports"))
        except OSError:
            return False

    def holds(self) -> str:
        """Until when the programs forward by the tables as they are, as the end of a sentence."""
        left = heartbeat.seconds_left(self._home)
        if left is None:
            return "for good"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))
        if left <= 0:
            return f"until {at}, and have left new connections to Docker since then"
        return f"until {at} (in {left:.0f} s), and leave new connections to Docker from then on"

    @property
    def owned(self) -> bool:
        """Whether the process that owns them is alive: it releases them itself (a take-over)."""
        return Owner(self._state).is_another()

    def hand_back(self) -> int:
        """Pass new flows to the kernel, and so to whoever else serves the ports.

        Returns:
            Established flows, which continue. 0 also where another build left the tables, which this one cannot read.
        """
        directory = self._home / CONTRACT
        if (directory / "mesh_config").exists() and self._maps is None:
            pins = [pin for pin in directory.iterdir() if pin.name.startswith("mesh_")]
            self._maps = KernelMaps({pin.name: _bpf.Map.open(str(pin)) for pin in pins}, directory)
            hand_back(self._maps)
        return stats.live_flows(self._maps) if self._maps else 0

    def wait(self, seconds: float) -> int:
        """Wait at most `seconds` for the established flows to end. Returns how many are left."""
        return stats.wait_for_flows(self._maps, seconds) if self._maps else 0

    def take_off(self) -> None:
        """Detach the programs and remove the pins; established flows are cut.

        A filter, on kernels without tcx, does not tell who attached it, and an interface has one: where another daemon
        runs, this takes the filter for the other daemon's.
        """
        self.close()
        interfaces = {} if foreign_instances(self._config) else self._interfaces()
        hooks = [Hooks({}, pin.parent) for pin in self._home.glob("*/mesh_ports")]
        for each in hooks:
            each.restore(interfaces)
        take_off(self._home, self._state, hooks)

    @staticmethod
    def _interfaces() -> Mapping[int, object]:
        netlink = Netlink()
        try:
            return netlink.topology().interfaces
        finally:
            netlink.close()

    def close(self) -> None:
        """Close the maps."""
        if self._maps is not None:
            self._maps.close()
            self._maps = None


def take_off(home: Path, state_dir: Path, hooks: Iterable[Hooks]) -> None:
    """Detach the hooks, and remove all pins in `home` and the files about them in the state directory."""
    for each in hooks:
        each.detach()
    remove_pins(home)
    Journal(state_dir / NAMES).remove()
    Kept.remove(state_dir)
    Owner(state_dir).remove()


def hand_back(maps: KernelMaps) -> None:
    """Pass new flows to the kernel; established ones stay where they are."""
    maps.arenas.reserve(served.table.size for served in maps.served.values())
    for frontend, served in list(maps.served.items()):
        try:
            table = SlotTable.from_slots(maps.read_table(frontend))
        except ValueError:  # an invalid table, which serves nobody
            maps.drop_frontend(frontend)
            continue
        table = table.transition(SlotTable.uniform(table.size, OWNER_PASS))
        maps.put_frontend(frontend, table.to_bytes(), served.flags, None)


def foreign_instances(config: Config) -> list[Path]:
    """Pins of daemons with other state directories that have programs in this network namespace.

    The program attached first takes a flow, whatever this daemon's tables say. What this process may not see is left
    out.
    """
    found = []
    try:
        own, here = instance(config), netns_cookie()
        for pin in sorted((Path(config.bpf_fs) / "mesh").glob("*/*/mesh_config")):
            home = pin.parent.parent
            if home.name != own and any((pin.parent / "links").glob("*")) and _cookie(pin) == here:
                found.append(home)
    except OSError:
        return []
    return found


def gone_instances(config: Config) -> list[Path]:
    """Pins of network namespaces that do not exist any more: nobody can use them, and each holds its maps' memory.

    Where this process cannot see which namespaces exist, those that had programs on interfaces of which none is left.
    """
    found, living = [], living_cookies()
    for home in sorted((Path(config.bpf_fs) / "mesh").glob("*")):
        cookies = {_cookie(pin) for pin in home.glob("*/mesh_config")} - {0}
        links = [_bpf.Link.open(str(pin)) for pin in home.glob("*/links/if_*")]
        try:
            there = any(link.info()[1] for link in links)
        finally:
            for link in links:
                link.close()
        gone = living.isdisjoint(cookies) if living is not None else bool(links)
        if cookies and netns_cookie() not in cookies and gone and not there:
            found.append(home)
    return found


def collect_gone(config: Config) -> list[Path]:
    """Remove the pins of `gone_instances`. Returns those that were removed; what may not be removed is left."""
    removed = []
    try:
        for home in gone_instances(config):
            remove_pins(home)
            removed.append(home)
    except (BpfError, OSError) as error:
        log.warning("cannot collect pins of network namespaces that are gone", error=str(error))
    return removed


def _cookie(pin: Path) -> int:
    """The network namespace that a pinned mesh_config is for; 0: the pin was removed meanwhile.

    The pin may be another build's, whose struct has another size: every build has the cookie where this one has it.
    """
    try:
        held = _bpf.Map.open(str(pin))
        try:
            data = held.lookup(bytes(held.key_size))
            return CONFIG.load("netns_cookie", data) if data else 0
        finally:
            held.close()
    except (BpfError, ValueError):
        return 0


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
        """Once the proxy engine serves: remove what a kernel engine has left in the same state directory.

        From then on the proxy gets flows that start; established ones stay, and the programs go with the last.

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
            log.info("a kernel engine served here before; its programs stay until their flows have ended", flows=flows)
            await asyncio.sleep(GRACE)
            while await _thread(state.wait, POLL):
                pass
            await _thread(state.take_off)
            log.info("the kernel engine's programs are removed")
        except (MeshError, OSError, ValueError, KeyError) as error:
            log.warning("cannot remove an earlier kernel engine's programs; run mesh stop --release", error=str(error))

    async def watch_foreign_instances(self) -> None:
        """Keep `problems`, and collect what namespaces that are gone have left, until cancelled."""
        due = 0.0
        while True:
            if time.monotonic() >= due:
                for home in await _thread(collect_gone, self._config):
                    log.info("removed the pins of a network namespace that is gone", pins=str(home))
                due = time.monotonic() + COLLECT
            found = [FOREIGN.format(path) for path in await asyncio.to_thread(foreign_instances, self._config)]
            for line in found if found != self.problems else ():
                log.warning(line)
            self.problems = found
            await asyncio.sleep(EVERY)
