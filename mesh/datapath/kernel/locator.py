# SPDX-License-Identifier: Apache-2.0
"""Locates: which interfaces face clients, and behind which interface each backend of this node is."""

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
from mesh.datapath.netlink import Interface, Netlink, Networks, Route, Topology
from mesh.model import Address, Frontend, Network, Protocol
from mesh.netaddr import of_proc

INGRESS: Final = "mesh_ingress"
BRIDGE: Final = "mesh_bridge"
TASK: Final = "mesh_task"
BARE: Final = "mesh_l3"
GUARD: Final = "mesh_guard"
BRIDGE_GUARD: Final = "mesh_bridge_guard"
BARE_GUARD: Final = "mesh_l3_guard"
GUARDS: Final = {INGRESS: GUARD, BRIDGE: BRIDGE_GUARD, BARE: BARE_GUARD}
NO_MAC: Final = bytes(6)
ASK_AGAIN: Final = (0.5, 30.0)  # seconds between questions for one MAC: first pause, doubled up to the second
ASK_MOST: Final = 32  # open questions at a time: each takes one of the 1,024 neighbour entries of all namespaces
ASK_LASTS: Final = 3.5  # seconds until the kernel gives up a question
READ_AGAIN: Final = 1.0  # seconds for which a task's networks are not read again: nothing announces that they change


@dataclass(frozen=True, slots=True)
class Location:
    """How a packet gets to a backend.

    `veth`: host side of its veth, 0: unknown. `via`: interface through which this node reaches it, 0: no route.
    `networks`: those that it has itself, of its address' IP version; empty: unknown. `source`: this node's address
    towards it.
    """

    veth: int = 0
    via: int = 0
    mac: bytes = NO_MAC
    own: bool = False  # the backend is at an address of this node
    networks: frozenset[Network] = frozenset()
    source: Address | None = None


class Locator:
    """Finds backends. Remembers routes until interfaces or addresses change.

    Args:
        floating: addresses that the node may get at any time (config key `floating_addresses`). They count as its own,
            so that the first packet for them is already served.
    """

    def __init__(
        self, netlink: Netlink, floating: frozenset[Address] = frozenset(), networks: Networks | None = None
    ) -> None:
        self._netlink = netlink
        self._reader = networks
        self.floating = floating
        self._routes: dict[Address, Route | None] = {}
        self._ports: dict[tuple[int, bytes], int] = {}  # topology.ports, and entries that aged out in the meantime
        self._asked: dict[Address, tuple[float, float]] = {}  # when to ask again (monotonic), and the pause after that
        self._waiting: dict[Address, float] = {}  # open questions: when the kernel gives up, monotonic
        self._unreached: set[Address] = set()  # without a route
        self._networks: dict[Address, tuple[float, int, frozenset[Network]]] = {}  # when read, of which veth
        self.topology = Topology()

    def refresh(self) -> bool:
        """Read the tables again. Returns whether they changed; if not, only addresses in `open` may have moved."""
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
        """Addresses to locate again although nothing changed: without a route, or due for another question.

        Of the latter no more than may be asked for now, the least often asked first.
        """
        now = time.monotonic()
        due = [(pause, when, address) for address, (when, pause) in self._asked.items() if now >= when]
        turn = heapq.nsmallest(self._room(now), due, key=lambda entry: entry[:2])
        old = {address for address, (when, _, _) in self._networks.items() if now - when >= READ_AGAIN}
        return frozenset(address for _, _, address in turn) | self._unreached | old

    def awaits(self, address: Address) -> bool:
        """Whether the address was asked for its MAC and has not answered yet."""
        return address in self._waiting

    def forget(self, addresses: Iterable[Address]) -> None:
        """No backend has these any more."""
        for address in addresses:
            self._networks.pop(address, None)

    def find(self, address: Address) -> Location:
        """Locate a backend's address. Asks for its MAC if unknown; a later `refresh` sees the answer."""
        if address not in self._routes:
            self._routes[address] = self._netlink.route(address)
        route = self._routes[address]
        if route is None:
            del self._routes[address]  # there may be one next time
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
        if port is None and via.kind == "bridge":  # this MAC belonged to a container that is gone
            self._ask(via.index, address, anew=True)
        else:
            self._asked.pop(address, None)
            self._waiting.pop(address, None)
        if port is None or port.kind != "veth":
            return Location(via=via.index, mac=mac)
        networks = self._networks_of(address, port)
        return Location(veth=port.index, via=via.index, mac=mac, networks=networks, source=route.source)

    def _networks_of(self, address: Address, port: Interface) -> frozenset[Network]:
        """The networks that the task behind a veth has itself."""
        when, veth, networks = self._networks.get(address, (-READ_AGAIN, 0, frozenset[Network]()))
        now = time.monotonic()
        if self._reader is not None and (veth != port.index or now - when >= READ_AGAIN):
            known = port.elsewhere >= 0
            networks = self._reader.of(port.elsewhere, address.version) if known else frozenset()
            self._networks[address] = now, port.index, networks
        return networks

    def _room(self, now: float) -> int:
        """How many more questions may be asked."""
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


def misplaced(backends: Iterable[BackendEntry], locations: Mapping[int, Location]) -> Iterator[str]:
    """One sentence for each backend of this node to which there is no route. Pure."""
    for entry in backends:
        location = locations.get(entry.id)
        if location is not None and not location.via and entry.target.via is None:
            yield f"backend {entry.key.backend}: no route to {entry.target.address} (is its network up?)"


def wanted(
    topology: Topology,
    locations: Iterable[Location],
    patterns: Sequence[str] = (),
    nodes: Collection[int] = (),
    *,
    guarded: bool = False,
) -> Mapping[int, str]:
    """Which program goes on which interface. Pure.

    TASK: all veths of every bridge through which a backend is reached (its other containers may call ports of this node
    as well), and veths that lead directly to a backend. INGRESS, facing clients: the interfaces that `patterns` name,
    and those in `nodes`, which lead to other nodes; without patterns every other Ethernet interface, bridges included,
    that is up and not a port of a bridge or bond. BRIDGE: bridges that only have ports of containers and virtual
    machines. BARE: as INGRESS, where packets begin with the IP header. Where `patterns` leave an interface out:
    BRIDGE_GUARD instead of BRIDGE; GUARD and BARE_GUARD instead of the others if `guarded`: some have source rules.
    """
    vias = {location.via for location in locations if not location.own}
    bridges = {index for index in vias if index in topology.interfaces and topology.interfaces[index].kind == "bridge"}
    outward = {i.master for i in topology.interfaces.values() if i.kind not in ("veth", "tun")}
    found: dict[int, str] = {}
    for interface in topology.interfaces.values():
        direct = interface.index in vias and interface.kind == "veth"
        if direct or (interface.kind == "veth" and interface.master in vias):
            found[interface.index] = TASK
        elif _is_served(interface, patterns, nodes, bridges):
            onto_nodes = interface.index in nodes and not interface.bare
            found[interface.index] = INGRESS if onto_nodes else _outer(interface, outward)
        elif _is_served(interface, (), (), bridges):
            guard = GUARDS[_outer(interface, outward)]
            if guarded or guard == BRIDGE_GUARD:
                found[interface.index] = guard
    return found


def _is_served(interface: Interface, patterns: Sequence[str], nodes: Collection[int], bridges: Collection[int]) -> bool:
    """Whether an interface, none of a task, faces clients."""
    if patterns:
        return interface.index in nodes or any(fnmatch.fnmatchcase(interface.name, pattern) for pattern in patterns)
    known = interface.ethernet or interface.bare
    return interface.up and known and not interface.master and interface.index not in bridges


def unserved(interfaces: Mapping[int, Interface], programs: Mapping[int, str]) -> list[str]:
    """One sentence for each interface where source rules hold and nothing is served, or neither; for nodes whose
    frontends have source rules. Pure."""
    found = []
    for interface in sorted(interfaces.values(), key=lambda i: i.index):
        if programs.get(interface.index) in GUARDS.values():
            found.append(
                f"interface {interface.name} is left out by `interfaces`: source rules hold there, and clients that "
                "they admit reach whoever else serves the port"
            )
        elif interface.up and not (interface.ethernet or interface.bare or interface.loopback or interface.master):
            found.append(
                f"interface {interface.name} is not served: its link type is unknown; clients that come by it meet "
                "no source rules"
            )
    return found


def keepers(interfaces: Mapping[int, Interface], programs: Mapping[int, str]) -> list[str]:
    """One sentence for each interface whose frames the programs do not parse, because of their VLAN tags. Pure."""
    found = [interfaces[index] for index in programs if index in interfaces and interfaces[index].keeps_tags]
    change = "ip link set {0} type vlan reorder_hdr on"
    return [f"interface {i.name} is not served: it leaves VLAN tags in frames ({change.format(i.name)})" for i in found]


def _outer(interface: Interface, outward: Collection[int]) -> str:
    if interface.bare:
        return BARE
    return INGRESS if interface.kind != "bridge" or interface.index in outward else BRIDGE


def is_held(frontend: Frontend) -> bool:
    """Whether a socket of this node has the UDP port: someone serves it, so it may have flows."""
    if frontend.protocol is not Protocol.UDP:
        return False
    for table in ("/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"):
        with contextlib.suppress(OSError):
            rows = Path(table).read_text().splitlines()[1:]
            if any(of_proc(row.split()[1])[1] == frontend.port for row in rows):
                return True
    return False
