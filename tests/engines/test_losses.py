# SPDX-License-Identifier: Apache-2.0
"""Somebody else flushes, detaches or deletes what is ours in the kernel: it is back within moments, and counted."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable

import pytest

from mesh.datapath.proxy.nft import table_name
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import Connection, Plane
from tests.engines.proxied import PORT, STATE, open_engine, says, who
from tests.support.fastpath_bench import Served, UdpServer, tcp, udp
from tests.support.lab.netns import Lab, Namespace, run, veth
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root]

BACK = 2.0  # seconds within which it is promised to be back
SLACK = 5.0  # for a busy machine


def back(test: Callable[[], object], what: str) -> None:
    """Wait for it, and not much longer than promised."""
    started = time.monotonic()
    wait_for(test, what)
    assert time.monotonic() - started < BACK + SLACK


# ---- the proxy engine ----


@pytest.fixture
def node(lab: Lab) -> Namespace:
    return lab.host("node")


@pytest.fixture
def outside(lab: Lab, node: Namespace) -> Namespace:
    return lab.host("client")


def answers(outside: Namespace, node: Namespace, port: int) -> bool:
    try:
        return who(outside, node.address, port) == b"mesh"
    except (ConnectionError, TimeoutError):
        return False


def losses(mesh: Served) -> int:
    return mesh.datapath.stats().totals["kernel_losses"]


TABLE = table_name(STATE)


@pytest.mark.parametrize(
    "remove",
    [
        "flush ruleset",
        f"delete table inet {TABLE}",
        f"flush chain inet {TABLE} prerouting",
        f"flush set inet {TABLE} alive",
        f"flush table inet {TABLE}",
    ],
)
def test_the_nftables_table_is_put_back(node: Namespace, outside: Namespace, remove: str) -> None:
    fronts = tcp(PORT), udp(PORT)
    with open_engine(node, intercept="nft") as mesh:
        server, datagrams = says(b"mesh"), UdpServer("mesh")
        mesh.serve({fronts[0]: {"a": server.where}, fronts[1]: {"b": datagrams.where}})
        assert answers(outside, node, PORT)
        for count in (1, 2):
            node.run("nft", remove)
            back(lambda: answers(outside, node, PORT), "served again")
            back(lambda n=count: losses(mesh) == n and not mesh.datapath.missing(), "counted")
        mesh.serve({fronts[0]: {"a": server.where}})  # what is ours is changed by us
        assert answers(outside, node, PORT)
        assert losses(mesh) == 2
        assert mesh.datapath.problems() == ()
    assert TABLE not in node.run("nft", "list", "tables").stdout


@pytest.mark.parametrize("intercept", ["nft", "bind"])
@pytest.mark.parametrize(
    "remove",
    [
        "flush ruleset",
        f"flush chain inet {TABLE} forward",
        f"flush chain inet {TABLE} strangers",
        f"flush set inet {TABLE} nodes_ip",
    ],
)
def test_what_keeps_containers_out_is_put_back(node: Namespace, intercept: str, remove: str) -> None:
    def guard() -> list[str]:
        parts = ("chain", "forward"), ("chain", "strangers"), ("set", "nodes_ip")
        listed = (node.run("nft", "-s", "list", kind, "inet", TABLE, name, check=False) for kind, name in parts)
        return [each.stdout for each in listed]

    with open_engine(node, intercept=intercept, docker_host=True) as mesh:
        mesh.serve({tcp(PORT): {"a": says(b"mesh").where}}, nodes=[node.address, "192.0.2.250"])
        whole = guard()
        assert all(whole)
        node.run("nft", remove)
        back(lambda: guard() == whole, "kept out again")
        back(lambda: losses(mesh) == 1 and not mesh.datapath.missing(), "counted")
        time.sleep(0.2)
        assert losses(mesh) == 1


def test_what_is_not_ours_may_come_and_go(node: Namespace, outside: Namespace) -> None:
    with open_engine(node, intercept="nft") as mesh:
        mesh.serve({tcp(PORT): {"a": says(b"mesh").where}})
        for _ in range(3):
            node.run("nft", "add table inet stranger; add chain inet stranger some")
            node.run("nft", "delete table inet stranger")
        time.sleep(0.2)
        assert answers(outside, node, PORT)
        assert losses(mesh) == 0


@pytest.mark.parametrize("intercept", ["nft", "bind"])
def test_listening_sockets_are_opened_again(node: Namespace, outside: Namespace, intercept: str) -> None:
    front = tcp(PORT)
    with open_engine(node, intercept=intercept) as mesh:
        mesh.serve({front: {"a": says(b"mesh").where}, tcp(PORT + 1): {"a": says(b"mesh").where}})
        with outside.entered():
            kept = socket.create_connection((node.address, PORT), timeout=PATIENCE)
        assert kept.recv(4) == b"mesh"
        (listener, *_) = mesh.datapath.listeners()[front]
        with socket.socket(fileno=os.dup(listener)) as copy:
            port = copy.getsockname()[1]  # in nft mode another one than the published
        node.run("ss", "-K", "-l", "-t", f"sport = :{port}")
        back(lambda: losses(mesh) == 1, "noticed")  # other threads' sockets may answer meanwhile
        back(lambda: answers(outside, node, PORT) and answers(outside, node, PORT + 1), "served again")
        back(lambda: not mesh.datapath.missing(), "found in order")
        assert losses(mesh) == 1
        kept.sendall(b"x")
        assert kept.recv(1) == b"x"
        kept.close()


def test_the_peer_port_is_opened_again(node: Namespace) -> None:
    with open_engine(node, intercept="bind", peer_port=9552) as mesh:
        mesh.serve({tcp(PORT): {"a": says(b"mesh").where}}, nodes=[node.address, "192.0.2.250"])
        assert node.run("ss", "-Hlnt", "sport = :9552").stdout
        node.run("ss", "-K", "-l", "-t", "sport = :9552")
        back(lambda: bool(node.run("ss", "-Hlnt", "sport = :9552").stdout) and losses(mesh) == 1, "listening again")
        back(lambda: mesh.datapath.missing() == [], "found in order")


# ---- the kernel engine ----

bpf = pytest.mark.bpf


@pytest.fixture
def engine(serving: Driver) -> Driver:
    """Not the suite's, which is a name."""
    return serving


def kernel_losses(engine: Driver) -> int:
    count: int = engine.stats()["totals"]["kernel_losses"]
    return count


def settled(engine: Driver, count: int) -> None:
    back(lambda: kernel_losses(engine) == count and engine.missing() == [], f"{count} losses made good")


@bpf
def test_detached_links_are_attached_again(plane: Plane, engine: Driver) -> None:
    if not shutil.which("bpftool"):
        pytest.skip("bpftool detaches links")
    links = [pin for pin in plane.pins() if pin.parent.name == "links"]
    assert {pin.name.partition("_")[0] for pin in links} == {"if", "socket"}
    kept = Connection(plane.client, plane.node.address)
    for pin in links:
        plane.node.run("bpftool", "link", "detach", "pinned", str(pin))
    settled(engine, len(links))
    assert set(plane.calls(30)) == {"b1", "b2", "b3"}
    assert sum(plane.calls(5, plane.node, "127.0.0.1").values()) == 5
    kept.echo()
    kept.close()
    assert engine.problems() == []


@bpf
def test_what_a_change_of_the_tables_attaches_again_counts_too(plane: Plane, engine: Driver) -> None:
    """Paths that fail change the tables within moments, before anybody looks after the hooks."""
    if not shutil.which("bpftool"):
        pytest.skip("bpftool detaches links")
    links = [pin for pin in plane.pins() if pin.parent.name == "links"]
    for count, pin in enumerate(links[:4], start=1):
        plane.node.run("bpftool", "link", "detach", "pinned", str(pin))
        engine.serve(services=[plane.web("b1", "b2", "b3", weights={"b1": 1 + count})])
        settled(engine, count)


@bpf
def test_a_removed_clsact_is_made_again(plane: Plane) -> None:
    engine = plane.driver()
    engine.pretend_kernel(major=6, minor=1)
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    plane.node.run("tc", "qdisc", "del", "dev", "eth0", "clsact")
    settled(engine, 1)
    assert set(plane.calls(30)) == {"b1", "b2", "b3"}
    plane.node.run("tc", "filter", "del", "dev", "veth1", "ingress")
    settled(engine, 2)
    assert set(plane.calls(30)) == {"b1", "b2", "b3"}
    engine.close(release=True)


@bpf
@pytest.mark.parametrize("how", ["removed", "unmounted"])
def test_lost_pins_are_pinned_again(plane: Plane, engine: Driver, how: str) -> None:
    before = {pin.name for pin in plane.pins()}
    if how == "removed":
        for home in (plane.bpffs / "mesh").iterdir():
            shutil.rmtree(home)
    else:
        run("umount", "-l", str(plane.bpffs))
    settled(engine, 1)
    assert {pin.name for pin in plane.pins()} == before
    assert set(plane.calls(30)) == {"b1", "b2", "b3"}
    kept = Connection(plane.client, plane.node.address)
    engine.kill()
    second = plane.driver()
    assert second.open()["frontends"] == {"*:8000/tcp": "web"}  # the pins are those of what serves
    kept.echo()
    kept.close()
    assert sum(plane.calls(5, plane.node, "127.0.0.1").values()) == 5
    second.close(release=True)


@bpf
def test_an_interface_that_is_deleted_and_made_again_is_served(plane: Plane, engine: Driver) -> None:
    for _ in range(3):
        veth(plane.node, "again", plane.client, "other")
        plane.node.add_address("again", "203.0.113.1/24")
        plane.client.add_address("other", "203.0.113.2/24")
        back(lambda: _calls(plane, "203.0.113.1"), "served on the interface")
        plane.node.ip("link", "del", "again")
    assert kernel_losses(engine) == 0  # it was no part of ours that went
    assert engine.missing() == []


def _calls(plane: Plane, address: str) -> bool:
    try:
        return sum(plane.calls(3, address=address).values()) == 3
    except OSError:
        return False


@bpf
def test_another_process_that_takes_over_is_no_loss(plane: Plane, engine: Driver) -> None:
    second = plane.driver()
    second.open()
    second.serve(services=[plane.web("b1", "b2")])
    time.sleep(1.5)  # longer than a look
    assert kernel_losses(engine) == 0
    engine.close(release=False)
    engine.end()
    assert kernel_losses(second) == 0
    assert set(plane.calls(30)) == {"b1", "b2"}
    second.close(release=True)
