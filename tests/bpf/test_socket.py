# SPDX-License-Identifier: Apache-2.0
"""Socket hooks on real sockets: a process in its own cgroup and namespace, tasks on that namespace's loopback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import _bpf
from tests.bpf.plane import CLIENT, FREE, PASS, UDP, Plane
from tests.bpf.wires import inside
from tests.support.frames import NODE4, NODE6, TASK4, TASK6
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ATTACH = {
    "mesh_connect4": 10,
    "mesh_connect6": 11,
    "mesh_sendmsg4": 14,
    "mesh_sendmsg6": 15,
    "mesh_recvmsg4": 19,
    "mesh_recvmsg6": 20,
    "mesh_getpeername4": 29,
    "mesh_getpeername6": 30,
}
SO_NETNS_COOKIE = 71
TASK4B = "172.18.0.4"
NODE2 = "192.0.2.2"
SEED = b"remotely"
CALLS = 300
SPREAD = 5 * (CALLS * 2 / 9) ** 0.5  # five standard deviations of a share of a third or two


def named(owner: int) -> str:
    """The address of the fallback proxy that names an owner (MESH_NAMED)."""
    return f"127.109.{owner >> 8}.{owner & 255}"


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"mesh{os.getpid()}-sock"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in ("link set lo up", *(f"addr add {a} dev lo" for a in (NODE4, TASK4, TASK4B))):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        for address in (NODE6, TASK6):
            subprocess.run(["ip", "-n", name, "-6", "addr", "add", address, "dev", "lo", "nodad"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def plane(namespace: str) -> Iterator[Plane]:
    """Ports 80/tcp, 53/udp -> TASK4, 86/tcp, 56/udp -> TASK6; this process is in the cgroup."""
    p = Plane(["socket"])
    found = re.search(r"^\S+ (\S+) cgroup2 ", Path("/proc/mounts").read_text(), re.MULTILINE)
    assert found, "no cgroup2 is mounted"
    own = Path("/proc/self/cgroup").read_text()
    match = re.search(r"^0::(.*)$", own, re.MULTILINE)
    assert match
    home = Path(found[1]) / match[1].lstrip("/")
    group = Path(found[1]) / f"mesh{os.getpid()}-sock"
    group.mkdir()
    links = []
    directory = os.open(group, os.O_RDONLY)
    try:
        links = [_bpf.Link.create(p.programs[name], directory, kind) for name, kind in ATTACH.items()]
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with inside(namespace), socket.socket() as s:
            p.configure(int.from_bytes(s.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little"))
            p.local(NODE4, NODE6)
            p.backend(2, TASK4, 8080)
            p.backend(3, TASK6, 8080)
            p.backend(4, TASK4, 5353, protocol=UDP)
            p.backend(5, TASK6, 5353, protocol=UDP)
            p.backend(6, TASK4B, 5353, protocol=UDP)
            p.frontend(1, 80, [(2, 2)])
            p.frontend(2, 86, [(3, 3)])
            p.frontend(3, 53, [(4, 4)], protocol=UDP)
            p.frontend(4, 56, [(5, 5)], protocol=UDP)
            yield p
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        for link in links:
            link.close()
        os.close(directory)
        wait_for(lambda: removed(group), "the empty cgroup is removed")


def removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


@contextlib.contextmanager
def echo(address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """A task: answers one message per call with its own address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        stop = threading.Event()
        if kind == socket.SOCK_STREAM:
            server.listen()
        server.settimeout(0.05)

        def work() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    if kind == socket.SOCK_DGRAM:
                        _, peer = server.recvfrom(100)
                        server.sendto(address.encode(), peer)
                    else:
                        connection, _ = server.accept()
                        connection.sendall(address.encode())
                        connection.close()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield server
        finally:
            stop.set()
            thread.join()


def client(address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    made.settimeout(PATIENCE)
    return made


@pytest.mark.parametrize(
    ("dialled", "port", "task"),
    [
        ("127.0.0.1", 80, TASK4),
        ("127.1.2.3", 80, TASK4),
        (NODE4, 80, TASK4),
        ("::1", 80, TASK4),
        ("::ffff:127.0.0.1", 80, TASK4),
        (NODE6, 80, TASK4),
        ("::1", 86, TASK6),
        (NODE6, 86, TASK6),
    ],
)
def test_tcp_reaches_a_task_and_shows_what_was_dialled(plane: Plane, dialled: str, port: int, task: str) -> None:
    with echo(task, 8080), client(dialled) as s:
        s.connect((dialled, port))
        assert s.recv(100) == task.encode()
        assert s.getpeername()[:2] == (dialled, port)
    assert plane.verdicts() == {"SOCKET": 1}
    opened = {86: (2, 3)}.get(port, (1, 2))  # what is open is not known to the hooks: it counts as closed at once
    for name, number in zip(("mesh_fe_metrics", "mesh_be_metrics"), opened, strict=True):
        assert plane.counts(name, number)[4:] == (1, 1)


def test_calls_are_left_alone_once_the_tables_are_orphaned(plane: Plane) -> None:
    plane.orphan()
    with echo(TASK4, 8080), echo(NODE4, 80), client(NODE4) as s:
        s.connect((NODE4, 80))
        assert s.recv(100) == NODE4.encode()
    assert plane.verdicts() == {"SOCKET_PASS": 1}


@pytest.mark.parametrize(
    ("dialled", "port", "task"), [("127.0.0.1", 53, TASK4), ("::1", 53, TASK4), ("::1", 56, TASK6)]
)
def test_connected_udp(plane: Plane, dialled: str, port: int, task: str) -> None:
    with echo(task, 5353, socket.SOCK_DGRAM), client(dialled, socket.SOCK_DGRAM) as s:
        s.connect((dialled, port))
        assert s.getpeername()[:2] == (dialled, port)
        s.send(b"?")
        answer, peer = s.recvfrom(100)
        assert (answer, peer[:2]) == (task.encode(), (dialled, port))


@pytest.mark.parametrize(
    ("dialled", "port", "task"), [("127.0.0.1", 53, TASK4), (NODE4, 53, TASK4), ("::1", 56, TASK6)]
)
def test_unconnected_udp(plane: Plane, dialled: str, port: int, task: str) -> None:
    with echo(task, 5353, socket.SOCK_DGRAM), client(dialled, socket.SOCK_DGRAM) as s:
        for _ in range(3):
            s.sendto(b"?", (dialled, port))
            answer, peer = s.recvfrom(100)
            assert (answer, peer[:2]) == (task.encode(), (dialled, port))
    assert plane.counts("mesh_fe_metrics", 3 if port == 53 else 4)[4:] == (1, 1)  # one flow, not three


def test_unconnected_udp_of_an_ipv6_socket_to_a_mapped_address(plane: Plane) -> None:
    with echo(TASK4, 5353, socket.SOCK_DGRAM), client("::", socket.SOCK_DGRAM) as s:
        s.sendto(b"?", ("::ffff:127.0.0.1", 53))
        answer, peer = s.recvfrom(100)
        assert (answer, peer[:2]) == (TASK4.encode(), ("::ffff:127.0.0.1", 53))


def test_unconnected_udp_talks_to_two_frontends_and_leaves_a_task_that_is_gone(plane: Plane) -> None:
    plane.frontend(5, 54, [(6, 6)], protocol=UDP)
    with (
        echo(TASK4, 5353, socket.SOCK_DGRAM),
        echo(TASK4B, 5353, socket.SOCK_DGRAM),
        client(NODE4, socket.SOCK_DGRAM) as s,
    ):
        s.sendto(b"?", (NODE4, 53))
        s.sendto(b"?", (NODE4, 54))
        got = dict(s.recvfrom(100)[::-1] for _ in range(2))
        assert got == {(NODE4, 53): TASK4.encode(), (NODE4, 54): TASK4B.encode()}
        plane.frontend(3, 53, [(6, 6)], protocol=UDP)
        plane.backend(4, TASK4, 5353, protocol=UDP, state=FREE)
        s.sendto(b"?", (NODE4, 53))
        assert s.recvfrom(100) == (TASK4B.encode(), (NODE4, 53))


def drawn(dialled: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """Who a new socket is connected to, of echo servers."""
    with client(dialled, kind) as s:
        s.connect((dialled, port))
        assert s.getpeername()[:2] == (dialled, port)
        if kind == socket.SOCK_DGRAM:
            s.send(b"?")
        return s.recv(100).decode()


@contextlib.contextmanager
def echoes(kind: socket.SocketKind, *places: tuple[str, int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for address, port in places:
            stack.enter_context(echo(address, port, kind))
        yield


@pytest.mark.parametrize(
    ("kind", "dialled"),
    [
        (socket.SOCK_STREAM, "127.0.0.1"),
        (socket.SOCK_STREAM, NODE4),
        (socket.SOCK_STREAM, "::1"),
        (socket.SOCK_STREAM, NODE6),
        (socket.SOCK_DGRAM, "127.0.0.1"),
        (socket.SOCK_DGRAM, "::1"),
    ],
)
def test_a_call_makes_one_draw_of_all_tasks(plane: Plane, kind: socket.SocketKind, dialled: str) -> None:
    """Two tasks of three on another node: two thirds of the calls name one of them to the fallback proxy."""
    protocol, frontend, port, own = (UDP, 3, 53, 4) if kind == socket.SOCK_DGRAM else (6, 1, 80, 2)
    for owner in (300, 301):
        plane.away(owner, NODE2, 8080, SEED, protocol=protocol, handed=True)
    plane.frontend(frontend, port, [(own, own), (300, 300), (301, 301)] * 7, protocol=protocol)
    own_port = 5353 if protocol == UDP else 8080
    with echoes(kind, (TASK4, own_port), (named(300), port), (named(301), port)):
        found = Counter(drawn(dialled, port, kind) for _ in range(CALLS))
    assert all(abs(found[who] - CALLS / 3) < SPREAD for who in (TASK4, named(300), named(301))), found
    assert plane.verdicts() == {"SOCKET": found[TASK4], "SOCKET_HANDED": CALLS - found[TASK4]}
    for name, number in (("mesh_fe_metrics", frontend), ("mesh_be_metrics", own)):
        assert plane.counts(name, number)[4:] == (found[TASK4],) * 2  # the fallback proxy counts the others
    assert plane.counts("mesh_be_metrics", 300)[4:] == (0, 0)


def test_a_call_is_not_handed_to_a_node_whose_peer_port_does_not_answer(plane: Plane) -> None:
    plane.away(300, NODE2, 8080, SEED, handed=True)
    plane.away(301, NODE2, 8080, SEED)
    # 8 draws: one call in 390,000 meets 301 only.
    plane.frontend(1, 80, [(2, 2), (300, 300), (2, 2), (300, 300), (301, 301)] * 4)
    with echoes(socket.SOCK_STREAM, (TASK4, 8080), (named(300), 80), (NODE4, 80)):
        found = Counter(drawn(NODE4, 80) for _ in range(100))
        assert set(found) == {TASK4, named(300)} and min(found.values()) > 20, found
        plane.frontend(1, 80, [(301, 301)])
        assert drawn(NODE4, 80) == NODE4  # who else has the port: the fallback proxy, or Docker's own mesh


def test_affinity_takes_all_processes_of_the_node_for_one_client(plane: Plane) -> None:
    owners = [2, *range(300, 306)]
    for owner in owners[1:]:
        plane.away(owner, NODE2, 8080, SEED, handed=owner != 300)
    places = [(TASK4, 8080), *((named(owner), 80) for owner in owners[1:])]
    with echoes(socket.SOCK_STREAM, *places):
        for turn in range(4):
            slots = [(owner, owner) for owner in owners[turn:] + owners[:turn]] * 3
            plane.frontend(1, 80, slots, flags=CLIENT)
            for dialled in ("127.0.0.1", NODE4):
                assert len({drawn(dialled, 80) for _ in range(8)}) == 1
    assert plane.verdicts().keys() == {"SOCKET", "SOCKET_HANDED"}


def test_unconnected_udp_stays_with_the_task_that_was_drawn(plane: Plane) -> None:
    plane.away(300, NODE2, 8080, SEED, protocol=UDP, handed=True)
    plane.frontend(3, 53, [(4, 4), (300, 300)] * 9, protocol=UDP)
    met = set()
    with echoes(socket.SOCK_DGRAM, (TASK4, 5353), (named(300), 53)):
        for _ in range(20):
            with client(NODE4, socket.SOCK_DGRAM) as s:
                answers = set()
                for _ in range(6):
                    s.sendto(b"?", (NODE4, 53))
                    answers.add(s.recvfrom(100))
                assert len(answers) == 1
                ((answer, peer),) = answers
                assert peer == (NODE4, 53)
                met.add(answer.decode())
        assert met == {TASK4, named(300)}
        with client(NODE4, socket.SOCK_DGRAM) as s:  # a peer port that goes down in between
            while True:
                s.sendto(b"?", (NODE4, 53))
                if s.recv(100) == named(300).encode():
                    break
                s.close()
                s = client(NODE4, socket.SOCK_DGRAM)  # noqa: PLW2901
            plane.away(300, NODE2, 8080, SEED, protocol=UDP)
            s.sendto(b"?", (NODE4, 53))
            assert s.recv(100) == TASK4.encode()
            s.close()


def test_what_cannot_be_named_is_left_to_the_fallback_proxys_own_draw(plane: Plane) -> None:
    """A frontend with an address of its own, a datagram of an IPv6 socket, a socket bound to loopback."""
    plane.away(300, NODE2, 8080, SEED, handed=True)
    plane.away(301, NODE2, 5353, SEED, protocol=UDP, handed=True)
    plane.frontend(6, 87, [(300, 300)], address=NODE4)
    plane.frontend(3, 53, [(301, 301)], protocol=UDP)
    plane.frontend(1, 80, [(300, 300)])
    with echoes(socket.SOCK_STREAM, (NODE4, 87), ("127.0.0.1", 80)):
        assert drawn(NODE4, 87) == NODE4
        with client("127.0.0.1") as s:
            s.bind(("127.0.0.1", 0))
            s.connect(("127.0.0.1", 80))
            assert s.recv(100) == b"127.0.0.1"
    with echo("::1", 53, socket.SOCK_DGRAM), client("::1", socket.SOCK_DGRAM) as s:
        s.sendto(b"?", ("::1", 53))
        assert s.recv(100) == b"::1"
    assert plane.verdicts() == {"SOCKET_PASS": 1, "FAMILY": 1}


def test_other_calls_are_left_alone(plane: Plane, namespace: str) -> None:
    with echo(NODE4, 81), client(NODE4) as s:
        s.connect((NODE4, 81))
        assert s.getpeername() == (NODE4, 81)
    with echo(TASK4B, 80), client(NODE4) as s:  # not this node's address
        s.connect((TASK4B, 80))
        assert s.recv(100) == TASK4B.encode()
    assert plane.verdicts() == {}


def test_other_namespaces_are_left_alone(plane: Plane) -> None:
    plane.configure(12345)
    with echo(NODE4, 80), client(NODE4) as s:
        s.connect((NODE4, 80))
        assert s.recv(100) == NODE4.encode()
    assert plane.verdicts() == {}


def test_socket_bound_to_loopback_is_left_alone(plane: Plane) -> None:
    with echo("127.0.0.1", 80), client("127.0.0.1") as s:
        s.bind(("127.0.0.1", 0))
        s.connect(("127.0.0.1", 80))
        assert s.recv(100) == b"127.0.0.1"


def test_owner_pass_is_left_alone(plane: Plane) -> None:
    plane.frontend(1, 80, [(PASS, PASS)])
    with echo(NODE4, 80), client(NODE4) as s:
        s.connect((NODE4, 80))
        assert s.recv(100) == NODE4.encode()
    assert plane.verdicts() == {"SOCKET_PASS": 1}


def test_no_backend_is_refused_at_once(plane: Plane) -> None:
    plane.frontend(1, 80, [(0, 0)])
    plane.frontend(3, 53, [(0, 0)], protocol=UDP)
    for dialled in ("127.0.0.1", "::1"):
        with client(dialled) as s, pytest.raises(ConnectionRefusedError):
            s.connect((dialled, 80))
    with client("127.0.0.1", socket.SOCK_DGRAM) as s, pytest.raises(PermissionError) as error:
        s.connect(("127.0.0.1", 53))
    assert error.value.errno == errno.EPERM
    assert plane.verdicts() == {"SOCKET_REJECTED": 3}
    assert plane.failures() == {(1, "NO_BACKEND"): 2, (3, "NO_BACKEND"): 1}


def test_a_socket_that_is_connected_elsewhere_later_shows_its_new_peer(plane: Plane) -> None:
    with client(NODE4, socket.SOCK_DGRAM) as s:
        s.connect((NODE4, 53))
        assert s.getpeername() == (NODE4, 53)
        s.connect((TASK4B, 99))
        assert s.getpeername() == (TASK4B, 99)
