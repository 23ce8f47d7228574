# SPDX-License-Identifier: Apache-2.0
"""Docker's own mesh for swarms on a kernel without IPVS: the same chain, with nftables in the place of IPVS.

Docker's rules on a node hand a published port to the ingress sandbox, and there IPVS gives the connection to a task by
its address on the ingress network. Where a kernel has no IPVS, Docker leaves out both. Here both are put: the rules as
Docker writes them, and in the sandbox a table that takes the running tasks in turn. From there on everything is
Docker's: the sandbox, its interfaces, the overlay network.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tests.support.lab.dockerd import Node, Swarm
from tests.support.lab.netns import run
from tests.support.polling import wait_for

EVERY = 0.1  # seconds between two looks at the tasks


@dataclass(frozen=True)
class Published:
    """A port as clients call it, and where tasks listen: (ingress address, port) of each that runs."""

    protocol: str
    port: int
    tasks: tuple[tuple[str, int], ...]


class StandIn:
    """Serves published ports on these nodes for as long as the block lasts, as Docker does in mode ingress.

    A task is served once it has run for a look, and no longer when Docker wants its end.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self._nodes: dict[str, Node] = {}
        self._served: tuple[Published, ...] = ()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> Self:
        for node in self.swarm.nodes:
            self.add(node)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._errors and kind is None:
            raise self._errors[0]

    def add(self, node: Node) -> None:
        """Serve on a node too, once it has its ingress sandbox."""
        wait_for(lambda: self._addresses(node), f"the ingress sandbox of {node.hostname}", interval=0.1)
        run(*self._sandbox_command(node, "sysctl", "-qw", "net.ipv4.ip_forward=1"))
        _feed(node.inside("iptables-restore", "--noflush"), NODE)
        with self._lock:
            self._nodes[node.hostname] = node
            self._put(node, ())

    def wait(self) -> None:
        """Until all nodes serve what the swarm publishes now."""

        def served() -> bool:
            with self._lock:
                return published(self.swarm) == self._served and all(each.tasks for each in self._served)

        wait_for(served, "the stand-in serves all tasks", interval=EVERY)

    def _follow(self) -> None:
        try:
            while not self._stop.wait(EVERY):
                now = published(self.swarm)
                if now == self._served:
                    continue
                with self._lock:
                    before, self._served = self._served, now
                    for node in self._nodes.values():
                        self._put(node, before)
        except BaseException as error:  # told by the end of the block
            self._errors.append(error)

    def _put(self, node: Node, before: Sequence[Published]) -> None:
        """Write what is served now. Rules of ports that stay are not written again: they count."""
        _feed(self._sandbox_command(node, "nft", "-f", "-"), sandbox_rules(self._served))
        if [(each.protocol, each.port) for each in before] != [(each.protocol, each.port) for each in self._served]:
            rules = ports_rules(self._served, self._addresses(node)["eth1"])
            _feed(node.inside("iptables-restore", "--noflush"), rules)

    def _addresses(self, node: Node) -> dict[str, str]:
        """IPv4 address by interface of the sandbox: eth0 is on the ingress network, eth1 on docker_gwbridge."""
        shown = run(*self._sandbox_command(node, "ip", "-j", "-4", "address"), check=False)
        if shown.returncode:
            return {}
        links: list[dict[str, Any]] = json.loads(shown.stdout)
        found = {link["ifname"]: link["addr_info"][0]["local"] for link in links if link.get("addr_info")}
        return found if {"eth0", "eth1"} <= found.keys() else {}

    @staticmethod
    def _sandbox_command(node: Node, *command: str) -> list[str]:
        return node.inside("nsenter", f"--net={node.exec_root}/netns/ingress_sbox", "--", *command)


def published(swarm: Swarm) -> tuple[Published, ...]:
    """What the swarm publishes in mode ingress, with the tasks that run and shall run."""
    tasks: dict[str, list[str]] = {}
    for task in swarm.api("GET", "/tasks"):
        if task["DesiredState"] == task["Status"]["State"] == "running":
            for attachment in task.get("NetworksAttachments") or ():
                if attachment["Network"]["Spec"].get("Ingress"):
                    tasks.setdefault(task["ServiceID"], []).append(attachment["Addresses"][0].split("/")[0])
    return tuple(
        Published(
            port["Protocol"],
            port["PublishedPort"],
            tuple((address, port["TargetPort"]) for address in sorted(tasks.get(service["ID"], ()))),
        )
        for service in swarm.api("GET", "/services")
        for port in service["Endpoint"].get("Ports") or ()
        if port["PublishMode"] == "ingress"
    )


NODE = """*nat
:DOCKER-INGRESS - [0:0]
-I PREROUTING -m addrtype --dst-type LOCAL -j DOCKER-INGRESS
-I OUTPUT -m addrtype --dst-type LOCAL -j DOCKER-INGRESS
-I POSTROUTING -o docker_gwbridge -m addrtype --src-type LOCAL -j MASQUERADE
COMMIT
*filter
:DOCKER-INGRESS - [0:0]
-I FORWARD -j DOCKER-INGRESS
COMMIT
"""


def ports_rules(served: Sequence[Published], sandbox: str) -> str:
    """The rules of a node for published ports, for iptables-restore."""
    nat, forward = [], []
    for each in served:
        one = f"-p {each.protocol} -m {each.protocol}"
        nat.append(f"-A DOCKER-INGRESS {one} --dport {each.port} -j DNAT --to-destination {sandbox}:{each.port}")
        forward.append(f"-A DOCKER-INGRESS {one} --dport {each.port} -j ACCEPT")
        forward.append(
            f"-A DOCKER-INGRESS {one} --sport {each.port} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
        )
    return "".join(
        f"*{table}\n:DOCKER-INGRESS - [0:0]\n" + "".join(f"{rule}\n" for rule in rules) + "COMMIT\n"
        for table, rules in (("nat", nat), ("filter", forward))
    )


def sandbox_rules(served: Sequence[Published]) -> str:
    """The table in the ingress sandbox, for nft."""
    lines = []
    for each in served:
        elements = ", ".join(f"{i} : {address} . {port}" for i, (address, port) in enumerate(each.tasks))
        if elements:
            chosen = f"numgen inc mod {len(each.tasks)} map {{ {elements} }}"
            lines.append(f"{each.protocol} dport {each.port} dnat ip to {chosen}")
    return (
        "table ip stand_in {}\ndelete table ip stand_in\ntable ip stand_in {\n"
        "chain tasks { type nat hook prerouting priority dstnat;\n" + "\n".join(lines) + "\n}\n"
        'chain answers { type nat hook postrouting priority srcnat; oifname "eth0" masquerade\n}\n}\n'
    )


def _feed(command: list[str], text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}\n{text}")
