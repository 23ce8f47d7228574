# SPDX-License-Identifier: Apache-2.0
"""The XDP stage: what it drops and what it leaves alone; attached in native mode, and only so."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q
from scapy.packet import Packet

from mesh import _bpf
from mesh.datapath.kernel import xdp
from mesh.datapath.kernel.locator import INGRESS, TASK
from mesh.datapath.netlink import Interface, Netlink
from mesh.errors import BpfError
from tests.bpf.plane import ALLOW_RULE, CLIENT, DENY, DENY_RULE, SHOT, UDP, Plane
from tests.bpf.wires import inside
from tests.oracle import frames as frames_model
from tests.support.frames import CLIENT4, CLIENT6, ETHER, IP, NODE4, NODE6, TCP, Ether, IPv6, datagram, segment
from tests.support.polling import PATIENCE

pytestmark = [pytest.mark.root, pytest.mark.bpf]

DROP, PASS = 1, 2
NEAR4, FAR4, ELSEWHERE4 = CLIENT4, "203.0.113.9", "192.0.2.77"


@pytest.fixture
def plane() -> Plane:
    """Port 80 denies 198.51.100.0/24 and 2001:db8:9::/48; 81 allows them only; 82 has no rules; 53 as 80, by UDP."""
    plane = Plane.fresh("ingress", "xdp")
    plane.local(NODE4, NODE6)
    for net in ("198.51.100.0/24", "2001:db8:9::/48"):
        plane.rule(1, net, DENY_RULE)
        plane.rule(2, net, ALLOW_RULE)
    plane.frontend(1, 80, [(0, 0)], acl=1)
    plane.frontend(2, 81, [(0, 0)], acl=2, flags=DENY | CLIENT)
    plane.frontend(3, 82, [(0, 0)])
    plane.frontend(4, 53, [(0, 0)], acl=1, protocol=UDP)
    plane.frontend(5, 83, [(0, 0)], acl=1, address="192.0.2.5")
    return plane


def run(plane: Plane, frame: Packet | bytes) -> int:
    """The verdict; no byte may have changed."""
    raw = bytes(frame)
    result = plane.programs["mesh_xdp"].test_run(raw)
    assert result.data == raw
    return result.retval


DENIED = [
    segment(NEAR4, 1000, NODE4, 80),
    segment(NEAR4, 1000, NODE4, 80, "A", b"data"),
    segment(NEAR4, 1000, NODE4, 80, "R"),
    segment(CLIENT6, 1000, NODE6, 80),
    segment(FAR4, 1000, NODE4, 81),
    segment("2001:db8:8::1", 1000, NODE6, 81),
    segment(NEAR4, 1000, NODE4, 80, options=[b"\x01\x01\x01\x00"]),
    segment(NEAR4, 1000, "192.0.2.5", 83),
    datagram(NEAR4, 1000, NODE4, 53),
    datagram(CLIENT6, 1000, NODE6, 53),
]


@pytest.mark.parametrize("frame", DENIED, ids=lambda frame: frame.summary()[8:])
def test_denied_sources_are_dropped_as_behind_it(plane: Plane, frame: Packet) -> None:
    assert run(plane, frame) == DROP
    assert plane.verdicts() == {"DENIED": 1}
    assert plane.run("mesh_ingress", bytes(frame)).retval == SHOT
    assert plane.verdicts() == {"DENIED": 2}


PASSED = {
    "allowed": segment(FAR4, 1000, NODE4, 80),
    "allowed 6": segment("2001:db8:8::1", 1000, NODE6, 80),
    "allowed by list": segment(NEAR4, 1000, NODE4, 81),
    "no rules": segment(NEAR4, 1000, NODE4, 82),
    "no frontend": segment(NEAR4, 1000, NODE4, 8080),
    "other protocol": datagram(NEAR4, 1000, NODE4, 80),
    "other address": segment(NEAR4, 1000, ELSEWHERE4, 80),
    "other address of an exact frontend": segment(NEAR4, 1000, NODE4, 83),
    "tagged": Ether(dst="02:00:00:00:00:02") / Dot1Q(vlan=7) / segment(NEAR4, 1000, NODE4, 80)[IP],
    "multicast": Ether(dst="01:00:5e:00:00:01") / segment(NEAR4, 1000, NODE4, 80)[IP],
    "first fragment": segment(NEAR4, 1000, NODE4, 80, frag=0, proto=6) / b"x",
    "further fragment": ETHER / IP(src=NEAR4, dst=NODE4, proto=6, frag=100) / TCP(dport=80),
    "fragment 6": ETHER / IPv6(src=CLIENT6, dst=NODE6) / IPv6ExtHdrFragment(nh=6, m=1) / TCP(dport=80),
    "ping": ETHER / IPv6(src=CLIENT6, dst=NODE6) / ICMPv6EchoRequest(),
    "arp": ETHER / ARP(psrc=NEAR4, pdst=NODE4),
    "data offset": ETHER / IP(src=NEAR4, dst=NODE4) / TCP(dport=80, dataofs=3),
    "total length": ETHER / IP(src=NEAR4, dst=NODE4, len=1400) / TCP(dport=80),
}
PASSED["first fragment"][IP].flags = "MF"


@pytest.mark.parametrize("name", PASSED)
def test_all_else_is_left_to_the_stages_behind(plane: Plane, name: str) -> None:
    assert run(plane, PASSED[name]) == PASS
    assert plane.verdicts() == {}


@pytest.mark.parametrize("frame", [DENIED[0], DENIED[3], DENIED[9]], ids=["v4", "v6", "udp6"])
def test_truncated_frames_pass(plane: Plane, frame: Packet) -> None:
    raw = bytes(frame)
    for length in range(14, len(raw)):
        assert run(plane, raw[:length]) == PASS
    assert run(plane, raw) == DROP
    assert run(plane, raw + bytes(20)) == DROP  # padding of a short frame


def test_mutated_frames_meet_the_same_rules_as_behind_it(plane: Plane) -> None:
    """DROP just where mesh_ingress denies, but for what is left to it: fragments, extension headers, cut headers."""
    random = Random(1)
    frames = [bytes(frame) for frame in (*DENIED, *PASSED.values())]
    seen = {DROP: 0, PASS: 0}
    for _ in range(4000):
        frame = bytearray(random.choice(frames))
        for _ in range(random.randrange(4)):
            frame[random.randrange(12, len(frame))] = random.choice((0, 1, 6, 17, 0x40, 0x45, 80, 255))
        raw = bytes(frame[: random.randrange(54, max(55, len(frame) + 1))]) if random.random() < 0.2 else bytes(frame)
        before = plane.verdicts().get("DENIED", 0)
        dropped = run(plane, raw) == DROP
        assert plane.verdicts().get("DENIED", 0) - before == dropped
        denied = plane.run("mesh_ingress", raw).retval == SHOT and plane.verdicts()["DENIED"] > before + dropped
        parsed = frames_model.parse(raw)
        is_left = parsed.fragment or parsed.kind in ("extension", "malformed")
        is_multicast = raw[0] & 1 != 0
        assert denied == dropped or (denied and is_left), raw.hex()
        assert not (dropped and (is_left or is_multicast)), raw.hex()
        seen[DROP if dropped else PASS] += 1
    assert min(seen.values()) > 500


@pytest.mark.parametrize("size", [3000, 8000, 30000])
def test_frames_in_several_buffers(plane: Plane, size: int) -> None:
    """Jumbo frames: the first buffer has the headers."""
    raw = bytes(segment(NEAR4, 1000, NODE4, 80, "A", bytes(size)))
    assert plane.programs["mesh_xdp"].test_run(raw).retval == DROP
    assert plane.verdicts() == {"DENIED": 1}
    raw = bytes(segment(FAR4, 1000, NODE4, 80, "A", bytes(size)))
    assert plane.programs["mesh_xdp"].test_run(raw).retval == PASS


# ---- attached ----


def card(kind: str = "", name: str = "eth0", index: int = 2, ethernet: bool = True) -> Interface:
    return Interface(index=index, name=name, kind=kind, up=True, ethernet=ethernet, master=0)


def test_which_interfaces_qualify() -> None:
    kinds = ["", "bond", "bridge", "vlan", "veth", "veth"]
    interfaces = {i: card(kind, f"if{i}", i) for i, kind in enumerate(kinds, 2)}
    interfaces[9] = card("", "lo", 9, ethernet=False)
    programs = dict.fromkeys(interfaces, INGRESS) | {7: TASK, 99: INGRESS}
    found, problems = xdp.candidates(interfaces, programs)
    assert [interface.name for interface in found] == ["if2", "if3"]
    assert [line.partition(" has ")[0] for line in problems] == ["interface if6"]


def sh(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


@pytest.fixture
def node() -> Iterator[str]:
    """A namespace: node, with a veth `eth0` to its own namespace's other side, and a bridge `br0`."""
    names = [f"mesh{os.getpid()}-xdp-{end}" for end in ("n", "c")]
    node, client = names
    try:
        for name in names:
            sh(f"ip netns add {name}")
        sh(f"ip -n {node} link add eth0 type veth peer name eth0 netns {client}")
        sh(f"ip -n {node} link add br0 type bridge")
        for name, last in ((node, 1), (client, 9), (client, 10)):
            sh(f"ip -n {name} addr add 192.0.2.{last}/24 dev eth0")
            sh(f"ip -n {name} link set eth0 up")
            sh(f"ip netns exec {name} ethtool -K eth0 tx off")  # checksums complete on the wire
        sh(f"ip -n {node} link set br0 up")
        yield node
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def links(tmp_path: Path) -> Iterator[Path]:
    sh(f"mount -t bpf bpf {tmp_path}")
    try:
        directory = tmp_path / "links"
        directory.mkdir()
        yield directory
    finally:
        sh(f"umount -l {tmp_path}")


@pytest.fixture
def all_qualify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let veths and bridges take part: the test's packets have complete checksums."""
    monkeypatch.setattr(xdp, "candidates", lambda interfaces, _: (list(interfaces.values()), []))


def interfaces_of(node: str, *names: str) -> dict[int, Interface]:
    with inside(node):
        netlink = Netlink()
        try:
            return {i: each for i, each in netlink.topology().interfaces.items() if each.name in names}
        finally:
            netlink.close()


def attached(node: str, name: str = "eth0") -> tuple[str, int]:
    """(mode, program id) as `ip link` has them: xdp is native, xdpgeneric is not."""
    shown = sh(f"ip -n {node} -d link show {name}")
    mode, program = re.search(r"\b(xdp\w*)\b(?!/)", shown), re.search(r"prog/xdp id (\d+)", shown)
    return (mode[1], int(program[1])) if mode and program else ("", 0)


def is_answered(node: str, source: str, port: int, within: float = PATIENCE) -> bool:
    """Whether a connection from this source is answered, by a reset here."""
    with inside(node[:-1] + "c"), socket.socket() as client:
        client.settimeout(within)
        client.bind((source, 0))
        try:
            client.connect(("192.0.2.1", port))
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    raise AssertionError("nobody listens there")


@pytest.mark.usefixtures("all_qualify")
def test_native_on_a_real_interface(node: str, links: Path, plane: Plane) -> None:
    plane.rule(3, "192.0.2.10/32", DENY_RULE)
    plane.frontend(6, 84, [(1, 1)], acl=3)
    interfaces = interfaces_of(node, "eth0")
    stage = xdp.XdpStage(plane.programs["mesh_xdp"], links)
    with inside(node):
        assert stage.sync(interfaces, {}) == []
    assert attached(node) == ("xdp", plane.programs["mesh_xdp"].id)
    assert is_answered(node, "192.0.2.9", 84)
    assert plane.verdicts() == {}
    assert not is_answered(node, "192.0.2.10", 84, within=0.5)
    assert is_answered(node, "192.0.2.10", 85)
    assert set(plane.verdicts()) == {"DENIED"}
    with inside(node):
        stage.detach()
    assert attached(node) == ("", 0)
    assert list(links.iterdir()) == []
    assert is_answered(node, "192.0.2.10", 84)


@pytest.mark.usefixtures("all_qualify")
def test_native_on_an_interface_for_jumbo_frames(node: str, links: Path, plane: Plane) -> None:
    for namespace in (node, node[:-1] + "c"):
        sh(f"ip -n {namespace} link set eth0 mtu 9000")
    with inside(node):
        assert xdp.XdpStage(plane.programs["mesh_xdp"], links).sync(interfaces_of(node, "eth0"), {}) == []
    assert attached(node) == ("xdp", plane.programs["mesh_xdp"].id)
    assert is_answered(node, "192.0.2.9", 84)


@pytest.mark.usefixtures("all_qualify")
def test_the_next_process_adopts_replaces_and_takes_off(node: str, links: Path, plane: Plane) -> None:
    interfaces = interfaces_of(node, "eth0")
    new = Plane(("xdp",)).programs["mesh_xdp"]
    with inside(node):
        first = xdp.XdpStage(plane.programs["mesh_xdp"], links)
        assert first.sync(interfaces, {}) == []
        del first
        second = xdp.XdpStage(new, links)
        second.restore()
        assert attached(node) == ("xdp", plane.programs["mesh_xdp"].id)
        assert second.sync(interfaces, {}) == []
        assert attached(node) == ("xdp", new.id)
        del second
        off = xdp.XdpStage(None, links)
        off.restore()
        assert off.sync(interfaces, {}) == []
    assert attached(node) == ("", 0)
    assert list(links.iterdir()) == []


@pytest.mark.usefixtures("all_qualify")
def test_an_interface_that_is_gone_is_forgotten(node: str, links: Path, plane: Plane) -> None:
    interfaces = interfaces_of(node, "eth0")
    with inside(node):
        stage = xdp.XdpStage(plane.programs["mesh_xdp"], links)
        assert stage.sync(interfaces, {}) == []
        sh(f"ip -n {node} link del eth0")
        assert stage.sync(interfaces, {}) == []  # still listed: it went in between
        assert stage.sync({}, {}) == []
    assert list(links.iterdir()) == []


@pytest.mark.usefixtures("all_qualify")
def test_no_native_driver_is_refused_once_with_one_line(node: str, links: Path, plane: Plane) -> None:
    interfaces = interfaces_of(node, "br0", "eth0")
    stage = xdp.XdpStage(plane.programs["mesh_xdp"], links)
    with inside(node):
        for _ in range(2):
            (line,) = stage.sync(interfaces, {})
            assert line.startswith("interface br0 has no XDP stage: its driver has no native XDP, and generic mode is")
        assert attached(node, "br0") == ("", 0)
        assert attached(node)[0] == "xdp"
        stage.detach()


@pytest.mark.usefixtures("all_qualify")
def test_a_program_of_others_is_left_alone(node: str, links: Path, plane: Plane) -> None:
    (index,) = interfaces = interfaces_of(node, "eth0")
    with inside(node):
        other = _bpf.Link.create(plane.programs["mesh_xdp"], index, xdp.XDP, xdp.DRIVER_MODE)
        stage = xdp.XdpStage(Plane(("xdp",)).programs["mesh_xdp"], links)
        (line,) = stage.sync(interfaces, {})
        assert "interface eth0 has no XDP stage: it has another XDP program" in line
        assert attached(node) == ("xdp", plane.programs["mesh_xdp"].id)
        other.close()
        with pytest.raises(BpfError):
            _bpf.Link.create(plane.programs["mesh_ingress"], index, xdp.XDP, xdp.DRIVER_MODE)


def test_a_veth_is_refused(node: str, links: Path, plane: Plane) -> None:
    interfaces = interfaces_of(node, "eth0")
    stage = xdp.XdpStage(plane.programs["mesh_xdp"], links)
    with inside(node):
        (line,) = stage.sync(interfaces, dict.fromkeys(interfaces, INGRESS))
    assert line.startswith("interface eth0 has no XDP stage: it is a veth")
    assert attached(node) == ("", 0)
