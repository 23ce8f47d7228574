# SPDX-License-Identifier: Apache-2.0
"""Clients behind a router that gives them its own address."""

from __future__ import annotations

from tests.support.lab.netns import Lab, Namespace, veth

CHAIN = "chain post { type nat hook postrouting priority srcnat; %s; }"


class Router:
    """A host on the switch with networks of its own behind it, 10.88.1.0/24 and so on.

    Args:
        rule: nftables, what becomes of the source. The default keeps a client's port unless another flow to the same
            target has it, as most routers do.
    """

    def __init__(self, lab: Lab, name: str, rule: str = 'oifname "eth0" masquerade') -> None:
        self.lab, self.clients = lab, list[Namespace]()
        self.namespace = lab.host(name)
        self.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.namespace.run("nft", "-f", "-", input=f"table ip nat {{\n{CHAIN % rule}\n}}")

    @property
    def address(self) -> str:
        """What others see of all clients."""
        return self.namespace.address

    def client(self, name: str) -> Namespace:
        """A further one, in a network of its own."""
        host, number = self.lab.namespace(name), len(self.clients) + 1
        veth(self.namespace, f"in{number}", host, "eth0")
        self.namespace.add_address(f"in{number}", f"10.88.{number}.1/24")
        host.add_address("eth0", f"10.88.{number}.2/24")
        host.ip("route", "add", "default", "via", f"10.88.{number}.1")
        self.clients.append(host)
        return host
