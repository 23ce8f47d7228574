# SPDX-License-Identifier: Apache-2.0
"""Runs inside the guest: the encrypted swarm of docs/RECIPES.md, by the commands that stand there. test_swarms starts
it.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster
from tests.support.lab import images
from tests.support.lab.dockerd import Node, Swarm
from tests.support.lab.netns import Lab, Namespace, run
from tests.support.polling import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
INSIDE = ("10.10.0.1", "10.10.0.2")
OUTSIDE = "198.51.100."


def recipe() -> list[str]:
    """The commands, as they stand in the document."""
    text = (ROOT / "docs/RECIPES.md").read_text()
    block = text.partition("## An encrypted swarm in five commands")[2].partition("```\n")[2].partition("```")[0]
    commands = block.splitlines()
    assert len(commands) == 5, commands
    return commands


class EncryptedSwarm(Swarm):
    """Two nodes that follow the recipe; `said` is what its last command says on the second."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.asked, self.managers = lab, 0, 1
        self.nodes = [Node(lab, lab.host(name)) for name in ("n1", "n2")]
        for node in self.nodes:
            for image in images.server_images():
                node.load(image)
        key, up, peer, init, self.check = recipe()
        public = [self.shell(node, f"mkdir -p /etc/wireguard; {key}").strip() for node in self.nodes]
        for number, node in enumerate(self.nodes):
            other = self.nodes[1 - number]
            self.shell(node, up.replace(INSIDE[0], INSIDE[number]))
            words = peer.replace("PUBLIC-KEY", public[1 - number]).replace(INSIDE[1], INSIDE[1 - number])
            self.shell(node, re.sub(rf"{re.escape(OUTSIDE)}\d+", other.address, words))
        first, second = self.nodes
        command, _, comment = init.partition("#")
        token = re.findall(r"--token (\S+) ", self.shell(first, command))[0]
        self.shell(second, re.sub(r".*: docker swarm join", "docker swarm join", comment).replace("TOKEN", token))
        wait_for(lambda: self._ready(2), "both nodes ready")

    def shell(self, node: Node, command: str) -> str:
        """As root types it on the node."""
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = f"export PATH={path} DOCKER_HOST={node.host}; "
        return run(*node.inside("bash", "-ec", environment + command)).stdout


@pytest.fixture
def swarm() -> Iterator[EncryptedSwarm]:
    with Lab() as made:
        yield EncryptedSwarm(made)


def seen(client: Namespace, address: str, count: int) -> Counter[str]:
    """Whom the tasks that answer take for their client, each by its node."""
    found: Counter[str] = Counter()
    for _ in range(count):
        with client.entered():
            connection = http.client.HTTPConnection(address, WEB, timeout=PATIENCE)
            connection.connect()
        connection.request("GET", "/")
        found[json.loads(connection.getresponse().read())["peer"].rpartition(":")[0]] += 1
        connection.close()
    return found


def carried(node: Node) -> int:
    """Bytes that the node has sent by WireGuard."""
    return int(node.namespace.run("wg", "show", "wg0", "transfer").stdout.split()[2])


def test_the_encrypted_swarm_of_the_recipe(swarm: EncryptedSwarm) -> None:
    """Every node serves the tasks of both, which see the client's address; what goes between nodes is encrypted."""
    cluster = Cluster(swarm, swarm.lab.host("client"), engine="kernel")
    try:
        cluster.wait_ready()
        swarm.create("web", replicas=4, publish=[f"{WEB}:8080"])
        tasks = cluster.agree("web", 4)
        print("served", flush=True)
        for node in swarm.nodes:
            before = carried(node)
            report = peers.load(cluster.client, node.address, WEB, "-n", "400", "-c", "8")
            assert (report.ok, report.failures, set(report.identities)) == (400, (), tasks)
            assert set(seen(cluster.client, node.address, 20)) == {cluster.client.address}
            assert carried(node) - before > 50_000
        for daemon in cluster.daemons:
            assert daemon.total("mesh_verdicts_total", verdict="tunnel_tx") > 400
            assert daemon.state()["problems"] == []
        for node, daemon in zip(swarm.nodes, cluster.daemons, strict=True):
            keys = ("state_dir", "docker_data_root", "docker_exec_root")
            lab = " ".join(f"MESH_{key.upper()}={daemon.config[key]}" for key in keys)  # not where they are on a host
            said = swarm.shell(node, f"export {lab}; {swarm.check}")
            assert not re.search(r"\bFAIL|blocked", said), said
    finally:
        print(cluster.tails(), flush=True)
        cluster.close()
