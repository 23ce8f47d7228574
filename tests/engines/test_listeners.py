# SPDX-License-Identifier: Apache-2.0
"""How the proxy engine gets connections beside somebody who has the port already (as dockerd and its rules have)."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mesh._abi import OWNER_PASS
from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import Plan
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.datapath.proxy.listeners import Interceptor
from mesh.datapath.proxy.nft import NftTable, table_name
from mesh.errors import DatapathError
from mesh.model import Frontend, Protocol, ProxyProtocol, ServiceOptions
from tests.engines.proxied import PORT, STATE, open_engine, says, who
from tests.support.fastpath_bench import Served, TcpServer, UdpServer, call, read_all, tcp, udp
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import PATIENCE, wait_for

pytestmark = pytest.mark.root

RIVAL_RULES = """
table inet rival {
  chain prerouting { type nat hook prerouting priority -100; fib daddr type local meta l4proto tcp dnat to :tcp dport map { 8080 : 9090 }; }
  chain output { type nat hook output priority -100; fib daddr type local meta l4proto tcp dnat to :tcp dport map { 8080 : 9090 }; }
}
"""  # noqa: E501


@pytest.fixture
def node(lab: Lab) -> Namespace:
    return lab.host("node")


@pytest.fixture
def outside(lab: Lab, node: Namespace) -> Namespace:
    return lab.host("client")


@contextlib.contextmanager
def rival(node: Namespace) -> Iterator[None]:
    """Somebody who listens on the port, and whose rules lead it elsewhere, as Docker's do."""
    with node.entered():
        holder = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        server = says(b"rival", "::", 9090)
    try:
        node.run("nft", "-f", "-", input=RIVAL_RULES)
        yield
    finally:
        server.close()
        holder.close()


def hosts(node: Namespace) -> list[str]:
    return [node.address, node.address6]


def test_ahead_of_a_rival_and_back_without_a_lost_connection(node: Namespace, outside: Namespace) -> None:
    front = tcp(PORT)
    with rival(node), open_engine(node, intercept="nft") as mesh:
        for host in (*hosts(node),):
            assert who(outside, host) == b"rival"
        with outside.entered():
            before = socket.create_connection((node.address, PORT), timeout=PATIENCE)
        assert before.recv(100) == b"rival"
        with node.entered():
            server = says(b"mesh")
        mesh.serve({front: {"a": server.where}})
        assert mesh.datapath.problems() == ()
        for host in hosts(node):
            assert who(outside, host) == b"mesh"
        for host in ("127.0.0.1", "::1", *hosts(node)):
            assert who(node, host) == b"mesh"
        before.sendall(b"still the rival's")
        assert before.recv(100) == b"still the rival's"
        with outside.entered():
            during = socket.create_connection((node.address, PORT), timeout=PATIENCE)
        assert during.recv(100) == b"mesh"
        mesh.serve({})
        assert who(outside, node.address) == b"rival"
        assert who(node, "127.0.0.1") == b"rival"
        for sock in (before, during):
            sock.sendall(b"still here")
            assert sock.recv(100) == b"still here"
            sock.close()
        mesh.quiet(front)
    assert table_name(STATE) not in node.run("nft", "list", "tables").stdout


def passing(mesh: Served, front: Frontend) -> None:
    """From now on none of the frontend's tasks can be reached from here."""
    held = mesh.applied.frontends[front]
    size = held.table.size
    state = dataclasses.replace(held.state, passing=True)
    entry = dataclasses.replace(held, state=state, table=SlotTable.uniform(size, OWNER_PASS))
    result = dataclasses.replace(mesh.applied, frontends={front: entry})
    mesh.applied = mesh.datapath.apply(Plan(result.generation, put_frontends=(entry,), result=result))


@pytest.mark.parametrize("obstacle", ["closed", "refused"])
def test_what_was_accepted_for_a_node_that_does_not_answer_goes_to_who_else_serves_the_port(
    node: Namespace, outside: Namespace, obstacle: str
) -> None:
    """Before the path is known to be down; callers on the node itself too."""
    front, away = tcp(PORT), "192.0.2.77"
    node.ip("address", "add", f"{away}/32", "dev", "lo")
    if obstacle == "closed":
        rules = f"table ip wall {{ chain f {{ type filter hook output priority 0; ip daddr {away} drop; }}\n}}"
        node.run("nft", "-f", "-", input=rules)
    with rival(node), open_engine(node, intercept="nft", connect_timeout=0.3) as mesh:
        mesh.serve({front: {"a": ("", 80)}}, via=away)
        for where, host in ((outside, node.address), (outside, node.address6), (node, node.address), (node, "::1")):
            assert who(where, host) == b"rival"
        totals = mesh.datapath.stats().totals
        assert totals["passed_connections"] == 4
        assert mesh.datapath.stats().frontends[front].failed == {}


def test_without_who_else_serves_the_port_it_fails_once(node: Namespace, outside: Namespace) -> None:
    """It does not call itself."""
    front = tcp(PORT)
    with open_engine(node, intercept="nft") as mesh:
        mesh.serve({front: {"a": ("", 80)}}, via="127.0.0.9")
        with pytest.raises(ConnectionResetError):
            who(outside, node.address)
        assert mesh.datapath.stats().totals["passed_connections"] == 1
        assert sum(mesh.datapath.stats().frontends[front].failed.values()) == 1
    with open_engine(node, intercept="bind") as mesh:
        mesh.serve({front: {"a": ("", 80)}}, via="127.0.0.9")
        with pytest.raises(ConnectionResetError):
            who(outside, node.address)
        assert mesh.datapath.stats().totals["passed_connections"] == 0


def test_a_port_that_is_passed_and_taken_back_loses_nothing(node: Namespace, outside: Namespace) -> None:
    """Under load, again and again; connections that were redirected before are served."""
    front = tcp(PORT)
    with rival(node), open_engine(node, intercept="nft") as mesh:
        with node.entered():
            server = says(b"mesh")
        mesh.serve({front: {"a": server.where}})
        answers: list[bytes] = []
        stop = threading.Event()

        def calls() -> None:
            while not stop.is_set():
                answers.append(who(outside, node.address))

        callers = [threading.Thread(target=calls) for _ in range(4)]
        for caller in callers:
            caller.start()
        for _ in range(10):
            goal = len(answers) + 20
            wait_for(lambda goal=goal: len(answers) > goal)
            passing(mesh, front)
            assert who(outside, node.address) == b"rival"
            mesh.serve({front: {"a": server.where}})
            assert who(outside, node.address) == b"mesh"
        stop.set()
        for caller in callers:
            caller.join()
        assert set(answers) == {b"mesh", b"rival"}


def test_a_port_that_is_passed_stays_so_when_its_sockets_are_opened_again(node: Namespace, outside: Namespace) -> None:
    front = tcp(PORT)
    with rival(node), open_engine(node, intercept="nft") as mesh:
        server = says(b"mesh")
        mesh.serve({front: {"a": server.where}})
        passing(mesh, front)
        (listener, *_) = mesh.datapath.listeners()[front]
        with socket.socket(fileno=os.dup(listener)) as copy:
            port = copy.getsockname()[1]
        node.run("ss", "-K", "-l", "-t", f"sport = :{port}")
        wait_for(lambda: mesh.datapath.stats().totals["kernel_losses"] == 1 and not mesh.datapath.missing())
        assert who(outside, node.address) == b"rival"
        mesh.serve({front: {"a": server.where}})
        assert who(outside, node.address) == b"mesh"


def test_drain_hands_new_flows_back_and_keeps_old_ones(node: Namespace, outside: Namespace) -> None:
    front = tcp(PORT)
    with rival(node), open_engine(node, intercept="nft") as mesh:
        server = says(b"mesh")
        mesh.serve({front: {"a": server.where}})
        with outside.entered():
            sock = socket.create_connection((node.address, PORT), timeout=PATIENCE)
        assert sock.recv(100) == b"mesh"
        assert mesh.datapath.drain(0.1) == 1
        assert who(outside, node.address) == b"rival"
        sock.sendall(b"still here")
        assert sock.recv(100) == b"still here"
        sock.close()
        assert mesh.datapath.drain(PATIENCE) == 0


def test_the_called_address_and_port_are_those_the_client_called(node: Namespace, outside: Namespace) -> None:
    front = tcp(PORT)
    with open_engine(node, intercept="nft") as mesh:
        got: list[bytes] = []
        server = TcpServer(lambda sock: got.append(read_all(sock)))
        mesh.serve({front: {"a": server.where}}, ServiceOptions(proxy_protocol=ProxyProtocol.V2, table_size=1021))
        with outside.entered(), call(front, node.address) as sock:
            source = sock.getsockname()
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        wait_for(lambda: got)
        addresses = socket.inet_aton(source[0]) + socket.inet_aton(node.address)
        assert got[0][16:] == addresses + source[1].to_bytes(2, "big") + PORT.to_bytes(2, "big")


def test_udp_is_redirected_and_answered_from_the_called_address(node: Namespace, outside: Namespace) -> None:
    front = udp(5353)
    with node.entered():
        taken = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        taken.bind(("::", 5353))
    with open_engine(node, intercept="nft") as mesh:
        server = UdpServer("mesh")
        mesh.serve({front: {"a": server.where}})
        for where, host in ((outside, node.address), (outside, node.address6), (node, "127.0.0.1"), (node, "::1")):
            with where.entered():
                sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
            sock.settimeout(PATIENCE)
            sock.connect((host, 5353))
            for _ in range(3):
                sock.send(b"x")
                assert sock.recv(100) == b"mesh:x"
            sock.close()
    taken.close()


def test_a_specific_address_only(node: Namespace, outside: Namespace) -> None:
    node.add_address("eth0", "192.0.2.200/24")
    front = tcp(PORT, "192.0.2.200")
    with rival(node), open_engine(node, intercept="nft") as mesh:
        server = says(b"mesh")
        mesh.serve({front: {"a": server.where}})
        assert who(outside, "192.0.2.200") == b"mesh"
        assert who(outside, node.address) == b"rival"


def test_auto_binds_where_it_can_and_redirects_where_it_cannot(node: Namespace, outside: Namespace) -> None:
    taken, free = tcp(PORT), tcp(8081)
    with rival(node), open_engine(node, intercept="auto") as mesh:
        server = says(b"mesh")
        mesh.serve({taken: {"a": server.where}, free: {"a": server.where}})
        assert mesh.datapath.problems() == (
            "frontend *:8080/tcp: another process listens on this port; its new connections are redirected to the "
            "mesh by nftables",
        )
        assert who(outside, node.address) == b"mesh"
        assert who(outside, node.address, 8081) == b"mesh"
        assert "8081" not in node.run("nft", "list", "table", "inet", table_name(STATE)).stdout
        mesh.serve({free: {"a": server.where}})
        assert mesh.datapath.problems() == ()
        assert who(outside, node.address) == b"rival"


def test_auto_on_a_docker_host_redirects(node: Namespace, outside: Namespace) -> None:
    front = tcp(PORT)
    with open_engine(node, intercept="auto", docker_host=True) as mesh:
        mesh.serve({front: {"a": says(b"mesh").where}})
        assert who(outside, node.address) == b"mesh"
        with socket.create_server(("", PORT)):  # the port is still free for others
            assert who(outside, node.address) == b"mesh"


def test_take_over_keeps_the_table(node: Namespace, outside: Namespace) -> None:
    front = tcp(PORT)
    with rival(node), open_engine(node, intercept="nft") as old:
        server = says(b"mesh")
        old.serve({front: {"a": server.where}})
        passed = {f: [os.dup(fd) for fd in fds] for f, fds in old.datapath.listeners().items()}
        with open_engine(node, passed, intercept="nft", threads=3) as new:
            assert who(outside, node.address) == b"mesh"
            new.serve({front: {"a": server.where}})
            old.datapath.stop_accepting()
            assert old.datapath.drain(PATIENCE) == 0
            old.datapath.close(release=False)
            assert who(outside, node.address) == b"mesh"
            assert new.quiet(front).opened >= 1
        assert who(outside, node.address) == b"rival"


def test_what_a_killed_process_left_is_cleared(node: Namespace, outside: Namespace) -> None:
    with rival(node), node.entered():
        NftTable(table_name(STATE)).replace({tcp(PORT): 1})
        with pytest.raises(ConnectionRefusedError):
            who(outside, node.address)
        with open_engine(node, intercept="auto"):
            assert who(outside, node.address) == b"rival"


def refuses(namespace: Namespace, host: str) -> bool:
    try:
        return not who(namespace, host)
    except ConnectionRefusedError:
        return True


def test_a_table_that_nobody_refreshes_stops_redirecting(node: Namespace, outside: Namespace) -> None:
    """Also one for an address of its own; and one that has expired already redirects again once it is refreshed."""
    exact = dataclasses.replace(tcp(PORT), address=ipaddress.ip_address(node.address))
    with rival(node), node.entered():
        for frontend in (tcp(PORT), exact):
            table = NftTable(table_name(STATE), lifetime=3.0)
            table.replace({frontend: 1})
            for _ in range(2):
                assert refuses(outside, node.address)
                wait_for(lambda: not refuses(outside, node.address))
                assert who(outside, node.address) == b"rival"
                table.refresh()
            table.delete()


def test_the_engine_refreshes_its_table(node: Namespace, outside: Namespace) -> None:
    """For as long as somebody keeps its tables: a wedged agent's redirection ends too."""
    front = tcp(PORT)
    with rival(node), open_engine(node, intercept="nft", orphan_timeout=3.0) as mesh:
        mesh.serve({front: {"a": says(b"mesh").where}})
        for _ in range(40):
            assert mesh.datapath.heartbeat()
            assert who(outside, node.address) == b"mesh"
            time.sleep(0.2)
        wait_for(lambda: who(outside, node.address) == b"rival")
        mesh.datapath.heartbeat()
        wait_for(lambda: who(outside, node.address) == b"mesh")


def test_nft_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DatapathError, match="nftables cannot be used"):
        ProxyDatapath(Config(intercept="nft")).open()


def test_more_connections_than_source_ports(node: Namespace, outside: Namespace) -> None:
    """Clients that end first leave the engine's ports towards the backend in TIME_WAIT; they are used again."""
    node.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40019", "net.ipv4.tcp_tw_reuse=0")
    front = tcp(PORT)
    with open_engine(node, intercept="bind") as mesh:
        server = TcpServer()
        mesh.serve({front: {"a": server.where}})
        for i in range(120):
            with outside.entered(), call(front, node.address) as sock:
                sock.sendall(b"%d" % i)
                assert sock.recv(10) == b"%d" % i
        now = mesh.quiet(front)
        assert (now.opened, now.failed) == (120, {})


@pytest.mark.parametrize("address", ["192.0.2.240", "2001:db8::240"])
def test_a_frontend_of_a_floating_address_waits_for_it(node: Namespace, outside: Namespace, address: str) -> None:
    frontend = Frontend(ipaddress.ip_address(address), PORT, Protocol.TCP)
    with node.entered():
        refusing = Interceptor("bind", docker_host=False, threads=1, table="mesh_test")
        with pytest.raises(DatapathError, match="floating_addresses"):
            refusing.listen(frontend)
        waiting = Interceptor(
            "bind", docker_host=False, threads=1, table="mesh_test", floating=frozenset({frontend.address})
        )
        (sock,) = waiting.listen(frontend).sockets
    with sock, outside.entered():
        node.add_address("eth0", f"{address}/{24 if '.' in address else 64}")
        socket.create_connection((address, PORT), timeout=PATIENCE).close()
