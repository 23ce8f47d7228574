# SPDX-License-Identifier: Apache-2.0
"""The kernel engine's pure parts: source rules, ranges of arenas, names, which program goes where."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import netaddr
from mesh._abi import ACL_ALLOW, ACL_DENY
from mesh._maglev import SlotTable
from mesh.agent.lock import Lock
from mesh.config.keys import Config
from mesh.datapath.base import Applied, BackendEntry, BackendKey, FrontendEntry, Plan
from mesh.datapath.kernel.acl import compile_rules
from mesh.datapath.kernel.arenas import Ranges
from mesh.datapath.kernel.fallback import needed
from mesh.datapath.kernel.journal import SPARE, Journal, Names
from mesh.datapath.kernel.locator import (
    ASK_LASTS,
    ASK_MOST,
    BARE,
    BARE_GUARD,
    BRIDGE,
    BRIDGE_GUARD,
    GUARD,
    INGRESS,
    READ_AGAIN,
    TASK,
    Location,
    Locator,
    keepers,
    unserved,
    wanted,
)
from mesh.datapath.kernel.pins import OWNER, Owner, instance
from mesh.datapath.kernel.preflight import preflight
from mesh.datapath.netlink import Interface, Netlink, Networks, Route, Topology
from mesh.errors import MeshError
from mesh.model import (
    ANY_ADDRESS,
    Address,
    Affinity,
    Frontend,
    FrontendState,
    HealthCheck,
    Locality,
    Network,
    ProbeKind,
    Protocol,
    ProxyProtocol,
    ServiceOptions,
    Target,
)


def networks() -> st.SearchStrategy[Network]:
    four = st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.ip_addresses(v=4), st.integers(0, 32))
    six = st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.ip_addresses(v=6), st.integers(0, 128))
    return st.one_of(four, six)


def longest_match(rules: Sequence[tuple[Network, int]], source: bytes, default: int) -> int:
    """What the trie answers: the longest prefix on the 16-byte address."""
    best, answer = -1, default
    number = int.from_bytes(source, "big")
    for network, action in rules:
        length = network.prefixlen + (96 if network.version == 4 else 0)
        base = int.from_bytes(netaddr.pack(network.network_address), "big")
        if length > best and number >> (128 - length) == base >> (128 - length):
            best, answer = length, action
    return answer


@given(st.lists(networks(), max_size=5), st.lists(networks(), max_size=5), st.data())
def test_longest_match_decides_as_the_lists_do(allow: list[Network], deny: list[Network], data: st.DataObject) -> None:
    inside = [n.network_address for n in (*allow, *deny)] + [n.broadcast_address for n in (*allow, *deny)]
    source = data.draw(
        st.one_of(st.ip_addresses(), *([st.sampled_from(inside)] if inside else [])).filter(
            lambda a: a.version == 4 or a.ipv4_mapped is None  # type: ignore[union-attr]
        )
    )
    rules = compile_rules(allow, deny)
    assert len(dict(rules)) == len(rules)
    expected = not any(source in n for n in deny) and (not allow or any(source in n for n in allow))
    found = longest_match(rules, netaddr.pack(source), ACL_DENY if allow else ACL_ALLOW)
    assert (found == ACL_ALLOW) is expected


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_ranges_never_overlap_and_come_back(steps: list[tuple[bool, int]]) -> None:
    ranges, taken = Ranges(256), []
    for give, length in steps:
        if give and taken:
            ranges.give(*taken.pop(length % len(taken)))
        elif (start := ranges.take(length)) is not None:
            taken.append((start, length))
        slots = sorted(s for start, n in taken for s in range(start, start + n))
        assert len(slots) == len(set(slots)) == 256 - ranges.free
        assert not slots or (slots[0] >= 0 and slots[-1] < 256)
    for each in taken:
        ranges.give(*each)
    assert ranges.take(256) == 0


def test_ranges_are_claimed_once() -> None:
    ranges = Ranges(100)
    assert ranges.claim(10, 20)
    assert not ranges.claim(29, 2)
    assert ranges.claim(30, 70)
    assert not ranges.claim(99, 2)
    assert [ranges.take(10), ranges.take(1)] == [0, None]


def state(frontend: Frontend, *targets: Target) -> FrontendState:
    options = ServiceOptions(
        affinity=Affinity.CLIENT_IP,
        proxy_protocol=ProxyProtocol.V2,
        health=HealthCheck(ProbeKind.HTTP, "/x", 1.5, 0.5, 1, 2),
        table_size=1021,
        locality=Locality.LOCAL_FIRST,
        allow=(ipaddress.ip_network("10.0.0.0/8"),),
        deny=(ipaddress.ip_network("fd00::/8"),),
    )
    return FrontendState(frontend, "id", "web", options, targets, panic=True)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """No file can grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_directory_without_room_keeps_nobody_from_starting(tmp_path: Path) -> None:
    with no_room():
        lock = Lock.acquire(tmp_path)
    with pytest.raises(MeshError, match="pid unknown"):
        Lock.acquire(tmp_path)
    lock.close()


def test_names_come_back(tmp_path: Path) -> None:
    target = Target("task", ipaddress.ip_address("172.18.0.3"), 80, 2, True, "node", "container")
    entry = BackendEntry(7, BackendKey("task", 80, 6), target)
    frontend = state(Frontend(ANY_ADDRESS, 8000, Protocol.TCP), target)
    served = FrontendEntry(frontend, SlotTable.uniform(1021, 7), (7,))
    path = tmp_path / "names.json"
    names = Journal(path)
    assert names.read().backends == {}
    held = Applied(4)
    names.put(Plan(5, put_backends=(entry,), put_frontends=(served,)), held)
    found = Journal(path).read()
    assert (found.generation, found.backends, found.frontends) == (5, {7: entry}, {frontend.frontend: frontend})
    changed = dataclasses.replace(entry, target=dataclasses.replace(target, weight=0))
    names.put(step := Plan(6, put_backends=(changed,), drop_frontends=(frontend.frontend,)), held)
    assert Journal(path).read().frontends  # until it is dropped indeed
    names.finish(step)
    assert names.read() == Names(6, {7: changed}, {})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"generation":7,"backends":[[1')  # the process was killed as it wrote
    assert names.read() == Names(6, {7: changed}, {})
    path.write_bytes(whole)
    for generation in range(7, 2000):
        names.put(Plan(generation, put_backends=(entry if generation % 2 else changed,)), held)
    assert names.read() == Names(1999, {7: entry}, {})
    assert path.stat().st_size < 2 * SPARE
    nodes = (ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1"))
    names.put(Plan(1999, put_nodes=nodes), held)
    assert Journal(path).read() == Names(1999, {7: entry}, {}, nodes)
    with no_room():
        names.put(Plan(2000, put_backends=(entry,)), held)
        assert "cannot be written" in names.problem and not path.exists()  # no old names beside new maps
        names.put(Plan(2001, put_backends=(changed,)), Applied(2000, nodes=nodes))
    names.put(Plan(1999, put_backends=(entry,)), Applied(2001, nodes=nodes))
    assert names.problem == ""
    assert Journal(path).read() == Names(1999, {7: entry}, {}, nodes)
    path.unlink()  # by whoever
    names.finish(Plan(2000, drop_backends=(entry,)))
    assert names.read() == Names(2000, nodes=nodes)


def test_what_was_named_and_not_confirmed_is_in_doubt(tmp_path: Path) -> None:
    target = Target("task", ipaddress.ip_address("172.18.0.3"), 80, 2, True, "node", "container")
    entry = BackendEntry(7, BackendKey("task", 80, 6), target)
    moved = dataclasses.replace(entry, target=dataclasses.replace(target, address=ipaddress.ip_address("172.18.0.4")))
    frontends = [state(Frontend(ANY_ADDRESS, port, Protocol.TCP), target) for port in (8000, 8001)]
    one, two = (FrontendEntry(each, SlotTable.uniform(1021, 7), (7,)) for each in frontends)
    journal = Journal(tmp_path / "names.json")

    def doubt() -> tuple[set[int], set[int], set[int]]:
        found = Journal(tmp_path / "names.json").read().doubt
        return found.backends, {f.port for f in found.frontends}, set(found.former)

    first = Plan(1, put_backends=(entry,), put_frontends=(one, two))
    journal.put(first, Applied())
    assert doubt() == ({7}, {8000, 8001}, set())
    journal.finish(first)
    assert doubt() == (set(), set(), set())
    second = Plan(2, put_backends=(moved,), drop_frontends=(one.state.frontend,))
    journal.put(second, Applied(1))
    assert doubt() == ({7}, {8000}, {7})
    assert Journal(tmp_path / "names.json").read().doubt.former == {7: entry}
    journal.finish(second, sure=False)
    assert doubt()[0] == {7}
    third = Plan(3, put_frontends=(two,))
    journal.put(third, Applied(2))
    journal.finish(third)
    assert doubt() == (set(), set(), set())
    for generation in range(4, 2000):  # also where the file is written anew meanwhile
        step = Plan(generation, put_backends=(entry if generation % 2 else moved,))
        journal.put(step, Applied())
        assert generation % 97 or doubt()[0] == {7}
        journal.finish(step)
        assert generation % 97 or doubt()[0] == set()
    assert (tmp_path / "names.json").stat().st_size < 2 * SPARE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1, "backends": [[1]]}', "null"])
def test_damaged_names_are_no_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.json").write_text(text)
    assert Journal(tmp_path / "names.json").read().backends == {}


def interfaces(*rows: tuple[int, str, str, int]) -> Topology:
    found = {index: Interface(index, name, kind, True, name != "lo", master) for index, name, kind, master in rows}
    return Topology(interfaces=found)


def test_programs_go_where_they_belong() -> None:
    topology = interfaces(
        (1, "lo", "", 0),
        (2, "eth0", "", 0),
        (3, "docker_gwbridge", "bridge", 0),
        (4, "veth1", "veth", 3),
        (5, "veth2", "veth", 3),
        (6, "docker0", "bridge", 0),
        (7, "veth3", "veth", 6),
        (8, "bond0", "bond", 0),
        (9, "eth1", "", 8),
        (10, "eth0.5", "vlan", 0),
        (11, "br0", "bridge", 0),
        (12, "eth2", "", 11),
        (13, "tap0", "tun", 11),
    )
    places = [Location(veth=4, via=3)]
    everywhere = {2: INGRESS, 4: TASK, 5: TASK, 6: BRIDGE, 8: INGRESS, 10: INGRESS, 11: INGRESS}
    assert wanted(topology, places) == everywhere
    assert wanted(topology, places, nodes={6}) == everywhere | {6: INGRESS}
    assert wanted(topology, places, ["eth1"], {2}) == {2: INGRESS, 4: TASK, 5: TASK, 6: BRIDGE_GUARD, 9: INGRESS}
    assert wanted(topology, places, ["eth0*"]) == {2: INGRESS, 4: TASK, 5: TASK, 6: BRIDGE_GUARD, 10: INGRESS}
    assert 3 in wanted(topology, [])
    assert wanted(topology, [Location(via=1, own=True)]) == wanted(topology, [])


def test_interfaces_without_ethernet_have_programs_of_their_own() -> None:
    topology = interfaces((2, "eth0", "", 0), (3, "docker_gwbridge", "bridge", 0), (4, "docker0", "bridge", 0))
    bare = Interface(5, "wg0", "wireguard", True, False, 0, bare=True)
    odd = Interface(6, "ib0", "", True, False, 0)
    loopback = Interface(1, "lo", "", True, False, 0, loopback=True)
    every = Topology(interfaces={**topology.interfaces, 5: bare, 6: odd, 1: loopback})
    places = [Location(veth=9, via=3)]
    assert wanted(every, places) == {2: INGRESS, 4: BRIDGE, 5: BARE}
    assert wanted(every, places, guarded=True) == wanted(every, places)
    assert wanted(every, places, ["wg*"], guarded=True) == {2: GUARD, 4: BRIDGE_GUARD, 5: BARE}
    guarded = wanted(every, places, ["eth0"], guarded=True)
    assert guarded == {2: INGRESS, 4: BRIDGE_GUARD, 5: BARE_GUARD}
    down = dataclasses.replace(bare, up=False)
    assert 5 not in wanted(Topology(interfaces={5: down}), [], ["eth0"], guarded=True)
    said = unserved(every.interfaces, guarded)
    assert [line.split()[1] for line in said] == ["docker0", "wg0", "ib0"]
    assert "left out by `interfaces`" in said[0]
    assert "link type is unknown" in said[2]
    assert [line.split()[1] for line in unserved(every.interfaces, wanted(every, places))] == ["ib0"]


def test_a_vlan_that_leaves_tags_in_frames_is_named() -> None:
    plain = interfaces((2, "eth0", "", 0), (3, "eth0.5", "vlan", 0))
    odd = dataclasses.replace(plain.interfaces[3], keeps_tags=True)
    programs = wanted(plain, [])
    assert keepers(plain.interfaces, programs) == []
    (line,) = keepers({2: plain.interfaces[2], 3: odd}, programs)
    assert line.startswith("interface eth0.5 is not served: ") and "ip link set eth0.5 type vlan reorder_hdr on" in line
    assert keepers({3: odd}, {2: INGRESS}) == []


def test_a_veth_by_which_a_backend_is_reached_is_a_tasks() -> None:
    topology = interfaces((2, "eth0", "", 0), (3, "v0", "veth", 0), (4, "client", "veth", 0))
    assert wanted(topology, [Location(veth=3, via=3)]) == {2: INGRESS, 3: TASK, 4: INGRESS}


def test_the_proxy_beside_serves_the_other_version() -> None:
    four = Target("a", ipaddress.ip_address("172.18.0.3"), 80, 1)
    six = Target("b", ipaddress.ip_address("fd00::3"), 80, 1)
    addresses = [ipaddress.ip_address(a) for a in ("192.0.2.1", "2001:db8::1", "fe80::1", "127.0.0.1", "::1")]

    def served(*targets: Target, address: str = "::") -> set[str]:
        frontend = Frontend(ipaddress.ip_address(address), 80, Protocol.TCP)
        entry = FrontendEntry(state(frontend, *targets), SlotTable.uniform(1021, 0), ())
        return {str(f.address) for f in needed(Applied(1, {frontend: entry}, {}), addresses)}

    assert served(four) == {"2001:db8::1"}
    assert served(six) == {"192.0.2.1"}
    assert served(four, six) == {"192.0.2.1", "2001:db8::1"}
    assert served(four, address="192.0.2.9") == set()
    assert served(four, address="2001:db8::9") == {"2001:db8::9"}
    assert served() == set()
    for own in ("192.0.2.1", "127.0.0.1"):  # a backend of this node itself: whatever version the client speaks
        assert served(Target("c", ipaddress.ip_address(own), 80, 1)) == {"192.0.2.1", "2001:db8::1"}
    away = Target("c", ipaddress.ip_address("192.0.2.2"), 80, 1, local=False, via=ipaddress.ip_address("192.0.2.2"))
    assert served(four, away) == {"::"}
    assert served(away, address="192.0.2.9") == {"192.0.2.9"}
    unhanded = dataclasses.replace(away, handed=False)  # Docker's own mesh gets what would be handed over
    assert served(four, away, unhanded) == {"::"}
    assert served(unhanded) == served(four)


def test_instances_differ_by_state_directory(tmp_path: Path) -> None:
    one, other = Config(state_dir=str(tmp_path / "a")), Config(state_dir=str(tmp_path / "b"))
    assert instance(one) == instance(one) != instance(other)


def test_the_demo_is_not_for_the_kernel_engine() -> None:
    assert "demo" in (preflight(Config(provider="demo")) or "")


class _Network:
    """What `Locator` asks of a Netlink: tables that a test sets, and the questions that were put."""

    def __init__(self, topology: Topology, ways: dict[str, Route]) -> None:
        self.tables, self.ways, self.asked = topology, ways, list[str]()

    def topology(self) -> Topology:
        return self.tables

    def route(self, address: Address) -> Route | None:
        return self.ways.get(str(address))

    def resolve(self, interface: int, address: Address, *, anew: bool = False) -> None:
        self.asked.append(str(address))


def test_what_has_not_changed_is_not_looked_for_again() -> None:
    """10,000 backends of which many do not answer: an event that changes nothing must not cost a look at all."""
    bridge = Interface(2, "docker_gwbridge", "bridge", True, True, 0)
    network = _Network(Topology({2: bridge}), {"10.0.0.1": Route(2, None, False)})
    places = Locator(cast(Netlink, network))
    assert places.refresh()
    silent, unreached = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.9.0.1")
    assert places.find(silent) == Location(via=2)
    assert places.find(unreached) == Location()
    assert network.asked == ["10.0.0.1"]
    assert not places.refresh()
    assert places.open() == {unreached}  # the other one has just been asked for
    network.ways["10.9.0.1"] = Route(2, None, False)
    places.find(unreached)
    assert places.open() == frozenset()
    network.tables = Topology({2: bridge}, neighbours={(2, silent): b"\x02abcde"})
    assert places.refresh()
    assert places.find(silent) == Location(via=2, mac=b"\x02abcde")


class _Namespaces:
    """What `Locator` asks of Networks."""

    def __init__(self) -> None:
        self.of_each = {7: frozenset({ipaddress.ip_network("10.0.1.0/24")})}
        self.asked = list[tuple[int, int]]()

    def of(self, elsewhere: int, version: int) -> frozenset[Network]:
        self.asked.append((elsewhere, version))
        return self.of_each.get(elsewhere, frozenset())


def test_the_networks_of_a_task_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing announces a network that a container gets while it runs. Of one behind no veth nobody knows."""
    clock = [1000.0]
    monkeypatch.setattr("mesh.datapath.kernel.locator.time.monotonic", lambda: clock[0])
    one, other, here = (ipaddress.ip_address(f"172.18.0.{i}") for i in (3, 4, 1))
    bridge = Interface(2, "docker_gwbridge", "bridge", True, True, 0)
    port = Interface(3, "veth1", "veth", True, True, 2, elsewhere=7)
    macs = {(2, one): b"\x02abcde", (2, other): b"\x02abcdf"}
    topology = Topology({2: bridge, 3: port}, neighbours=macs, ports={(2, b"\x02abcde"): 3})
    network, namespaces = _Network(topology, {str(a): Route(2, None, False, here) for a in (one, other)}), _Namespaces()
    places = Locator(cast(Netlink, network), networks=cast(Networks, namespaces))
    places.refresh()
    found = Location(3, 2, b"\x02abcde", networks=namespaces.of_each[7], source=here)
    assert [places.find(one), places.find(one)] == [found, found]
    assert places.find(other) == Location(0, 2, b"\x02abcdf")
    assert namespaces.asked == [(7, 4)]
    clock[0] += READ_AGAIN / 2
    assert one not in places.open()
    clock[0] += READ_AGAIN / 2
    namespaces.of_each[7] |= {ipaddress.ip_network("10.0.2.0/24")}
    assert one in places.open()
    assert places.find(one).networks == namespaces.of_each[7]
    places.forget([one])
    clock[0] += READ_AGAIN
    assert one not in places.open()


def test_questions_that_nobody_answers_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour table is one for all network namespaces: when it was full of ours, others' packets were lost."""
    clock = [1000.0]
    monkeypatch.setattr("mesh.datapath.kernel.locator.time.monotonic", lambda: clock[0])
    addresses = [ipaddress.ip_address(f"10.0.{i // 250}.{1 + i % 250}") for i in range(30 * ASK_MOST)]
    bridge = Interface(2, "docker_gwbridge", "bridge", True, True, 0)
    network = _Network(Topology({2: bridge}), {str(a): Route(2, None, False) for a in addresses})
    places = Locator(cast(Netlink, network))

    def asked() -> int:
        before = len(network.asked)
        for address in places.open():
            places.find(address)
        return len(network.asked) - before

    places.refresh()
    for address in addresses:
        places.find(address)
    assert len(network.asked) == ASK_MOST
    clock[0] += 1
    assert asked() == 0  # the kernel still waits for the first ones
    while len(network.asked) < len(addresses):
        clock[0] += ASK_LASTS
        assert asked() == ASK_MOST
    assert set(network.asked) == set(map(str, addresses))  # nobody twice before all were once
    network.tables = Topology({2: bridge}, neighbours={(2, a): b"\x02abcde" for a in addresses})
    assert places.refresh()
    assert all(places.find(a) == Location(via=2, mac=b"\x02abcde") for a in addresses[:10])


def test_the_maps_have_one_writer(tmp_path: Path) -> None:
    first, second = Owner(tmp_path), Owner(tmp_path)
    assert first.is_ours() and not first.is_another()
    first.claim()
    assert first.is_ours() and not second.is_ours()
    second.claim()
    assert second.is_ours() and not first.is_ours()
    assert not first.is_another()  # this very process
    (tmp_path / OWNER).write_text(f"{os.getppid()} 1")
    assert first.is_another()
    (tmp_path / OWNER).write_text("no number")
    assert not first.is_another()
    first.remove()
    assert first.is_ours()


def test_a_writer_without_room_leaves_no_other_ones_name(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    (tmp_path / OWNER).write_text("1 1")
    with no_room():
        owner.claim()
    assert owner.is_ours()
