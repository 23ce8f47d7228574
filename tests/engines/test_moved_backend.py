# SPDX-License-Identifier: Apache-2.0
"""A backend that loses the network by which it was reached while it serves, and is reached by another one."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import pytest

from tests.engines.topology import ECHO, WEB, Topology
from tests.support import peers
from tests.support.daemon import Daemon
from tests.support.lab.netns import Namespace, veth
from tests.support.polling import PATIENCE, wait_for

pytestmark = pytest.mark.root

BEFORE, AFTER = "172.31.0.11", "172.32.0.11"


def connected(caller: Namespace, address: str) -> socket.socket:
    """A connection to the echo service that has carried something."""
    with caller.entered():
        sock = socket.create_connection((address, ECHO), PATIENCE)
    sock.sendall(b"hello")
    assert sock.recv(100)
    return sock


def addresses(daemon: Daemon) -> set[str]:
    state = daemon.state()
    if state["generation"]["applied"] != state["generation"]["desired"]:
        return set()
    return {target["address"] for s in state["services"] for f in s["frontends"] for target in f["targets"]}


def move(topology: Topology) -> None:
    """Tell the daemon where the backend is now."""
    topology.static_file.write_text(topology.static_file.read_text().replace(BEFORE, AFTER))
    topology.daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: addresses(topology.daemon) == {AFTER}, "the other address", timeout=20)


def test_new_connections_go_on_and_old_ones_end(make_topology: Callable[..., Topology]) -> None:
    """Its former address is gone, and with it what was open there: the clients are told, and do not wait for ever."""
    topology = make_topology(backends=1)
    backend = topology.hosts["b1"].namespace
    topology.node.bridge("own", "172.32.0.1/24")
    veth(topology.node, "veth-own", backend, "eth1")
    topology.node.ip("link", "set", "veth-own", "master", "own")
    backend.add_address("eth1", f"{AFTER}/24")
    topology.serve()
    with connected(topology.client, topology.node.address) as sock:
        topology.node.ip("link", "del", "veth1")  # as Docker does when it connects another network
        backend.ip("route", "replace", "default", "via", "172.32.0.1")
        move(topology)
        for caller, address in ((topology.client, topology.node.address), (topology.node, "127.0.0.1")):
            report = peers.load(caller, address, WEB, "-n", "200", "-c", "8")
            assert (report.ok, report.failures) == (200, ())
        if topology.engine == "kernel":  # nobody between the two but the task's own kernel
            sock.sendall(b"are you there")
        with pytest.raises(ConnectionError):
            sock.recv(100)
