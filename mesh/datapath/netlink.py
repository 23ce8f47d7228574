# SPDX-License-Identifier: Apache-2.0
"""Interfaces, addresses, neighbours and bridges of this host, read by rtnetlink (RFC 3549, linux/rtnetlink.h).

A raw socket reads a table in a fraction of a millisecond, where a process or a general library takes tens. It works in
the network namespace of its thread.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh.errors import DatapathError
from mesh.model import Address

NLMSG: Final = struct.Struct("=IHHII")
IFINFO: Final = struct.Struct("=BxHiII")
IFADDR: Final = struct.Struct("=BBBBI")
NDMSG: Final = struct.Struct("=BxxxiHBB")
RTMSG: Final = struct.Struct("=BBBBBBBBI")
ATTR: Final = struct.Struct("=HH")

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE = 0x1, 0x4, 0x300, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE, RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 18, 22, 26, 28, 29, 30
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 10, 18
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_PORT_KIND = 1, 2, 4
IFLA_VLAN_FLAGS, VLAN_FLAG_REORDER_HDR = 2, 0x1  # linux/if_link.h, linux/if_vlan.h
IFA_ADDRESS, IFA_LOCAL = 1, 2
NDA_DST, NDA_LLADDR = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 7, 8
RTAX_MTU = 2
NUD_FAILED, NUD_USABLE = 0x20, 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
NTF_USE = 0x01
RTN_LOCAL = 2
AF_BRIDGE = 7
IFF_UP = 0x1
ARPHRD_ETHER = 1
GROUPS: Final = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400  # links, neighbours, addresses and routes of both versions


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface. `kind` is that of `ip link` ("veth", "bridge"), empty for hardware. `mtu` in bytes.

    `keeps_tags`: a VLAN interface that leaves the tags in received frames (reorder_hdr off).
    """

    index: int
    name: str
    kind: str
    up: bool
    ethernet: bool
    master: int  # index of the bridge or bond that it is a port of; 0: none
    mtu: int = 1500
    keeps_tags: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """How this host reaches an address. `local`: the address is the host's own.

    `source`: the source address of its packets. `mtu`: of the path in bytes, configured or learnt; 0: the interface's.
    """

    interface: int
    gateway: Address | None
    local: bool
    source: Address | None = None
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Topology:
    """The tables at one moment."""

    interfaces: Mapping[int, Interface] = field(default_factory=dict)
    addresses: frozenset[Address] = frozenset()
    neighbours: Mapping[tuple[int, Address], bytes] = field(default_factory=dict)  # (interface, address) -> MAC
    ports: Mapping[tuple[int, bytes], int] = field(default_factory=dict)  # (bridge, MAC) -> port


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes that follow a fixed header, by type."""
    found: dict[int, bytes] = {}
    while offset + ATTR.size <= len(data):
        length, kind = ATTR.unpack_from(data, offset)
        if length < ATTR.size:
            break
        found[kind & 0x3FFF] = data[offset + ATTR.size : offset + length]
        offset += (length + 3) & ~3
    return found


def attribute(kind: int, data: bytes) -> bytes:
    return ATTR.pack(ATTR.size + len(data), kind) + data + bytes(-len(data) % 4)


class Netlink:
    """A request socket in the network namespace of the thread that makes it. Not thread-safe."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.settimeout(5)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, flags: int, payload: bytes) -> Iterator[bytes]:
        """Send one request and yield the payloads of the answers.

        Raises:
            OSError: the kernel refused, with its errno.
        """
        self._sequence += 1
        header = NLMSG.pack(NLMSG.size + len(payload), kind, flags | NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(header + payload)
        while True:
            data = self._socket.recv(1 << 17)
            offset = 0
            while offset + NLMSG.size <= len(data):
                length, answer, _, sequence, _ = NLMSG.unpack_from(data, offset)
                body = data[offset + NLMSG.size : offset + length]
                offset += (length + 3) & ~3
                if sequence != self._sequence:
                    continue  # the rest of a request that was abandoned
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield body
                if not flags & NLM_F_DUMP and not flags & NLM_F_ACK:
                    return

    def topology(self) -> Topology:
        """Read all tables."""
        interfaces = {i.index: i for i in self._interfaces()}
        addresses = frozenset(self._addresses())
        neighbours = {}
        for index, state, attrs in self._neighbours(socket.AF_UNSPEC):
            if state & NUD_USABLE and NDA_DST in attrs and len(attrs.get(NDA_LLADDR, b"")) == 6:
                neighbours[index, ipaddress.ip_address(attrs[NDA_DST])] = attrs[NDA_LLADDR]
        ports = {}
        for index, _, attrs in self._neighbours(AF_BRIDGE):
            port = interfaces.get(index)
            if port is not None and port.master and len(attrs.get(NDA_LLADDR, b"")) == 6:
                ports[port.master, attrs[NDA_LLADDR]] = index
        return Topology(interfaces, addresses, neighbours, ports)

    def _interfaces(self) -> Iterator[Interface]:
        for body in self.request(RTM_GETLINK, NLM_F_DUMP, IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
            _, hardware, index, flags, _ = IFINFO.unpack_from(body)
            attrs = attributes(body, IFINFO.size)
            info = attributes(attrs.get(IFLA_LINKINFO, b""), 0)
            kind = info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace")
            vlan = attributes(info.get(IFLA_INFO_DATA, b""), 0)
            yield Interface(
                index=index,
                name=attrs.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
                kind=kind,
                up=bool(flags & IFF_UP),
                ethernet=hardware == ARPHRD_ETHER,
                master=struct.unpack("=I", attrs[IFLA_MASTER])[0] if IFLA_MASTER in attrs else 0,
                mtu=struct.unpack("=I", attrs[IFLA_MTU])[0],
                keeps_tags=kind == "vlan"  # no flags at all are left out
                and not struct.unpack_from("=I", vlan.get(IFLA_VLAN_FLAGS, bytes(4)))[0] & VLAN_FLAG_REORDER_HDR,
            )

    def _addresses(self) -> Iterator[Address]:
        for body in self.request(RTM_GETADDR, NLM_F_DUMP, IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
            attrs = attributes(body, IFADDR.size)
            raw = attrs.get(IFA_LOCAL) or attrs.get(IFA_ADDRESS)
            if raw:
                yield ipaddress.ip_address(raw)

    def _neighbours(self, family: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
        # The dump of a bridge takes an ifinfomsg, which has family and index where ndmsg has them.
        payload = IFINFO.pack(family, 0, 0, 0, 0) if family == AF_BRIDGE else NDMSG.pack(family, 0, 0, 0, 0)
        for body in self.request(RTM_GETNEIGH, NLM_F_DUMP, payload):
            _, index, state, _, _ = NDMSG.unpack_from(body)
            yield index, state, attributes(body, NDMSG.size)

    def route(self, address: Address) -> Route | None:
        """How the host reaches `address`; None: it has no route."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        header = RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        try:
            for body in self.request(RTM_GETROUTE, 0, header + attribute(RTA_DST, address.packed)):
                kind = RTMSG.unpack_from(body)[7]
                attrs = attributes(body, RTMSG.size)
                gateway = ipaddress.ip_address(attrs[RTA_GATEWAY]) if RTA_GATEWAY in attrs else None
                source = ipaddress.ip_address(attrs[RTA_PREFSRC]) if RTA_PREFSRC in attrs else None
                metrics = attributes(attrs.get(RTA_METRICS, b""), 0)
                mtu = struct.unpack("=I", metrics[RTAX_MTU])[0] if RTAX_MTU in metrics else 0
                return Route(struct.unpack("=I", attrs[RTA_OIF])[0], gateway, kind == RTN_LOCAL, source, mtu)
        except OSError as error:
            if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                raise
        return None

    def resolve(self, interface: int, address: Address, *, anew: bool = False) -> None:
        """Have the kernel resolve a neighbour's MAC; the answer arrives as an event. `anew`: discard the known one."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        attrs = attribute(NDA_DST, address.packed)
        steps = [(RTM_NEWNEIGH, NLM_F_CREATE, NTF_USE)]
        if anew:
            steps.insert(0, (RTM_DELNEIGH, 0, 0))
        for kind, flags, neighbour in steps:
            for _ in self.request(kind, flags | NLM_F_ACK, NDMSG.pack(family, interface, 0, neighbour, 0) + attrs):
                pass


class Monitor:
    """Tells when a Topology, or what other `groups` announce (RTMGRP_* of linux/rtnetlink.h), may have changed."""

    def __init__(self, groups: int = GROUPS) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        try:
            self._socket.bind((0, groups))
        except OSError as error:
            self._socket.close()
            raise DatapathError(f"cannot follow network changes: {error.strerror}", where="rtnetlink") from error
        self._wake_out, self._wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        for each in (self._socket.fileno(), self._wake_out):
            self._poll.register(each, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Block until a change, a `wake` or the timeout in seconds. Returns whether there was a change."""
        ready = [fd for fd, _ in self._poll.poll(seconds * 1000)]
        if self._wake_out in ready:
            os.read(self._wake_out, 4096)
        if self._socket.fileno() not in ready:
            return False
        try:
            while self._socket.recv(1 << 16):
                pass
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # events were lost: something has changed
                raise
        return True

    def wake(self) -> None:
        """Make `wait` return immediately; any thread."""
        os.write(self._wake_in, b"x")

    def close(self) -> None:
        self._socket.close()
        os.close(self._wake_out)
        os.close(self._wake_in)
