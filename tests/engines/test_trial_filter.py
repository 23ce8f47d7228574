# SPDX-License-Identifier: Apache-2.0
"""The sockets that hear answers to trials of the tunnel hear nothing else: each packet would wake the agent."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from mesh import _abi, _linux
from mesh.datapath import packets
from mesh.datapath.paths import tunnel_probe
from mesh.datapath.paths.tunnel_probe import Between, listen, listen_after_programs, question
from tests.support.lab.netns import Lab

TUNNEL, PORT, OTHER = 6084, 40001, 40002
OWN = {4: ipaddress.ip_address("127.0.0.1"), 6: ipaddress.ip_address("::1")}


def answer(version: int, port: int, *, proven: bool, reply: bool = True) -> bytes:
    """A packet of the tunnel to an inner port, from its UDP payload on."""
    between = Between((7, bytes(16)), OWN[version], OWN[version]) if proven else None
    data = bytearray(question(1, 0x01020304, between))
    segment = _abi.GENEVE.size + packets.IP_SIZE[4] + (_abi.PROOF.size if proven else 0)
    at = segment + _linux.TCP.offsets["destination"]
    data[at : at + 2] = port.to_bytes(2, "big")
    if reply:
        data[_abi.GENEVE.offsets["id"] + _abi.ID.offsets["flags"]] = _abi.TUNNEL_REPLY
    return bytes(data)


@pytest.mark.root
@pytest.mark.parametrize("version", [4, 6])
def test_it_hears_answers_to_its_port_only(lab: Lab, version: int) -> None:
    host = lab.host("node")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with host.entered():
        heard = listen(version, TUNNEL, PORT)
        sender = socket.socket(family, socket.SOCK_DGRAM)
    with heard, sender:
        heard.setblocking(False)

        def send(data: bytes, port: int = TUNNEL) -> None:
            sender.sendto(data, (str(OWN[version]), port))

        for proven in (False, True):
            send(answer(version, PORT, proven=proven), TUNNEL + 1)
            send(answer(version, PORT, proven=proven, reply=False))
            send(answer(version, OTHER, proven=proven))
        send(b"x")
        send(bytes(2000))
        with pytest.raises(BlockingIOError):
            heard.recv(2048)
        for proven in (False, True):
            send(answer(version, PORT, proven=proven))
            assert tunnel_probe.nonce_of(version, heard.recv(2048))
            while True:  # loopback shows it as it leaves and as it comes
                try:
                    heard.recv(2048)
                except BlockingIOError:
                    break


@pytest.mark.root
def test_after_the_programs_it_hears_answers_to_its_port_only(lab: Lab) -> None:
    """As programs leave them: the inner packet."""
    inner = answer(4, PORT, proven=False)[_abi.GENEVE.size :]
    source, segment = _linux.IPV4.offsets["source"], packets.IP_SIZE[4]
    spoilt = []
    for at in (source, segment + _linux.TCP.offsets["source"], segment + _linux.TCP.offsets["destination"]):
        other = bytearray(inner)
        other[segment : segment + 2] = bytes(2)  # from port 0
        other[at] ^= 1
        spoilt.append(bytes(other))
    wanted = bytearray(inner)
    wanted[segment : segment + 2] = bytes(2)
    host = lab.host("node")
    with host.entered():
        heard = listen_after_programs(PORT)
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    with heard, sender:
        heard.setblocking(False)

        def send(packet: bytes) -> None:
            sender.sendto(packet, ("lo", _linux.ETH_P_IP))

        for packet in (*spoilt, inner[:20], b"x", answer(4, PORT, proven=True)):
            send(packet)
        with pytest.raises(BlockingIOError):
            heard.recv(2048)
        send(bytes(wanted))
        assert heard.recv(2048) == wanted
        assert tunnel_probe.inner_nonce_of(bytes(wanted)) == bytes(4)
