# SPDX-License-Identifier: Apache-2.0
"""Packet tables: from client to task and back, expected bytes by scapy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.bpf.plane import OK, REDIRECT, Plane, explained
from tests.bpf.plane import TCP as PROTO_TCP
from tests.oracle.frames import total
from tests.support.frames import (
    CLIENT4,
    CLIENT6,
    IP,
    NODE4,
    NODE6,
    TASK4,
    TASK6,
    UDP,
    Ether,
    Raw,
    become,
    datagram,
    segment,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Build = Callable[..., Any]


FLOWS = [
    pytest.param(segment, CLIENT4, NODE4, 80, TASK4, 8080, id="tcp4"),
    pytest.param(segment, CLIENT6, NODE6, 86, TASK6, 8080, id="tcp6"),
    pytest.param(datagram, CLIENT4, NODE4, 53, TASK4, 5353, id="udp4"),
    pytest.param(datagram, CLIENT6, NODE6, 56, TASK6, 5353, id="udp6"),
    pytest.param(segment, CLIENT4, NODE4, 8080, TASK4, 8080, id="same-port"),
]


@pytest.mark.parametrize(("build", "client", "node", "port", "task", "target"), FLOWS)
@pytest.mark.parametrize("data", [b"", b"x", b"question", bytes(1200)])
def test_there_and_back(
    plane: Plane, build: Build, client: str, node: str, port: int, task: str, target: int, data: bytes
) -> None:
    frame = build(client, 40000, node, port, data=data)
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    assert out.data == become(frame, dst=task, dport=target)
    reply = build(task, target, client, 40000, data=data[::-1])
    out = plane.run("mesh_task", bytes(reply))
    assert out.retval == REDIRECT
    assert out.data == become(reply, src=node, sport=port)
    assert plane.verdicts() == {"FORWARD": 1, "REPLY": 1}
    length = len(frame) - 14
    assert plane.counts("mesh_be_metrics", {8080: 2, 5353: 4}[target] + (":" in task))[:4] == (1, length, 1, length)


def test_checksums_of_many_values_stay_right(plane: Plane) -> None:
    for i in range(300):
        client = f"198.51.{i % 251}.{(i * 7) % 253}"
        for build, port, target in ((segment, 80, 8080), (datagram, 53, 5353)):
            frame = build(client, 1024 + i * 211 % 60000, NODE4, port, data=bytes([i % 256, i // 256]) * (i % 7))
            assert plane.run("mesh_ingress", bytes(frame)).data == become(frame, dst=TASK4, dport=target)


@pytest.mark.parametrize(("build", "client", "node", "port", "task", "target"), FLOWS)
def test_complete_checksums_that_look_left_to_offload(
    plane: Plane, build: Build, client: str, node: str, port: int, task: str, target: int
) -> None:
    """One in 65536 holds by chance what a checksum that is left to offload does: the sum of the pseudo header."""

    def made(data: bytes) -> tuple[bytes, int, int]:
        frame = bytes(build(client, 40000, node, port, data=data))
        at = 34 if "." in client else 54  # of the segment, behind Ethernet and IP
        ends = frame[26:34] if "." in client else frame[22:54]
        protocol = 6 if build is segment else 17
        pseudo = total(ends + (len(frame) - at).to_bytes(4, "big") + bytes([0, 0, 0, protocol]))
        check = at + (16 if build is segment else 6)
        return frame, int.from_bytes(frame[check : check + 2], "big"), pseudo

    _, check, pseudo = made(bytes(2))
    word = total((~pseudo & 0xFFFF).to_bytes(2, "big") + check.to_bytes(2, "big")).to_bytes(2, "big")
    frame, check, pseudo = made(word)
    assert check == pseudo
    out = plane.run("mesh_ingress", frame)
    assert out.data == become(build(client, 40000, node, port, data=word), dst=task, dport=target)


def test_udp_without_checksum_stays_so(plane: Plane) -> None:
    frame = datagram(CLIENT4, 40000, NODE4, 53)
    frame[UDP].chksum = 0
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    assert out.data == become(frame, dst=TASK4, dport=5353)
    assert out.data[14 + 20 + 6 : 14 + 20 + 8] == b"\0\0"


def test_wrong_checksums_stay_wrong(plane: Plane) -> None:
    frame = Ether(bytes(segment(CLIENT4, 40000, NODE4, 80)))
    frame[IP].chksum ^= 0x1111
    frame["TCP"].chksum ^= 0x2222
    out = Ether(plane.run("mesh_ingress", bytes(frame)).data)
    right = Ether(become(frame, dst=TASK4, dport=8080))
    assert out[IP].chksum != right[IP].chksum
    assert out["TCP"].chksum != right["TCP"].chksum


def test_ip_options_stay(plane: Plane) -> None:
    frame = segment(CLIENT4, 40000, NODE4, 80, options=b"\x94\x04\0\0\x01\x01\x01\0")
    out = plane.run("mesh_ingress", bytes(frame))
    assert out.retval == REDIRECT
    assert out.data == become(frame, dst=TASK4, dport=8080)


@pytest.mark.parametrize(
    ("build", "client", "node", "port"),
    [
        pytest.param(segment, CLIENT4, NODE4, 81, id="other-port"),
        pytest.param(datagram, CLIENT4, NODE4, 80, id="other-protocol"),
        pytest.param(segment, CLIENT4, "192.0.2.99", 80, id="other-address"),
        pytest.param(segment, CLIENT6, "2001:db8::99", 86, id="other-address6"),
        pytest.param(segment, NODE4, CLIENT4, 80, id="sent-elsewhere"),
    ],
)
@pytest.mark.parametrize("program", ["mesh_ingress", "mesh_task"])
def test_not_ours_is_untouched(plane: Plane, program: str, build: Build, client: str, node: str, port: int) -> None:
    frame = bytes(build(client, 40000, node, port))
    out = plane.run(program, frame)
    assert (out.retval, out.data) == (OK, frame)
    assert plane.verdicts() == {}
    assert explained(plane.run("mesh_explain", frame))[0] == ""


def test_frames_for_other_machines_are_untouched(plane: Plane) -> None:
    frame = segment(CLIENT4, 40000, NODE4, 80)
    frame[Ether].dst = "02:00:00:00:00:77"
    out = plane.run("mesh_ingress", bytes(frame))
    assert (out.retval, out.data) == (OK, bytes(frame))


def test_exact_address_comes_before_any_address(plane: Plane) -> None:
    plane.backend(9, "172.18.0.9", 9090)
    plane.frontend(9, 80, [(9, 9)], address="203.0.113.80", protocol=PROTO_TCP)
    for node, task, target in (("203.0.113.80", "172.18.0.9", 9090), (NODE4, TASK4, 8080)):
        frame = segment(CLIENT4, 40000, node, 80)
        assert plane.run("mesh_ingress", bytes(frame)).data == become(frame, dst=task, dport=target)


def test_other_ip_version_is_left_to_the_engine_beside(plane: Plane) -> None:
    for client, node, port in ((CLIENT6, NODE6, 80), (CLIENT4, NODE4, 86)):
        frame = bytes(segment(client, 40000, node, port))
        out = plane.run("mesh_ingress", frame)
        assert (out.retval, out.data) == (OK, frame)
    assert plane.verdicts() == {"FAMILY": 2}


def test_calls_with_the_same_client_port_to_two_ports_of_a_task_do_not_mix(plane: Plane) -> None:
    first = segment(CLIENT4, 40000, NODE4, 80)
    second = segment(CLIENT4, 40000, NODE4, 8080)
    assert plane.run("mesh_ingress", bytes(first)).retval == REDIRECT
    plane.run("mesh_ingress", bytes(second))
    assert plane.verdicts() == {"FORWARD": 1, "TRANSLATED": 1}
    reply = segment(TASK4, 8080, CLIENT4, 40000, "SA")
    assert plane.run("mesh_task", bytes(reply)).data == become(reply, src=NODE4, sport=80)


def test_flow_is_counted_at_the_clients_second_packet_and_when_both_sides_closed(plane: Plane) -> None:
    def client(flags: str) -> None:
        assert plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80, flags))).retval == REDIRECT

    def task(flags: str) -> None:
        assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, 40000, flags))).retval == REDIRECT

    client("S")
    task("SA")
    assert plane.counts("mesh_be_metrics", 2)[4:] == (0, 0)
    client("A")
    client("PA")
    assert plane.counts("mesh_be_metrics", 2)[4:] == (1, 0)
    client("FA")
    task("A")
    assert plane.counts("mesh_be_metrics", 2)[4:] == (1, 0)
    task("FA")
    client("A")
    assert plane.counts("mesh_be_metrics", 2)[4:] == (1, 1)
    client("S")  # the port is used again
    task("SA")
    client("A")
    task("R")
    assert plane.counts("mesh_be_metrics", 2)[4:] == (2, 2)
    assert plane.counts("mesh_fe_metrics", 1)[4:] == (2, 2)


def test_lost_entry_is_rebuilt_by_any_packet_of_the_client(plane: Plane) -> None:
    plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80)))
    for name in ("mesh_revnat_new", "mesh_revnat"):
        keys, _ = plane.maps[name].dump()
        if keys:
            plane.maps[name].delete_batch(keys)
    reply = segment(TASK4, 8080, CLIENT4, 40000, "PA", b"data")
    assert plane.run("mesh_task", bytes(reply)).retval == OK
    plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80, "A")))
    assert plane.run("mesh_task", bytes(reply)).data == become(reply, src=NODE4, sport=80)


def test_a_task_calling_out_is_untouched(plane: Plane) -> None:
    plane.run("mesh_ingress", bytes(segment(CLIENT4, 40000, NODE4, 80)))
    for frame in (
        segment(TASK4, 8081, CLIENT4, 40000),
        datagram(TASK4, 8080, CLIENT4, 40000),
        segment(TASK4, 8080, NODE4, 40000, "SA"),
    ):
        out = plane.run("mesh_task", bytes(frame))
        assert (out.retval, out.data) == (OK, bytes(frame))


def test_explain_tells_the_choice_and_changes_nothing(plane: Plane) -> None:
    frame = bytes(segment(CLIENT4, 40000, NODE4, 80))
    out = plane.run("mesh_explain", frame)
    assert (out.retval, out.data) == (OK, frame)
    name, frontend, _, slot, owner = explained(out)
    assert (name, frontend, slot, owner) == ("FORWARD", 1, 0, 2)
    assert plane.verdicts() == {}
    assert plane.maps["mesh_revnat"].dump()[0] == plane.maps["mesh_revnat_new"].dump()[0] == b""


def test_padding_behind_the_packet_stays(plane: Plane) -> None:
    frame = bytes(datagram(CLIENT4, 40000, NODE4, 53, b"q")) + bytes(17)
    out = plane.run("mesh_ingress", frame)
    assert out.retval == REDIRECT
    assert len(out.data) == len(frame)
    assert plane.counts("mesh_be_metrics", 4)[1] == 29
    assert Raw in Ether(out.data)
