# SPDX-License-Identifier: Apache-2.0
"""Through one node to a backend on another: the lab with two nodes, and what is measured there.

client 10.90.0.2-17 --+
                      +-- switch --+-- near 10.90.0.1 (node A, called by the client)
                      |            +-- far 10.90.0.254 (node B) -- docker_gwbridge 172.30.0.1 -- backends
node A is `node`, node B is `far`; what differs from side to side is how A gets to the backends and back.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Final

from bench.lab import BACKENDS, CLIENTS, FLOOD_NETWORK, NODE, Lab
from bench.peers.base import Side, first_line
from bench.peers.mesh import Mesh, static_file
from bench.peers.nft import TIMEOUTS
from mesh.config.keys import Config

FAR: Final = "10.90.0.254"
CLIENT_NETWORK: Final = "10.90.0.0/27"
OVERLAY_NODE: Final = "10.0.0.1"  # of node A on the VXLAN
OVERLAY: Final = tuple(f"10.0.0.{10 + i}" for i in range(len(BACKENDS)))
OVERLAY_MTU: Final = 1450
SCENARIOS: Final = ("connections", "requests", "pingpong", "down1", "up8")


class TwoNodeLab(Lab):
    """Client, two nodes and a switch between them; all backends are on the far node."""

    kind = "-2"

    def _build(self) -> None:
        for name in ("client", "switch", "node", "far", *(f"backend{i}" for i in range(len(BACKENDS)))):
            self.add(name)
        self.run("switch", "ip", "link", "add", "br0", "type", "bridge")
        self.run("switch", "ip", "link", "set", "br0", "up")
        for name in ("client", "node", "far"):
            self.link(name, "eth0", "switch", name)
            self.run("switch", "ip", "link", "set", name, "master", "br0")
        addresses = "".join(f"address add {address}/24 dev eth0\n" for address in CLIENTS)
        self.run("client", "ip", "-batch", "-", stdin=addresses)
        for name, address in (("node", NODE), ("far", FAR)):
            self.run(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            for key in ("ip_forward=1", "conf.all.send_redirects=0", "conf.eth0.send_redirects=0"):
                self.run(name, "sysctl", "-qw", f"net.ipv4.{key}")
        self.run("client", "ip", "route", "add", "default", "via", NODE)
        self.run("node", "ip", "route", "add", f"{FLOOD_NETWORK}/16", "via", CLIENTS[0])
        self.attach_backends("far")


class PlainTwo(Side):
    """Both ways by routing through both nodes: what the way costs without any balancer. The yardstick."""

    name = "plain-2"
    quick = False
    label = "plain routing, two nodes"

    @classmethod
    def version(cls) -> str:
        return first_line("uname", "-sr")

    def start(self) -> None:
        self.lab.run("node", "ip", "route", "add", "172.30.0.0/16", "via", FAR)
        self.lab.run("far", "ip", "route", "add", f"{NODE}/32", "dev", "eth0")
        self.lab.run("far", "ip", "route", "add", CLIENT_NETWORK, "via", NODE)

    def stop(self) -> None:
        super().stop()
        self.lab.run("node", "ip", "route", "delete", "172.30.0.0/16", check=False)
        self.lab.run("far", "ip", "route", "delete", CLIENT_NETWORK, check=False)
        self.lab.run("far", "ip", "route", "delete", f"{NODE}/32", check=False)

    def targets(self, port: int) -> list[str]:
        return [f"{address}:{port}" for address in BACKENDS]


class NftVxlan(Side):
    """nft DNAT with conntrack on node A, masquerading, VXLAN to the backends' overlay addresses on node B: the way of
    Swarm's and of Kubernetes's overlay networks. The masquerade is what brings answers back; the client's address is
    lost by it."""

    name = "nft-vxlan-2"
    quick = False
    label = "nft DNAT, masquerade, VXLAN"

    @classmethod
    def version(cls) -> str:
        return first_line("nft", "--version")

    def start(self) -> None:
        lab = self.lab
        for name, own, other in (("node", NODE, FAR), ("far", FAR, NODE)):
            end = ("id", "4097", "local", own, "remote", other, "dstport", "4789", "dev", "eth0")
            lab.run(name, "ip", "link", "add", "vxlan0", "mtu", str(OVERLAY_MTU), "type", "vxlan", *end)
            lab.run(name, "ip", "link", "set", "vxlan0", "up")
        lab.run("node", "ip", "address", "add", f"{OVERLAY_NODE}/24", "dev", "vxlan0")
        lab.run("far", "ip", "link", "add", "overlay", "type", "bridge")
        lab.run("far", "ip", "link", "set", "overlay", "up")
        lab.run("far", "ip", "link", "set", "vxlan0", "master", "overlay")
        for i, address in enumerate(OVERLAY):
            lab.link(f"backend{i}", "eth1", "far", f"overlay{i}")
            lab.run(f"backend{i}", "ip", "link", "set", "eth1", "mtu", str(OVERLAY_MTU))
            lab.run("far", "ip", "link", "set", f"overlay{i}", "mtu", str(OVERLAY_MTU), "master", "overlay")
            lab.run(f"backend{i}", "ip", "address", "add", f"{address}/24", "dev", "eth1")
        overlay = {f"backend{i}": address for i, address in enumerate(OVERLAY)}
        lab.run("node", "nft", "-f", self.render("nft.nft", **overlay))
        lab.run("node", "nft", "-f", self.render("nft_masquerade.nft"))
        for key in TIMEOUTS:
            lab.run("node", "sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_timeout_{key}=2")

    def stop(self) -> None:
        super().stop()
        for table in ("bench", "benchsnat"):
            self.lab.run("node", "nft", f"delete table ip {table}", check=False)
        for name, device in (("node", "vxlan0"), ("far", "vxlan0"), ("far", "overlay")):
            self.lab.run(name, "ip", "link", "delete", device, check=False)
        for i in range(len(OVERLAY)):
            self.lab.run("far", "ip", "link", "delete", f"overlay{i}", check=False)


def shared_file() -> str:
    """The static file that both nodes read: all backends are on the far one."""
    lines = [static_file().replace("[[services.backends]]", '[[services.backends]]\nnode = "far"')]
    for name, address in (("near", NODE), ("far", FAR)):
        lines.append(f'[[nodes]]\nname = "{name}"\naddress = "{address}"')
    return "\n".join(lines) + "\n"


class MeshTwo(Mesh):
    """The daemon on both nodes, with one static file; the near one is called. They prove, as in a swarm."""

    command = (sys.executable, "-m", "bench.proving")
    places = ("node", "far")

    def text(self) -> str:
        return shared_file()


class MeshProxyTwo(MeshTwo):
    """From agent to agent over TCP with a PROXY protocol header."""

    name = "mesh-proxy-2"
    quick = False
    label = "mesh, proxy to proxy"
    engine = "proxy"


class MeshKernelTunnel(MeshTwo):
    """Through the Geneve tunnel, and back through it."""

    name = "mesh-kernel-2"
    quick = False
    label = "mesh, kernel engines, tunnel both ways"
    engine = "kernel"
    options = ("--return-path", "tunnel")

    @classmethod
    def missing(cls) -> str:
        return super().missing() or ("" if has_tunnel() else "this version has no tunnel between kernel engines")


class MeshKernelDirect(MeshKernelTunnel):
    """Through the Geneve tunnel; answers go straight to the client."""

    name = "mesh-kernel-direct-2"
    quick = False
    label = "mesh, kernel engines, answers direct"
    options = ("--return-path", "direct")


def has_tunnel() -> bool:
    """Whether this version's kernel engine reaches other nodes."""
    return any(key.name == "return_path" for key in dataclasses.fields(Config))


SIDES: tuple[type[Side], ...] = (PlainTwo, NftVxlan, MeshKernelTunnel, MeshKernelDirect, MeshProxyTwo)
