# SPDX-License-Identifier: Apache-2.0
"""What an agent leaves when it goes: the kernel engine's programs forward on by tables which nobody keeps in step, and
where a proxy was killed its nftables table leads to sockets that are no more.

The next agent with the kernel engine adopts the programs. For those who want none there is the way to take them off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mesh import _bpf
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import OWNER_PASS
from mesh.datapath.kernel import stats
from mesh.datapath.kernel.hooks import Hooks
from mesh.datapath.kernel.journal import Journal
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.pins import CONTRACT, NAMES, Owner, instance, netns_cookie, pin_home, remove_pins
from mesh.datapath.netlink import Netlink
from mesh.datapath.proxy.nft import NftTable, table_name
from mesh.errors import BpfError


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
        return Owner(self._state).is_another()

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
        hooks = [Hooks({}, pin.parent) for pin in self._home.glob("*/mesh_ports")]
        for each in hooks:
            each.adopt(interfaces)
        take_off(self._home, self._state, hooks)

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


def take_off(home: Path, state_dir: Path, hooks: Iterable[Hooks]) -> None:
    """Detach the hooks, and remove all pins in `home` and what the state directory tells of them."""
    for each in hooks:
        each.detach()
    remove_pins(home)
    Journal(state_dir / NAMES).remove()
    Owner(state_dir).remove()


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
