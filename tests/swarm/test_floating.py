# SPDX-License-Identifier: Apache-2.0
"""An address moves to another node under transfers, as keepalived moves it, and the agent of the old node dies."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import peers
from tests.support.cluster import WEB, Cluster
from tests.support.lab.images import pattern
from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm, pytest.mark.bpf, pytest.mark.only("kernel")]

VIP = "192.0.2.240"
SIZE = 100_000_000
PART = 1_000_000
PAUSE = 0.03  # seconds between parts
HALF = SIZE // PART // 2


@pytest.fixture
def floating(cluster: Cluster) -> Iterator[Cluster]:
    with cluster.configured(floating_addresses=VIP):
        yield cluster


class Transfer:
    """A connection to the floating address, to the task of a node, that carries SIZE bytes in one direction."""

    def __init__(self, client: Namespace, up: bool) -> None:
        with client.entered():
            sock = socket.create_connection((VIP, WEB), timeout=PATIENCE)
        self.up = up
        self.may_end = threading.Event()
        self.http = http.client.HTTPConnection(VIP, WEB)
        self.http.sock = sock
        self.http.request("GET", "/")
        self.node: str = json.loads(self.http.getresponse().read())["node"]
        self.moved = 0  # parts

    def run(self) -> None:
        """Carry all; raises where a byte is not what it should be."""
        content = pattern(SIZE)
        if self.up:
            self.http.putrequest("POST", "/")
            self.http.putheader("Content-Length", str(SIZE))
            self.http.endheaders()
            for at in range(0, SIZE, PART):
                self.http.send(content[at : at + PART])
                self._pause()
            said = json.loads(self.http.getresponse().read())
            assert said == {"bytes": SIZE, "crc32": f"{zlib.crc32(content):08x}"}
            return
        self.http.request("GET", f"/bytes?n={SIZE}")
        answer, check = self.http.getresponse(), 0
        while part := answer.read(PART):
            check = zlib.crc32(part, check)
            self._pause()
        assert (self.moved * PART, check) == (SIZE, zlib.crc32(content))

    def _pause(self) -> None:
        self.moved += 1
        time.sleep(PAUSE)
        if self.moved == HALF:
            self.may_end.wait(PATIENCE)


def test_transfers_survive_the_move_of_their_address_and_the_death_of_its_agent(floating: Cluster) -> None:
    """100 MB up and down, with a task on the old node, on the new one and on the third."""
    cluster, swarm, client = floating, floating.swarm, floating.client
    old, new = swarm.nodes[1], swarm.nodes[2]
    swarm.create("web", "--mode=global", replicas=3, publish=[f"{WEB}:8080"])
    tasks = cluster.agree("web", 3)
    transfers: dict[tuple[str, bool], Transfer] = {}
    try:
        old.namespace.take(VIP)
        for up in (True, False):
            while {node.hostname for node in swarm.nodes} - {node for node, way in transfers if way is up}:
                made = Transfer(client, up)
                transfers.setdefault((made.node, up), made)
        with ThreadPoolExecutor(len(transfers)) as pool:
            running = [pool.submit(transfer.run) for transfer in transfers.values()]
            wait_for(lambda: all(t.moved > 10 for t in transfers.values()), "transfers under way")
            old.namespace.ip("addr", "del", f"{VIP}/24", "dev", "eth0")
            new.namespace.take(VIP)
            cluster.daemons[swarm.nodes.index(old)].kill()
            assert not any(done.done() for done in running)
            for transfer in transfers.values():
                transfer.may_end.set()
            report = peers.load(client, VIP, WEB, "-n", "300", "-c", "8")
            assert (report.ok, report.failures, set(report.identities)) == (300, (), tasks)
            for done in running:
                done.result(PATIENCE)
    finally:
        for transfer in transfers.values():
            transfer.http.close()
        new.namespace.run("ip", "addr", "flush", "dev", "eth0", "to", f"{VIP}/32", check=False)
        old.namespace.run("ip", "addr", "flush", "dev", "eth0", "to", f"{VIP}/32", check=False)
