# SPDX-License-Identifier: Apache-2.0
"""KernelDatapath by itself, in namespaces: what the suite over all engines cannot ask of the others."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.datapath.kernel_driver import Driver
from tests.lab.netns import Lab, Namespace, run, veth, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PORT, TARGET = 8000, 8080
SERVER = """
import socket, sys, threading
name, port = sys.argv[1], int(sys.argv[2])
def tcp(c, a):
    c.sendall(f"{name} {a[0]}\\n".encode())
    while data := c.recv(65536):
        c.sendall(data)
    c.close()
def udp(s):
    while True:
        data, a = s.recvfrom(65536)
        s.sendto(f"{name} {a[0]}".encode(), a)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.bind(("0.0.0.0", port))
threading.Thread(target=udp, args=(u,), daemon=True).start()
s = socket.create_server(("0.0.0.0", port), backlog=1024)
while True:
    threading.Thread(target=tcp, args=s.accept(), daemon=True).start()
"""


class Connection:
    """A TCP connection that knows who answers it."""

    def __init__(self, namespace: Namespace, address: str, port: int = PORT, timeout: float = 5) -> None:
        with namespace.entered():
            self.socket = socket.create_connection((address, port), timeout=timeout)
        text = b""
        while not text.endswith(b"\n"):
            text += self.socket.recv(1)
        self.backend, self.seen = text.decode().split()

    def echo(self, size: int = 1000) -> None:
        """Send and get back; raises when the connection is broken."""
        sent = os.urandom(size)
        self.socket.sendall(sent)
        got = b""
        while len(got) < size:
            data = self.socket.recv(65536)
            assert data, "closed by the other side"
            got += data
        assert got == sent

    def close(self) -> None:
        self.socket.close()


class Plane:
    """client --- node --- docker_gwbridge --- backends; drivers run on the node."""

    def __init__(self, lab: Lab, backends: int = 3) -> None:
        self.lab = lab
        self.client, self.node = lab.host("client"), lab.host("node")
        self.node.bridge("docker_gwbridge", "172.31.0.1/24")
        self.node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.namespaces: dict[str, Namespace] = {}
        for number in range(1, backends + 1):
            self.add(f"b{number}", number)
        self.bpffs, self.state = lab.directory / "bpf", lab.directory / "state"
        self.bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(self.bpffs))
        lab.on_close(lambda: run("umount", "-l", str(self.bpffs), check=False))

    def add(self, name: str, number: int) -> None:
        namespace = self.namespaces[name] = self.lab.namespace(name)
        veth(self.node, f"veth{number}", namespace, "eth0")
        self.node.ip("link", "set", f"veth{number}", "master", "docker_gwbridge")
        namespace.add_address("eth0", f"172.31.0.{10 + number}/24")
        namespace.ip("route", "add", "default", "via", "172.31.0.1")
        serve(namespace, name, TARGET)

    def driver(self, prefix: tuple[str, ...] = (), **config: object) -> Driver:
        options = {"bpf_fs": self.bpffs, "state_dir": self.state, "engine": "kernel", "drain_timeout": 1.0}
        driver = Driver(self.node, prefix, provider="static", **(options | config))
        self.lab.on_close(lambda: driver.process.poll() is None and driver.kill())
        return driver

    def web(self, *names: str, weights: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
        backends = {n: [self.namespaces[n].address, TARGET, (weights or {}).get(n, 1)] for n in names}
        return {"name": "web", "published": PORT, "backends": backends, **more}

    def calls(self, count: int, namespace: Namespace | None = None, address: str = "") -> Counter[str]:
        found: Counter[str] = Counter()
        for _ in range(count):
            connection = Connection(namespace or self.client, address or self.node.address)
            connection.echo()
            connection.close()
            found[connection.backend] += 1
        return found

    def pins(self) -> list[Path]:
        return [p for p in (self.bpffs / "mesh").rglob("*") if not p.is_dir()]


def serve(namespace: Namespace, name: str, port: int) -> subprocess.Popen[Any]:
    process: subprocess.Popen[Any] = namespace.popen(sys.executable, "-c", SERVER, name, str(port))
    wait_for(lambda: f":{port} " in namespace.run("ss", "-Htln").stdout, f"server {name}")
    return process


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Lab() as lab:
        yield Plane(lab)


@pytest.fixture
def engine(plane: Plane) -> Iterator[Driver]:
    driver = plane.driver()
    assert driver.preflight() is None
    assert driver.open()["frontends"] == {}
    driver.serve(services=[plane.web("b1", "b2", "b3")])
    yield driver
    if driver.process.poll() is None:
        driver.close(release=True)
        driver.end()


def datagram(namespace: Namespace, address: str, port: int = PORT) -> str:
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(b"hello", (address, port))
        data, peer = sock.recvfrom(1000)
        assert peer == (address, port)
        return data.decode()


def test_every_backend_answers_and_sees_the_clients_address(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(60)]
    assert {c.seen for c in connections} == {plane.client.address}
    assert {c.backend for c in connections} == {"b1", "b2", "b3"}
    for connection in connections:
        connection.echo(20000)
        connection.close()
    stats = wait_for(lambda: (s := engine.stats())["frontends"]["*:8000/tcp"]["closed"] == 60 and s, "60 closed")
    frontend = stats["frontends"]["*:8000/tcp"]
    assert (frontend["opened"], frontend["active"]) == (60, 0)
    assert sum(b["opened"] for b in stats["backends"].values()) == 60
    assert frontend["bytes_in"] > 60 * 20000 < frontend["bytes_out"]
    assert engine.problems() == []


def test_udp(plane: Plane, engine: Driver) -> None:
    engine.serve(services=[plane.web("b1", "b2", "b3", protocol="udp")])
    answers = [datagram(plane.client, plane.node.address).split() for _ in range(30)]
    assert {name for name, _ in answers} == {"b1", "b2", "b3"}
    assert {seen for _, seen in answers} == {plane.client.address}
    assert len({datagram(plane.node, "127.0.0.1").split()[0] for _ in range(30)}) == 3


def test_ipv6_clients_of_ipv4_tasks(plane: Plane, engine: Driver) -> None:
    found = plane.calls(60, address=plane.node.address6)
    assert set(found) == {"b1", "b2", "b3"}
    stats = wait_for(lambda: (s := engine.stats()["frontends"]["*:8000/tcp"])["closed"] >= 60 and s, "60 closed")
    assert stats["opened"] == 60
    assert engine.problems() == []
    plane.node.add_address("eth0", "2001:db8::201/64")
    wait_for(lambda: not refused(plane.client, "2001:db8::201"), "the new address is served")


def refused(namespace: Namespace, address: str) -> bool:
    with contextlib.suppress(OSError):
        Connection(namespace, address, timeout=1).close()
        return False
    return True


def test_processes_of_the_node_are_connected_straight(plane: Plane, engine: Driver) -> None:
    before = engine.stats()["verdicts"]["socket"]
    for address in ("127.0.0.1", plane.node.address):
        connection = Connection(plane.node, address)
        assert connection.socket.getpeername() == (address, PORT)
        connection.echo()
        connection.close()
    assert engine.stats()["verdicts"]["socket"] == before + 2


def test_sockets_of_containers_are_not_hooked(plane: Plane, engine: Driver) -> None:
    """The node's port is reached from a container by packets, although all share the root cgroup."""
    before = engine.stats()["verdicts"]["socket"]
    assert sum(plane.calls(30, plane.namespaces["b1"]).values()) == 30  # its own share included: hairpin
    assert engine.stats()["verdicts"]["socket"] == before


def test_explain_agrees_with_the_loaded_program_and_with_traffic(plane: Plane, engine: Driver) -> None:
    ids = engine.serve(services=[plane.web("b1", "b2", "b3")])["ids"]
    for _ in range(20):
        connection = Connection(plane.client, plane.node.address)
        source, port = connection.socket.getsockname()
        ours, loaded = engine.explain(source=source, port=port, destination=plane.node.address, to=PORT)
        assert (ours["hash"], ours["slot"], ours["owner"]) == (loaded["hash"], loaded["slot"], loaded["owner"])
        assert loaded["owner"] == ids[connection.backend]
        connection.close()
    ours, loaded = engine.explain(source="192.0.2.99", port=1, destination=plane.node.address, to=4711)
    assert (ours, loaded["verdict"]) == (None, "not ours")


def test_connections_stay_through_a_hundred_changes(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(30)]
    sets = [("b1", "b2", "b3"), ("b1", "b2", "b3")]
    for turn in range(100):
        weights = {"b1": 1 + turn % 3, "b2": 1 + turn % 5, "b3": turn % 2}
        engine.serve(services=[plane.web(*sets[turn % 2], weights=weights)])
        for connection in connections[turn % 3 :: 3]:
            connection.echo(100)
    for connection in connections:
        connection.echo(100)


def test_connections_outlive_a_full_flow_cache(plane: Plane) -> None:
    """After a take-over all slots are in transition: what a flood of starts pushes out of the flow cache is still
    known by its reverse entry, or established connections would be given to PASS."""
    engine = plane.driver(flow_cache=1024)
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in connections:
        connection.echo()
    for _ in range(3000):
        Connection(plane.client, plane.node.address).close()
    for connection in connections:
        connection.echo()
    engine.close(release=True)


def test_a_draining_backend_keeps_its_connections_and_gets_no_new_ones(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(30)]
    engine.serve(services=[plane.web("b1", "b2", "b3", weights={"b2": 0})])
    assert "b2" not in plane.calls(40)
    for connection in connections:
        connection.echo()
    assert "b2" in {c.backend for c in connections}
    engine.serve(services=[plane.web("b1", "b3")])
    assert "b2" not in plane.calls(20)


def test_traffic_outlives_the_agent_and_the_next_one_adopts(plane: Plane, engine: Driver) -> None:
    ids = engine.serve(services=[plane.web("b1", "b2")])["ids"]
    connections = [Connection(plane.client, plane.node.address) for _ in range(10)]
    opened = wait_for(lambda: engine.stats()["frontends"]["*:8000/tcp"]["opened"], "counted")
    engine.kill()
    assert set(plane.calls(30)) == {"b1", "b2"}
    for connection in connections:
        connection.echo()
    second = plane.driver()
    adopted = second.open()
    assert adopted["frontends"] == {"*:8000/tcp": "web"}
    assert {name: ids[name] for name in adopted["backends"]} == adopted["backends"]
    assert second.stats()["frontends"]["*:8000/tcp"]["opened"] >= opened + 30
    second.serve(services=[plane.web("b1", "b2", "b3")])
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    for connection in connections:
        connection.echo()
    second.close(release=True)


def test_the_next_process_takes_over_from_a_running_one(plane: Plane, engine: Driver) -> None:
    """Maps have one writer: the first process no longer follows the network once the second has opened."""
    connections = [Connection(plane.client, plane.node.address) for _ in range(10)]
    second = plane.driver()
    assert second.open()["frontends"] == {"*:8000/tcp": "web"}
    second.serve(services=[plane.web("b1", "b2", "b3", weights={"b1": 0})])
    plane.add("b4", 4)
    second.serve(services=[plane.web("b1", "b2", "b3", "b4", weights={"b1": 0})])
    assert set(plane.calls(60)) == {"b2", "b3", "b4"}
    for connection in connections:
        connection.echo()
    engine.close(release=False)
    engine.end()
    assert set(plane.calls(60)) == {"b2", "b3", "b4"}
    second.close(release=True)


def test_adoption_without_the_names_file(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    engine.kill()
    (plane.state / "kernel-names.json").unlink()
    second = plane.driver()
    assert set(second.open()["frontends"]) == {"*:8000/tcp"}
    assert sum(plane.calls(10).values()) == 10
    second.serve(services=[plane.web("b1", "b2", "b3")])
    for connection in connections:
        connection.echo()
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    second.close(release=True)


@pytest.mark.parametrize("same_version", [True, False])
def test_another_contract_is_built_beside_and_the_old_one_removed(
    plane: Plane, engine: Driver, same_version: bool
) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in connections:
        connection.echo()
    engine.kill()
    (home,) = (plane.bpffs / "mesh").iterdir()
    (old,) = home.iterdir()
    version = old.name.partition("-")[0] if same_version else "0"
    old.rename(home / f"{version}-0123456789abcdef")  # stands for a build with other headers
    second = plane.driver()
    assert second.open()["frontends"] == {"*:8000/tcp": "web"}
    assert [p.name for p in home.iterdir()] == [old.name]
    second.serve(services=[plane.web("b1", "b2", "b3")])
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    for connection in connections:
        connection.echo()
    second.close(release=True)


def test_take_over_and_hand_back_cut_nothing(plane: Plane) -> None:
    serve(plane.node, "before", PORT)  # something on the node serves the port already
    old = [Connection(plane.client, plane.node.address) for _ in range(20)]
    engine = plane.driver()
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    assert "before" not in plane.calls(40)
    for connection in old:
        connection.echo()
    ours = [Connection(plane.client, plane.node.address) for _ in range(20)]
    closing = threading.Thread(target=lambda: engine.close(release=True))
    closing.start()
    wait_for(lambda: set(plane.calls(5)) == {"before"}, "handed back")
    for connection in old + ours:
        connection.echo()
    for connection in ours:
        connection.close()
    closing.join()


def test_hand_back_leaves_nothing(plane: Plane, engine: Driver) -> None:
    plane.calls(20)
    assert plane.pins()
    engine.close(release=True)
    engine.end()
    assert plane.pins() == []
    assert not list((plane.bpffs / "mesh").iterdir())
    with pytest.raises(ConnectionRefusedError):
        Connection(plane.client, plane.node.address)


def test_flows_under_way_keep_the_programs_after_hand_back(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    connection.echo()
    engine.close(release=True)
    engine.end()
    connection.echo()
    assert plane.pins()
    with pytest.raises(ConnectionRefusedError):
        Connection(plane.client, plane.node.address)


def test_containers_come_and_go(plane: Plane, engine: Driver) -> None:
    engine.serve(services=[plane.web("b1")])
    assert set(plane.calls(5)) == {"b1"}
    plane.node.ip("link", "del", "veth1")
    plane.namespaces.pop("b1").delete()
    plane.add("b9", 1)  # the same address and interface name behind another veth
    engine.serve(services=[plane.web("b9")])
    assert set(plane.calls(10)) == {"b9"}
    before = engine.stats()["verdicts"]["error"]
    plane.add("b4", 4)
    engine.serve(services=[plane.web("b4", "b9")])
    assert set(plane.calls(30)) == {"b4", "b9"}
    assert engine.stats()["verdicts"]["error"] == before
    assert engine.problems() == []


def test_source_rules(plane: Plane, engine: Driver) -> None:
    cases: list[tuple[dict[str, list[str]], bool]] = [
        ({"deny": ["192.0.2.0/24"]}, False),
        ({"deny": ["192.0.3.0/24"]}, True),
        ({"allow": ["192.0.2.0/24"]}, True),
        ({"allow": ["10.0.0.0/8"]}, False),
        ({"allow": ["192.0.2.0/24"], "deny": ["192.0.2.0/28"]}, False),
        ({"allow": ["192.0.2.11/32"], "deny": ["192.0.2.0/24"]}, False),
        ({}, True),
    ]
    for options, expected in cases:
        engine.serve(services=[plane.web("b1", options=options)])
        assert refused(plane.client, plane.node.address) is not expected, options


def test_xdp_stage_is_adopted_and_goes_with_the_engine(plane: Plane) -> None:
    """It drops before mesh_ingress can, in the next process as well; without the key it is taken off."""
    # In namespaces there are veths only, which lose the mark of checksums left to offload: have them complete.
    plane.client.run("ethtool", "-K", "eth0", "tx", "off")

    def is_on() -> bool:
        return "prog/xdp" in plane.node.run("ip", "-d", "link", "show", "eth0").stdout

    for end in ("kill", "off", "release"):
        driver = plane.driver(xdp="off" if end == "off" else "on", bpf_stats=1)
        driver.pretend_cards()
        driver.open()
        driver.serve(services=[plane.web("b1", options={"deny": ["192.0.2.0/24"]})])
        assert driver.problems() == []
        assert is_on() is (end != "off")
        denied = driver.stats()["verdicts"]["denied"]
        assert refused(plane.client, plane.node.address)
        stats = driver.stats()
        assert stats["verdicts"]["denied"] > denied
        assert ("program_xdp_runs" in stats["totals"]) is (end != "off")
        driver.serve(services=[plane.web("b1")])
        plane.calls(5)
        if end == "release":
            driver.close(release=True)
            assert not is_on()
            assert plane.pins() == []
        else:
            driver.kill()
            assert is_on() is (end != "off")


def test_xdp_stage_is_not_for_veths(plane: Plane) -> None:
    driver = plane.driver(xdp="on")
    driver.open()
    driver.serve(services=[plane.web("b1")])
    (line,) = driver.problems()
    assert line.startswith("interface eth0 has no XDP stage: it is a veth")
    plane.calls(5)
    driver.close(release=True)


def test_frontend_with_an_address_of_its_own(plane: Plane, engine: Driver) -> None:
    plane.node.add_address("eth0", "192.0.2.201/24")
    one = plane.web("b1", address="192.0.2.201")
    engine.serve(services=[one, plane.web("b2")])
    assert set(plane.calls(10, address="192.0.2.201")) == {"b1"}
    assert set(plane.calls(10)) == {"b2"}
    engine.serve(services=[one])
    with pytest.raises(ConnectionRefusedError):
        plane.calls(1)
    assert set(plane.calls(5, address="192.0.2.201")) == {"b1"}


def test_a_floating_address_is_served_from_its_first_packet(plane: Plane) -> None:
    """Even while the engine's process hears of nothing; clients of the other IP version meet the proxy beside it."""
    engine = plane.driver(vips="192.0.2.240, 2001:db8::240")
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    plane.node.add_address("eth0", "2001:db8::240/64")
    assert set(plane.calls(1, address="2001:db8::240")) <= {"b1", "b2", "b3"}
    engine.process.send_signal(signal.SIGSTOP)
    try:
        plane.node.add_address("eth0", "192.0.2.240/24")
        assert set(plane.calls(20, address="192.0.2.240")) == {"b1", "b2", "b3"}
    finally:
        engine.process.send_signal(signal.SIGCONT)
    assert engine.problems() == []


def test_many_services_are_published_and_read_at_once(plane: Plane, engine: Driver) -> None:
    many = [plane.web("b1", "b2", "b3") | {"published": 10000 + n, "name": f"s{n}"} for n in range(1200)]
    engine.serve(services=many)
    for port in (10000, 10600, 11199):
        connection = Connection(plane.client, plane.node.address, port)
        connection.echo()
        connection.close()
    assert len(engine.stats()["frontends"]) == 1200
    engine.serve(services=[plane.web("b1")])
    assert set(plane.calls(5)) == {"b1"}


def test_no_more_than_three_capabilities(plane: Plane) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and a bpf file system that the user may write to; no root."""
    if not shutil.which("setpriv"):
        pytest.skip("setpriv (util-linux) drops the capabilities")
    for directory in (plane.bpffs, plane.lab.directory):
        directory.chmod(0o777)
    caps = "-all,+net_admin,+cap_38,+cap_39"
    user = ("--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={caps}", f"--ambient-caps={caps}")
    driver = plane.driver(("setpriv", *user, f"--bounding-set={caps}"))
    assert driver.preflight() is None
    driver.open()
    driver.serve(services=[plane.web("b1", "b2", "b3")])
    assert driver.problems() == []
    assert set(plane.calls(30)) == {"b1", "b2", "b3"}
    assert sum(plane.calls(5, plane.node, "127.0.0.1").values()) == 5
    driver.close(release=True)
    assert plane.pins() == []


@pytest.mark.parametrize(("release", "tcx"), [((6, 18), True), ((6, 18), False), ((6, 1), False)])
def test_programs_behind_ours_meet_what_is_not_ours(plane: Plane, release: tuple[int, int], tcx: bool) -> None:
    """In a tcx chain, among the filters behind it, and among clsact filters where there is no tcx."""
    engine = plane.driver()
    engine.pretend_kernel(major=release[0], minor=release[1])
    engine.open()
    engine.serve(services=[plane.web("b1", "b2")])
    before = engine.runs_behind(device="eth0", tcx=tcx)
    with plane.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(3):
            sock.sendto(b"not ours", (plane.node.address, 9))
    wait_for(lambda: engine.runs_behind(device="eth0", tcx=tcx) >= before + 3, "packets at the program behind ours")
    assert sum(plane.calls(5).values()) == 5
    engine.close(release=True)
    engine.end()


def test_entries_of_closed_connections_are_swept(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in connections:
        connection.echo()
    for connection in connections[5:]:
        connection.close()
    wait_for(lambda: engine.stats()["frontends"]["*:8000/tcp"]["closed"] == 15, "15 closed")
    assert engine.entries()["replies"] == 20
    assert engine.sweep(seconds=60) == 0
    assert wait_for(lambda: engine.sweep(seconds=0), "closed entries swept") == 15
    assert engine.entries()["replies"] == 5
    for connection in connections[:5]:
        connection.echo()
        connection.close()


def test_kernels_before_6_6_get_a_clsact_filter(plane: Plane) -> None:
    """Attached, adopted, replaced by tcx only when it is gone, and taken off."""
    first = plane.driver()
    first.pretend_kernel(major=6, minor=1)
    assert first.preflight() is None
    first.open()
    first.serve(services=[plane.web("b1", "b2", "b3")])
    assert first.problems() == []
    shown = plane.node.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
    assert "mesh_ingress" in shown
    connections = [Connection(plane.client, plane.node.address) for _ in range(10)]
    first.kill()
    second = plane.driver()
    second.open()
    second.serve(services=[plane.web("b1", "b2")])
    assert set(plane.calls(30)) == {"b1", "b2"}
    for connection in connections:
        if connection.backend != "b3":
            connection.echo()
        connection.close()
    second.close(release=True)
    for device in ("eth0", "veth1", "lo"):
        assert "mesh" not in plane.node.run("tc", "filter", "show", "dev", device, "ingress", check=False).stdout


def test_run_time_is_told_on_request(plane: Plane) -> None:
    driver = plane.driver(bpf_stats=1)
    driver.open()
    driver.serve(services=[plane.web("b1")])
    plane.calls(10)
    totals = driver.stats()["totals"]
    assert totals["program_ingress_runs"] >= 50
    assert totals["program_task_nanoseconds"] > 0
    driver.close(release=True)


def test_preflight_says_why_not(plane: Plane) -> None:
    driver = plane.driver(("setpriv", "--bounding-set=-net_admin", "--inh-caps=-all"))
    assert "CAP_NET_ADMIN" in driver.preflight()


def test_stop_without_release_leaves_everything(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    engine.close(release=False)
    engine.end()
    connection.echo()
    assert sum(plane.calls(10).values()) == 10
