# SPDX-License-Identifier: Apache-2.0
"""Where things are on this node: which interfaces face clients, and behind which interface each backend is."""

from __future__ import annotations

import contextlib
import fnmatch
import heapq
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mesh.datapath.base import BackendEntry
from mesh.datapath.netlink import Interface, Netlink, Route, Topology
from mesh.model import Address, Frontend, Protocol

INGRESS: Final = "mesh_ingress"
BRIDGE: Final = "mesh_bridge"
TASK: Final = "mesh_task"
NO_MAC: Final = bytes(6)
ASK_AGAIN: Final = (0.5, 30.0)  # seconds between two questions for one MAC: at first, at most; doubled each time
ASK_MOST: Final = 32  # unanswered at a time: each takes one of the 1,024 places that all namespaces have together
ASK_LASTS: Final = 3.5  # seconds until the kernel gives a question up


@dataclass(frozen=True, slots=True)
class Location:
    """How a packet gets to a backend.

    `veth`: host side of its veth, 0: unknown. `via`: interface by which this node reaches it, 0: not at all.
    """

    veth: int = 0
    via: int = 0
    mac: bytes = NO_MAC
    own: bool = False  # it is an address of this node itself


class Locator:
    """Finds backends. Remembers routes until interfaces or addresses change.

    Args:
        floating: addresses that the node may get at any time; they count as its own (config key
            `floating_addresses`), so that the first packet is served that comes for them.
    """

    def __init__(self, netlink: Netlink, floating: frozenset[Address] = frozenset()) -> None:
        self._netlink = netlink
        self.floating = floating
        self._routes: dict[Address, Route | None] = {}
        self._ports: dict[tuple[int, bytes], int] = {}  # as topology.ports, those too that aged out while all was quiet
        self._asked: dict[Address, tuple[float, float]] = {}  # when to ask again, monotonic, and after what pause
        self._waiting: dict[Address, float] = {}  # asked for, no answer yet: when the kernel gives up, monotonic
        self._unreached: set[Address] = set()  # to which there was no route
        self.topology = Topology()

    def refresh(self) -> bool:
        """Read the tables anew. Returns whether they changed: else only those who are `open` may be elsewhere now."""
        found = self._netlink.topology()
        new = replace(found, addresses=found.addresses | self.floating)
        if new.interfaces != self.topology.interfaces or new.addresses != self.topology.addresses:
            self._routes.clear()
            self._asked.clear()
        changed = new != self.topology
        self.topology = new
        self._ports |= new.ports
        self._ports = {k: v for k, v in self._ports.items() if v in new.interfaces and new.interfaces[v].master == k[0]}
        return changed

    def open(self) -> frozenset[Address]:
        """Addresses to find again although nothing changed: without a route, or due to be asked for once more, and of
        those no more than may be asked for now; first those that were asked for least often."""
        now = time.monotonic()
        due = [(pause, when, address) for address, (when, pause) in self._asked.items() if now >= when]
        turn = heapq.nsmallest(self._room(now), due, key=lambda entry: entry[:2])
        return frozenset(address for _, _, address in turn) | self._unreached

    def find(self, address: Address) -> Location:
        """Where a backend's address is. Asks for its MAC if nobody has; the answer is seen by a later `refresh`."""
        if address not in self._routes:
            self._routes[address] = self._netlink.route(address)
        route = self._routes[address]
        if route is None:
            del self._routes[address]  # there may be one by the next time
            self._unreached.add(address)
            return Location()
        self._unreached.discard(address)
        if route.local:
            return Location(via=route.interface, own=True)
        via = self.topology.interfaces.get(route.interface)
        if via is None or route.gateway is not None:
            return Location(via=route.interface)
        mac = self.topology.neighbours.get((via.index, address))
        if mac is None:
            self._ask(via.index, address)
            return Location(via=via.index, veth=via.index if via.kind == "veth" else 0)
        port = via if via.kind == "veth" else self._port(via, mac)
        if port is None and via.kind == "bridge":  # a container that is gone had this MAC
            self._ask(via.index, address, anew=True)
        else:
            self._asked.pop(address, None)
            self._waiting.pop(address, None)
        return Location(veth=port.index if port is not None and port.kind == "veth" else 0, via=via.index, mac=mac)

    def _room(self, now: float) -> int:
        """How many more may be asked for."""
        self._waiting = {address: end for address, end in self._waiting.items() if end > now}
        return ASK_MOST - len(self._waiting)

    def _ask(self, interface: int, address: Address, *, anew: bool = False) -> None:
        first, most = ASK_AGAIN
        now = time.monotonic()
        due, pause = self._asked.setdefault(address, (now, first))
        if now < due or self._room(now) <= 0:
            return
        self._asked[address] = now + pause, min(2 * pause, most)
        self._waiting[address] = now + ASK_LASTS
        with contextlib.suppress(OSError):
            self._netlink.resolve(interface, address, anew=anew)

    def _port(self, bridge: Interface, mac: bytes) -> Interface | None:
        index = self._ports.get((bridge.index, mac))
        return None if index is None else self.topology.interfaces.get(index)


def misplaced(backends: Iterable[BackendEntry], places: Mapping[int, Location]) -> Iterator[str]:
    """One sentence for each backend of this node that cannot be delivered to. Pure."""
    for entry in backends:
        place = places.get(entry.id)
        if place is not None and not place.via and entry.target.via is None:
            yield f"backend {entry.key.backend}: no route to {entry.target.address} (is its network up?)"


def wanted(
    topology: Topology, places: Iterable[Location], patterns: Sequence[str] = (), nodes: Collection[int] = ()
) -> Mapping[int, str]:
    """Which program goes on which interface. Pure.

    Tasks' interfaces: all veths of every bridge through which a backend is reached (containers on it may call ports of
    this node too), and veths by which one is reached directly. Facing clients: the interfaces that `patterns` name and
    those of `nodes`, by which other nodes are reached; without patterns every other Ethernet interface that is up and
    no port of a bridge or bond, bridges included. Bridges that have only ports of containers and virtual machines get a
    program of their own.
    """
    vias = {place.via for place in places if not place.own}
    bridges = {index for index in vias if index in topology.interfaces and topology.interfaces[index].kind == "bridge"}
    outward = {i.master for i in topology.interfaces.values() if i.kind not in ("veth", "tun")}
    found: dict[int, str] = {}
    for interface in topology.interfaces.values():
        direct = interface.index in vias and interface.kind == "veth"
        if direct or (interface.kind == "veth" and interface.master in vias):
            found[interface.index] = TASK
        elif patterns:
            named = any(fnmatch.fnmatchcase(interface.name, pattern) for pattern in patterns)
            if named or interface.index in nodes:
                found[interface.index] = INGRESS if interface.index in nodes else _outer(interface, outward)
        elif interface.up and interface.ethernet and not interface.master and interface.index not in bridges:
            found[interface.index] = INGRESS if interface.index in nodes else _outer(interface, outward)
    return found


def keepers(interfaces: Mapping[int, Interface], programs: Mapping[int, str]) -> list[str]:
    """One sentence for each interface whose frames the programs leave alone, because of their tags. Pure."""
    found = [interfaces[index] for index in programs if index in interfaces and interfaces[index].keeps_tags]
    change = "ip link set {0} type vlan reorder_hdr on"
    return [f"interface {i.name} is not served: it leaves VLAN tags in frames ({change.format(i.name)})" for i in found]


def _outer(interface: Interface, outward: Collection[int]) -> str:
    return INGRESS if interface.kind != "bridge" or interface.index in outward else BRIDGE


def is_held(frontend: Frontend) -> bool:
    """Whether a socket of this node has the UDP port: someone serves it, so flows may be under way."""
    if frontend.protocol is not Protocol.UDP:
        return False
    for table in ("/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"):
        with contextlib.suppress(OSError):
            rows = Path(table).read_text().splitlines()[1:]
            if any(int(row.split()[1].rpartition(":")[2], 16) == frontend.port for row in rows):
                return True
    return False
