# SPDX-License-Identifier: Apache-2.0
"""Two nodes with the kernel engine: flows for the other's tasks go through the tunnel (picture: tunnel_pair.py)."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from mesh.datapath.paths.tunnel_probe import ask_tunnel, inner_nonce_of, listen_after_programs, question
from tests.engines.kernel_plane import PORT, TARGET, Connection, datagram, refused
from tests.engines.tunnel_pair import MEGABYTE, NODES, UDP, A, B, Pair
from tests.engines.tunnel_proofs import large_datagrams_arrive
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import PATIENCE, wait_for
from tests.support.sockets import IP_MTU_DISCOVER, IP_PMTUDISC_PROBE

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    with Lab() as lab:
        yield (pair := Pair(lab))
        pair.close()


@pytest.fixture
def pair(shared: Pair) -> Pair:
    """Both engines run, nobody drained or lost, the task `there` serves."""
    for node in (shared.a, shared.b):
        for device in ("eth0", "wire"):
            node.ip("link", "set", device, "up")
    shared.set_mtu(1500)
    shared.ensure()
    shared.serve("there")
    shared.wait_ways(1500)
    shared.client.ip("route", "flush", "cache")  # what it has learnt of the way to node a
    return shared


@pytest.mark.parametrize("mtu", [1500, 1400, 1280])
@pytest.mark.parametrize("back", ["direct", "tunnel"])
def test_streams_through_the_tunnel(pair: Pair, mtu: int, back: str) -> None:
    """Bulk in both directions at once, ends of either side, resets; the task sees the client's address."""
    pair.set_mtu(mtu)
    pair.ensure(back)
    pair.wait_ways(mtu)
    before = pair.verdicts(pair.a), pair.verdicts(pair.b)
    connection = Connection(pair.client, pair.a.address)
    assert (connection.backend, connection.seen) == ("there", pair.client.address)
    connection.echo(100_000)
    connection.close()
    pair.transfer(up=20 * MEGABYTE, down=20 * MEGABYTE)
    pair.transfer("-W", up=MEGABYTE, down=3 * MEGABYTE)
    pair.transfer("-w", up=3 * MEGABYTE, down=MEGABYTE)
    client, server = pair.ends(*pair.stream("-x", str(MEGABYTE), "-d", str(20 * MEGABYTE)))
    assert (client["end"], server["end"]) == ("we reset", "reset")
    client, server = pair.ends(*pair.stream("-X", str(MEGABYTE), "-u", str(20 * MEGABYTE)))
    assert (client["end"], server["end"]) == ("reset", "we reset")
    assert datagram(pair.client, pair.a.address, UDP) == f"there {pair.client.address}"
    grown = [
        {name for name, count in pair.verdicts(node).items() if count > was.get(name, 0)}
        for node, was in zip((pair.a, pair.b), before, strict=True)
    ]
    if back == "tunnel":
        assert grown == [{"tunnel_tx", "tunnel_reply_rx"}, {"tunnel_rx", "tunnel_reply_tx"}]
    else:
        assert grown == [{"tunnel_tx"}, {"tunnel_rx", "tunnel_direct"}]
    assert pair.drivers[pair.a].problems() == pair.drivers[pair.b].problems() == []


@pytest.mark.parametrize("takes", [1500, 1300])
@pytest.mark.parametrize("mtu", [1500, 1400])
@pytest.mark.parametrize("back", ["direct", "tunnel"])
def test_large_datagrams_without_df(pair: Pair, back: str, mtu: int, takes: int) -> None:
    """Links to the client that take more than the tunnel, and less."""
    pair.set_mtu(mtu)
    pair.ensure(back)
    pair.wait_ways(mtu)
    before = cut(pair)
    large_datagrams_arrive(pair, takes)
    near, far = (after - former for after, former in zip(cut(pair), before, strict=True))
    assert (near > 0, far > 0) == (back == "tunnel" or takes == 1500, back == "tunnel" or takes == 1300)


def cut(pair: Pair) -> list[int]:
    return [pair.drivers[node].stats()["verdicts"]["fragmented"] for node in (pair.a, pair.b)]


def test_answers_to_trials_reach_their_socket_and_nobody_else(pair: Pair) -> None:
    """Traffic that the programs forward does not come by, and IP takes no answer for its own."""

    def taken_by_ip() -> list[str]:
        shown = pair.a.run("nstat", "-asz", "IpForwDatagrams", "IpInAddrErrors", "IpInNoRoutes")
        return shown.stdout.splitlines()

    port, before, taken = 40001, pair.verdicts(pair.a), taken_by_ip()
    with pair.a.entered():
        heard = listen_after_programs(port)
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with heard, sender:
        pair.stream("-u", str(MEGABYTE), "-d", str(MEGABYTE))
        heard.setblocking(False)
        with pytest.raises(BlockingIOError):
            heard.recv(2048)
        sender.bind((A, 0))
        heard.settimeout(20)
        for nonce in (0x01020304, 0x05060708):
            sender.sendto(question(port, nonce), (B, 6084))
            assert inner_nonce_of(heard.recv(2048)) == nonce.to_bytes(4, "big")
    grown = {name for name, count in pair.verdicts(pair.a).items() if count > before.get(name, 0)}
    assert grown >= {"tunnel_trial"} and not grown & {"tunnel_invalid"}
    assert taken_by_ip() == taken


def test_checksums_and_segments_are_right_on_the_wire(pair: Pair) -> None:
    """Nothing is left to offload on the nodes, so that receivers verify what was sent."""
    devices = [(node, device) for node in (pair.a, pair.b) for device in ("eth0", "wire", "veth1")]
    switch = ("tx", "tso", "gso")
    for node, device in devices:
        node.run("ethtool", "-K", device, *(word for name in switch for word in (name, "off")))
    try:
        pair.transfer(up=5 * MEGABYTE, down=5 * MEGABYTE)
        assert datagram(pair.client, pair.a.address, UDP) == f"there {pair.client.address}"
    finally:
        for node, device in devices:
            node.run("ethtool", "-K", device, *(word for name in switch for word in (name, "on")))


def test_shares_of_both_nodes(pair: Pair) -> None:
    """Both nodes give every flow to the same task."""
    pair.serve("here", "there")
    for node in (pair.a, pair.b):
        connections = [Connection(pair.client, node.address) for _ in range(40)]
        assert {c.backend for c in connections} == {"here", "there"}
        assert {c.seen for c in connections} == {pair.client.address}
        for connection in connections:
            connection.echo()
            connection.close()


def test_callers_that_the_tunnel_does_not_take(pair: Pair) -> None:
    """Clients of IPv6, processes of the node and its containers: the proxy engines beside hand their flows over."""
    local = [(pair.a, "127.0.0.1"), (pair.a, pair.a.address), (pair.tasks["here"][0], pair.a.address)]
    for caller, address in (*local, (pair.client, pair.a.address6)):
        for _ in range(3):
            connection = Connection(caller, address)
            assert connection.backend == "there"
            connection.echo(50_000)
            connection.close()
    pair.serve("here", "there")
    for caller, address in (*local, (pair.client, pair.a.address6)):
        assert {connect(caller, address) for _ in range(30)} == {"here", "there"}


def connect(caller: Namespace, address: str) -> str:
    connection = Connection(caller, address)
    connection.echo()
    connection.close()
    return connection.backend


CALLS = 200
SPREAD = 5 * (CALLS * 2 / 9) ** 0.5  # five standard deviations of a share of a third


def udp_answer(caller: Namespace, address: str) -> str:
    """Who answers a connected datagram socket."""
    with caller.entered(), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(PATIENCE)
        s.connect((address, UDP))
        s.send(b"hello")
        return s.recv(100).decode().split()[0]


def with_a_second_task_there(pair: Pair) -> None:
    if "also" not in pair.tasks:
        pair.tasks["also"] = pair.task("also", pair.b, 2)


def test_calls_of_a_node_make_one_draw_and_count_once(pair: Pair) -> None:
    """A third of the tasks is here, so a third of the node's own calls is theirs, whatever the address and protocol."""
    with_a_second_task_there(pair)
    pair.serve("here", "there", "also")
    streams = [lambda to=to: connect(pair.a, to) for to in ("127.0.0.1", pair.a.address, pair.a.address6)]
    datagrams = [lambda to=to: udp_answer(pair.a, to) for to in ("127.0.0.1", "::1")]
    unconnected = [lambda: datagram(pair.a, "127.0.0.1", UDP).split()[0]]
    for port, protocol, calls in ((PORT, "tcp", streams), (UDP, "udp", datagrams + unconnected)):
        name = f"*:{port}/{protocol}"
        before = pair.drivers[pair.a].stats()["frontends"][name]["opened"]
        for call in calls:
            found = Counter(call() for _ in range(CALLS))
            assert all(abs(found[task] - CALLS / 3) < SPREAD for task in ("here", "there", "also")), found
        counted, made = pair.drivers[pair.a].stats()["frontends"][name]["opened"] - before, len(calls) * CALLS
        assert 0.95 * made < counted <= made  # none of them twice


def test_calls_of_a_node_do_not_go_where_its_peer_port_is_not_answered(pair: Pair) -> None:
    """The tunnel carries clients' flows there all the same."""
    with_a_second_task_there(pair)
    pair.serve("here", "there", "also")
    backends = {name: [B, TARGET, 1] for name in ("there", "also")}
    local = {"here": [pair.tasks["here"][0].address, TARGET, 1]}
    service = {"name": "s", "published": PORT, "backends": backends | local, "unhanded": ["there", "also"]}
    pair.b.run(
        "nft",
        "add table inet shut; add chain inet shut in { type filter hook input priority 0; };"
        " add rule inet shut in tcp dport 9552 drop",
    )
    try:
        pair.drivers[pair.a].serve(services=[service], nodes=list(NODES))
        for address in ("127.0.0.1", pair.a.address, "::1"):
            assert {connect(pair.a, address) for _ in range(30)} == {"here"}
        assert {connect(pair.client, pair.a.address) for _ in range(40)} == {"here", "there", "also"}
        pair.drivers[pair.a].serve(services=[service | {"backends": backends}], nodes=list(NODES))
        assert {connect(pair.client, pair.a.address) for _ in range(30)} == {"there", "also"}
        with pair.a.entered(), pytest.raises(ConnectionRefusedError):  # at once, and where Docker's own mesh would be
            socket.create_connection(("127.0.0.1", PORT), timeout=PATIENCE)
    finally:
        pair.b.run("nft", "delete table inet shut")


def test_tasks_come_and_go_on_the_other_node(pair: Pair) -> None:
    with_a_second_task_there(pair)
    pair.serve("here", "there", "also")
    connections = [Connection(pair.client, pair.a.address) for _ in range(60)]
    assert {c.backend for c in connections} == {"here", "there", "also"}
    pair.serve("here", "there", "also", drained=("there",))
    assert "there" not in {connect(pair.client, pair.a.address) for _ in range(30)}
    for connection in connections:
        connection.echo()
    pair.serve("here", "also")
    for connection in connections:
        if connection.backend == "there":
            with pytest.raises((ConnectionError, AssertionError)):
                for _ in range(3):
                    connection.echo()
        else:
            connection.echo()
    assert {connect(pair.client, pair.a.address) for _ in range(30)} == {"here", "also"}


def test_a_task_that_its_node_does_not_know_any_more_resets(pair: Pair) -> None:
    """The caller's node has not heard yet that the task is gone."""
    connection = Connection(pair.client, pair.a.address)
    driver = pair.drivers.pop(pair.a)
    pair.serve("here")
    pair.drivers[pair.a] = driver
    with pytest.raises(ConnectionResetError):
        connection.echo()
    assert pair.verdicts(pair.b)["tunnel_no_backend"] > 0


def test_a_node_that_is_lost(pair: Pair) -> None:
    pair.serve("here", "there")
    connections = [Connection(pair.client, pair.a.address) for _ in range(40)]
    pair.b.ip("link", "set", "wire", "down")
    pair.b.ip("link", "set", "eth0", "down")
    lost = pair.drivers.pop(pair.b)
    lost.kill()
    pair.serve("here", "there", drained=("there",))
    assert {connect(pair.client, pair.a.address) for _ in range(30)} == {"here"}
    for connection in connections:
        if connection.backend == "here":
            connection.echo()


@pytest.mark.parametrize("which", ["a", "b"])
def test_flows_outlive_the_agent_of_either_node(pair: Pair, which: str) -> None:
    """Killed in the middle of a transfer; what the next one adopts is what the first had applied."""
    node = getattr(pair, which)
    connection = Connection(pair.client, pair.a.address)
    before = pair.verdicts(pair.b).get("tunnel_rx", 0)
    stream, tag = pair.stream("-s", "-u", str(20 * MEGABYTE), "-d", str(20 * MEGABYTE))
    wait_for(lambda: pair.verdicts(pair.b).get("tunnel_rx", 0) > before + 100, "the transfer is under way")
    pair.drivers[node].kill()
    connection.echo()
    pair.start(node)
    connection.echo()
    pair.serve("there")
    connection.echo()
    pair.serve("here", "there")
    connection.echo()
    stream.resume()
    client, server = pair.ends(stream, tag)
    assert (client["end"], client["corrupt_at"]) == (server["end"], server["corrupt_at"]) == ("complete", -1)
    assert {connect(pair.client, pair.a.address) for _ in range(30)} == {"here", "there"}


def test_another_contract_keeps_flows_through_the_tunnel(pair: Pair) -> None:
    connection = Connection(pair.client, pair.a.address)
    connection.echo()
    for node in (pair.a, pair.b):
        pair.drivers[node].kill()
    for home in (pair.bpffs / "mesh").iterdir():
        (old,) = home.iterdir()
        old.rename(home / f"{old.name.partition('-')[0]}-0123456789abcdef")  # stands for a build with other headers
    connection.echo()
    for node in (pair.a, pair.b):
        pair.start(node)
        connection.echo()
    pair.serve("there")
    connection.echo()


def test_only_nodes_of_the_cluster_are_listened_to(pair: Pair) -> None:
    before = pair.verdicts(pair.b).get("tunnel_foreign", 0)
    with pair.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(3):
            sock.sendto(bytes(100), (pair.b.address, 6084))
    wait_for(lambda: pair.verdicts(pair.b).get("tunnel_foreign", 0) >= before + 3, "counted")
    pair.serve("here", nodes=(A,))
    with pair.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect((pair.a.address, 6084))
        sock.send(bytes(100))
        with pytest.raises(ConnectionRefusedError):  # nobody is there, and the port is the host's again
            sock.recv(100)


def test_a_probe_is_answered_through_the_tunnel(pair: Pair) -> None:
    """Between nodes that know each other, by either IP version; by nobody else, and at no other port."""
    a6, b6 = "2001:db8:99::1", "2001:db8:99::2"
    for node, address in ((pair.a, a6), (pair.b, b6)):
        node.add_address("wire", f"{address}/64")
    pair.serve("there", nodes=(*NODES, a6, b6))
    before = pair.verdicts(pair.b)
    with pair.a.entered():
        for there, here in ((B, A), (b6, a6)):
            wait_for(lambda to=there, at=here: not ask_tunnel(ip_address(to), ip_address(at), 6084), f"{there} answers")
        assert ask_tunnel(ip_address(B), ip_address(pair.a.address), 6084) == "no answer"
        assert ask_tunnel(ip_address(B), ip_address(A), 6085) == "nobody listens"
    counted = {name: n - before.get(name, 0) for name, n in pair.verdicts(pair.b).items()}
    assert {name for name, n in counted.items() if n} == {"tunnel_no_backend", "tunnel_foreign"}


def test_a_node_that_leaves_answers_no_trial_and_serves_on(pair: Pair) -> None:
    """Its next agent answers again."""
    pair.serve("there")
    pair.drivers[pair.b].leave()
    with pair.a.entered():
        assert ask_tunnel(ip_address(B), ip_address(A), 6084) == "no answer"
    connection = Connection(pair.client, pair.a.address)
    connection.echo()
    assert connection.backend == "there"
    pair.drivers[pair.b].kill()
    pair.start(pair.b)
    with pair.a.entered():
        assert ask_tunnel(ip_address(B), ip_address(A), 6084) == ""
    connection.echo()


def test_a_frontend_that_the_tunnel_hides_is_a_problem(pair: Pair) -> None:
    service = {"name": "hidden", "published": 6084, "protocol": "udp", "backends": {"there": [B, TARGET, 1]}}
    driver = pair.drivers[pair.a]
    driver.serve(services=[service], nodes=list(NODES))
    (line,) = driver.problems()
    assert line.startswith("*:6084/udp: not served") and "tunnel_port" in line
    driver.serve(services=[], nodes=list(NODES))
    assert driver.problems() == []


def test_a_smaller_way_is_followed(pair: Pair) -> None:
    """As routers tell of it, or an operator: the route's MTU counts, not the interface's."""
    connection = Connection(pair.client, pair.a.address)
    for node, other in ((pair.a, B), (pair.b, A)):
        node.ip("route", "replace", f"{other}/32", "dev", "wire", "mtu", "1300")
    pair.wait_ways(1300)
    with pair.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: IP_PMTUDISC_DO
        sock.connect((pair.a.address, UDP))
        sock.send(bytes(1260))

        def told() -> bool:
            return sock.getsockopt(socket.IPPROTO_IP, 14) == 1300 - 64  # IP_MTU

        wait_for(told, "the client is told how much fits")
    connection.echo(100_000)
    pair.transfer(up=3 * MEGABYTE, down=3 * MEGABYTE)
    for node, other in ((pair.a, B), (pair.b, A)):
        node.ip("route", "del", f"{other}/32", "dev", "wire", "mtu", "1300")


def test_datagrams_that_fit_no_path_are_named(pair: Pair) -> None:
    """Who sets DF and ignores what it is told goes on to send them."""
    driver = pair.drivers[pair.a]
    assert driver.problems() == []
    with pair.client.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
        for _ in range(5):
            sock.sendto(bytes(1472), (pair.a.address, UDP))
    (said,) = wait_for(driver.problems, "it is named")
    assert said.startswith(f"service s{UDP}, *:{UDP}/udp: datagrams that may not be cut are larger than the path")


def test_nodes_with_the_proxy_engine_get_flows_at_their_peer_port(pair: Pair) -> None:
    """Here the other node has both; what it is said to have decides."""
    services = [{"name": "s", "published": PORT, "backends": {"there": [B, TARGET, 1]}, "engine": "proxy"}]
    before = pair.verdicts(pair.a).get("tunnel_tx", 0)
    pair.drivers[pair.a].serve(services=services, nodes=list(NODES))
    wait_for(lambda: not refused(pair.client, pair.a.address), "served")
    assert connect(pair.client, pair.a.address) == "there"
    assert pair.verdicts(pair.a).get("tunnel_tx", 0) == before
