# SPDX-License-Identifier: Apache-2.0
"""What the guest has and this machine has not: VLANs, and network cards with drivers. Inside the guest only."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.engines.kernel_plane import Connection
from tests.support.lab.netns import Namespace, run
from tests.support.polling import PATIENCE

_networks = itertools.count(1)


@dataclass(frozen=True)
class Way:
    """A network between the client and the node: interfaces, and addresses of both IP versions."""

    client_device: str
    node_device: str
    client: str
    node: str
    client6: str
    node6: str


def cards(driver: str) -> list[str]:
    """Network cards with this driver that nobody has taken yet, by name."""
    found = Path("/sys/class/net").glob("*/device/driver")
    return sorted(path.parts[4] for path in found if path.resolve().name == driver)


def take_card(namespace: Namespace, driver: str, name: str) -> None:
    """Move a card there, under a name of its own, and bring it up. It comes back when the namespace goes."""
    (card, *_) = cards(driver)
    run("ip", "link", "set", card, "down")
    run("ip", "link", "set", card, "name", name)
    run("ip", "link", "set", name, "netns", namespace.name)
    namespace.ip("link", "set", name, "up")


def address(client: Namespace, client_device: str, node: Namespace, node_device: str) -> Way:
    """Addresses of a network of its own on a pair of interfaces."""
    number = next(_networks)
    way = Way(
        client_device,
        node_device,
        *(f"198.51.100.{16 * number + last}" for last in (9, 1)),
        *(f"2001:db8:{number}::{last}" for last in (9, 1)),
    )
    for namespace, device, v4, v6 in (
        (client, client_device, way.client, way.client6),
        (node, node_device, way.node, way.node6),
    ):
        namespace.ip("addr", "add", f"{v4}/28", "dev", device)
        namespace.ip("addr", "add", f"{v6}/64", "dev", device, "nodad")
        namespace.ip("link", "set", device, "up")
    return way


def vlan(namespace: Namespace, lower: str, number: int, protocol: str = "802.1Q") -> str:
    """A VLAN's interface; returns its name."""
    name = f"{lower}.{number}"
    kind = ["type", "vlan", "id", str(number), "protocol", protocol]
    namespace.ip("link", "add", "link", lower, "name", name, *kind)
    namespace.ip("link", "set", name, "up")
    return name


def transfer(connection: Connection, size: int) -> None:
    """Random bytes there and back at the same time, as large as segments get; each is compared."""
    sent, got = os.urandom(size), bytearray()
    sender = threading.Thread(target=connection.socket.sendall, args=(sent,))
    sender.start()
    while len(got) < size and (data := connection.socket.recv(1 << 20)):
        got += data
    sender.join(PATIENCE)
    assert got == sent


def datagram(namespace: Namespace, called: str, port: int, size: int) -> str:
    """Send one of this many bytes; returns what the backend answers."""
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.sendto(bytes(size), (called, port))
        data, peer = sock.recvfrom(65536)
    assert peer == (called, port)
    return data.decode()


def send_frames(namespace: Namespace, device: str, frames: list[bytes]) -> None:
    """Put frames on the wire as they are."""
    with namespace.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((device, 0))
        for frame in frames:
            sock.send(frame)


def mac(namespace: Namespace, device: str) -> str:
    found = re.search(r"link/ether (\S+)", namespace.ip("link", "show", device))
    assert found
    return found[1]


def xdp(namespace: Namespace, device: str) -> str:
    """How XDP is attached: "xdp" is native, "xdpgeneric" is not, "" is not at all."""
    found = re.search(r"\bxdp\w*(?=[ /])", namespace.ip("-d", "link", "show", device).partition("\n")[0])
    return found[0] if found else ""


def dropped_by_driver(namespace: Namespace, device: str) -> int:
    """Packets that the card's driver has dropped because an XDP program said so.

    Of its queues: since Linux 6.10 virtio_net shows their sum beside them (virtnet_fill_total_fields,
    drivers/net/virtio_net.c).
    """
    shown = namespace.run("ethtool", "-S", device).stdout
    return sum(int(count) for count in re.findall(r"rx(?:_queue_)?\d+_xdp_drops: (\d+)", shown))
