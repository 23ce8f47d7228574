# SPDX-License-Identifier: Apache-2.0
"""The mesh that this project replaces: Docker's own chain for a port published in ingress mode, on one node.

Node: DNAT to the ingress sandbox on docker_gwbridge. Sandbox: firewall mark, IPVS round robin by the mark, SNAT to the
sandbox's address on the ingress network, by which the task is reached. Rules as the Engine makes them (in nftables'
words); needs a kernel with IPVS.
"""

import shutil
from pathlib import Path

from bench.lab import BACKENDS, BRIDGE, GATEWAY
from bench.peers.base import BASICS, Side, first_line

SANDBOX, OVERLAY = "sandbox", "overlay"
SANDBOX_ADDRESS = "172.30.0.2"  # on docker_gwbridge
INGRESS_ADDRESS = "10.0.0.2"  # on the ingress network
INGRESS_TASKS = tuple(f"10.0.0.{10 + i}" for i in range(len(BACKENDS)))
MARK = "256"


class DockerMesh(Side):
    name = "docker-mesh"
    label = "Docker's own mesh (IPVS)"
    only = BASICS
    sockets = False

    @classmethod
    def missing(cls) -> str:
        if not Path("/proc/net/ip_vs").exists():
            return "this kernel has no IPVS"
        return "" if shutil.which("ipvsadm") else "ipvsadm is not installed"

    @classmethod
    def version(cls) -> str:
        return first_line("ipvsadm", "--version")

    def start(self) -> None:
        lab = self.lab
        lab.add(SANDBOX)
        lab.add(OVERLAY)
        lab.link(SANDBOX, "eth1", "node", "sandbox")
        lab.run("node", "ip", "link", "set", "sandbox", "master", BRIDGE)
        lab.run(SANDBOX, "ip", "address", "add", f"{SANDBOX_ADDRESS}/16", "dev", "eth1")
        lab.run(SANDBOX, "ip", "route", "add", "default", "via", GATEWAY)
        lab.run(OVERLAY, "ip", "link", "add", "br0", "type", "bridge")
        lab.run(OVERLAY, "ip", "link", "set", "br0", "up")
        ends = [(SANDBOX, "eth0", INGRESS_ADDRESS)]
        ends += [(f"backend{i}", "eth1", address) for i, address in enumerate(INGRESS_TASKS)]
        for name, device, address in ends:
            lab.link(name, device, OVERLAY, f"veth-{name}")
            lab.run(OVERLAY, "ip", "link", "set", f"veth-{name}", "master", "br0")
            lab.run(name, "ip", "address", "add", f"{address}/24", "dev", device)
        for key in ("ip_forward", "vs.conntrack"):
            lab.run(SANDBOX, "sysctl", "-qw", f"net.ipv4.{key}=1")
        lab.run(SANDBOX, "ipvsadm", "-A", "-f", MARK, "-s", "rr")
        for address in INGRESS_TASKS:
            lab.run(SANDBOX, "ipvsadm", "-a", "-f", MARK, "-r", address, "-m")
        lab.run("node", "nft", "-f", self.render("docker_mesh_node.nft", sandbox=SANDBOX_ADDRESS))
        sandbox = self.render("docker_mesh_sandbox.nft", mark=MARK, ingress=INGRESS_ADDRESS)
        lab.run(SANDBOX, "nft", "-f", sandbox)

    def stop(self) -> None:
        self.lab.run("node", "nft", "delete table ip docker", check=False)
        self.lab.remove(SANDBOX)
        self.lab.remove(OVERLAY)
