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
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh import _linux as nl
from mesh.errors import DatapathError
from mesh.model import Address, Network

AF_BRIDGE: Final = 7  # not in the socket module on every build
NUD_USABLE: Final = nl.NUD_REACHABLE | nl.NUD_STALE | nl.NUD_DELAY | nl.NUD_PROBE | nl.NUD_NOARP | nl.NUD_PERMANENT
BARE: Final = frozenset(  # link types whose packets begin with the IP header
    {
        nl.ARPHRD_NONE,
        nl.ARPHRD_RAWIP,
        nl.ARPHRD_PPP,
        nl.ARPHRD_TUNNEL,
        nl.ARPHRD_TUNNEL6,
        nl.ARPHRD_SIT,
        nl.ARPHRD_IPGRE,
    }
)
ALIGNMENT: Final = 4  # of messages and attributes
SOL_NETLINK: Final = 270  # linux/socket.h, which is not for user space


def groups(*numbers: int) -> int:
    """The multicast groups RTNLGRP_* as the mask that bind(2) takes."""
    return sum(1 << (number - 1) for number in numbers)


GROUPS: Final = groups(
    nl.RTNLGRP_LINK,
    nl.RTNLGRP_NEIGH,
    nl.RTNLGRP_IPV4_IFADDR,
    nl.RTNLGRP_IPV4_ROUTE,
    nl.RTNLGRP_IPV6_IFADDR,
    nl.RTNLGRP_IPV6_ROUTE,
)


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface. `kind` is that of `ip link` ("veth", "bridge"), empty for hardware. `mtu` in bytes.

    `bare`: its packets begin with the IP header (WireGuard, tun, PPP, tunnels of IP in IP).
    `keeps_tags`: a VLAN interface that leaves the tags in received frames (reorder_hdr off).
    `elsewhere`: the network namespace of a veth's other end, as this one numbers it; -1: this one, or not known.
    """

    index: int
    name: str
    kind: str
    up: bool
    ethernet: bool
    master: int  # index of the bridge or bond that it is a port of; 0: none
    mtu: int = 1500
    keeps_tags: bool = False
    bare: bool = False
    loopback: bool = False
    elsewhere: int = -1


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


def aligned(length: int) -> int:
    """The length with the pad that follows."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes that follow a fixed header, by type."""
    found: dict[int, bytes] = {}
    while offset + nl.RTATTR.size <= len(data):
        head = nl.RTATTR.unpack_from(data, offset)
        if head.rta_len < nl.RTATTR.size:
            break
        found[head.rta_type & nl.NLA_TYPE_MASK] = data[offset + nl.RTATTR.size : offset + head.rta_len]
        offset += aligned(head.rta_len)
    return found


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    head = nl.RtAttr(rta_len=nl.RTATTR.size + len(data), rta_type=kind)
    return nl.RTATTR.pack(head) + data + bytes(aligned(len(data)) - len(data))


def number(data: bytes) -> int:
    """The number that an attribute is, in host order."""
    return int.from_bytes(data, sys.byteorder)


def signed(data: bytes) -> int:
    """Likewise a number with a sign."""
    return int.from_bytes(data, sys.byteorder, signed=True)


def word(value: int) -> bytes:
    """A number of 32 bits as the data of an attribute, in host order."""
    return value.to_bytes(4, sys.byteorder)


class Netlink:
    """A request socket in the network namespace of the thread that makes it. Not thread-safe.

    Args:
        family: of netlink, NETLINK_*.
    """

    def __init__(self, family: int = nl.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
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
        header = nl.NlMsgHdr(
            nlmsg_len=nl.NLMSGHDR.size + len(payload),
            nlmsg_type=kind,
            nlmsg_flags=flags | nl.NLM_F_REQUEST,
            nlmsg_seq=self._sequence,
        )
        self._socket.send(nl.NLMSGHDR.pack(header) + payload)
        while True:
            data = self._socket.recv(1 << 17)
            offset = 0
            while offset + nl.NLMSGHDR.size <= len(data):
                head = nl.NLMSGHDR.unpack_from(data, offset)
                body = data[offset + nl.NLMSGHDR.size : offset + head.nlmsg_len]
                offset += aligned(head.nlmsg_len)
                if head.nlmsg_seq != self._sequence:
                    continue  # the rest of a request that was abandoned
                if head.nlmsg_type == nl.NLMSG_DONE:
                    return
                if head.nlmsg_type == nl.NLMSG_ERROR:
                    code = -nl.NLMSGERR.load("error", body)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield body
                if not flags & nl.NLM_F_DUMP and not flags & nl.NLM_F_ACK:
                    return

    def topology(self) -> Topology:
        """Read all tables."""
        interfaces = {i.index: i for i in self._interfaces()}
        addresses = frozenset(self._addresses())
        neighbours = {}
        for index, state, attrs in self._neighbours(socket.AF_UNSPEC):
            if state & NUD_USABLE and nl.NDA_DST in attrs and len(attrs.get(nl.NDA_LLADDR, b"")) == 6:
                neighbours[index, ipaddress.ip_address(attrs[nl.NDA_DST])] = attrs[nl.NDA_LLADDR]
        ports = {}
        for index, _, attrs in self._neighbours(AF_BRIDGE):
            port = interfaces.get(index)
            if port is not None and port.master and len(attrs.get(nl.NDA_LLADDR, b"")) == 6:
                ports[port.master, attrs[nl.NDA_LLADDR]] = index
        return Topology(interfaces, addresses, neighbours, ports)

    def _interfaces(self) -> Iterator[Interface]:
        for body in self.request(nl.RTM_GETLINK, nl.NLM_F_DUMP, nl.IFINFOMSG.pack(nl.IfInfoMsg())):
            head = nl.IFINFOMSG.unpack_from(body)
            attrs = attributes(body, nl.IFINFOMSG.size)
            info = attributes(attrs.get(nl.IFLA_LINKINFO, b""), 0)
            kind = info.get(nl.IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace")
            vlan = attributes(info.get(nl.IFLA_INFO_DATA, b""), 0)
            flags = vlan.get(nl.IFLA_VLAN_FLAGS, bytes(nl.VLANFLAGS.size))  # no flags at all are left out
            yield Interface(
                index=head.ifi_index,
                name=attrs.get(nl.IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
                kind=kind,
                up=bool(head.ifi_flags & nl.IFF_UP),
                ethernet=head.ifi_type == nl.ARPHRD_ETHER,
                master=number(attrs.get(nl.IFLA_MASTER, b"")),
                mtu=number(attrs[nl.IFLA_MTU]),
                bare=head.ifi_type in BARE,
                loopback=bool(head.ifi_flags & nl.IFF_LOOPBACK),
                elsewhere=signed(attrs.get(nl.IFLA_LINK_NETNSID, b"\xff" * 4)) if kind == "veth" else -1,
                keeps_tags=kind == "vlan" and not nl.VLANFLAGS.load("flags", flags) & nl.VLAN_FLAG_REORDER_HDR,
            )

    def _addresses(self) -> Iterator[Address]:
        for body in self.request(nl.RTM_GETADDR, nl.NLM_F_DUMP, nl.IFADDRMSG.pack(nl.IfAddrMsg())):
            attrs = attributes(body, nl.IFADDRMSG.size)
            raw = attrs.get(nl.IFA_LOCAL) or attrs.get(nl.IFA_ADDRESS)
            if raw:
                yield ipaddress.ip_address(raw)

    def _neighbours(self, family: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
        # The dump of a bridge takes an ifinfomsg, which has family and index where ndmsg has them.
        if family == AF_BRIDGE:
            payload = nl.IFINFOMSG.pack(nl.IfInfoMsg(ifi_family=family))
        else:
            payload = nl.NDMSG.pack(nl.NdMsg(ndm_family=family))
        for body in self.request(nl.RTM_GETNEIGH, nl.NLM_F_DUMP, payload):
            head = nl.NDMSG.unpack_from(body)
            yield head.ndm_ifindex, head.ndm_state, attributes(body, nl.NDMSG.size)

    def route(self, address: Address) -> Route | None:
        """How the host reaches `address`; None: it has no route."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        header = nl.RTMSG.pack(nl.RtMsg(rtm_family=family, rtm_dst_len=address.max_prefixlen))
        try:
            for body in self.request(nl.RTM_GETROUTE, 0, header + attribute(nl.RTA_DST, address.packed)):
                is_local = nl.RTMSG.load("rtm_type", body) == nl.RTN_LOCAL
                attrs = attributes(body, nl.RTMSG.size)
                gateway = ipaddress.ip_address(attrs[nl.RTA_GATEWAY]) if nl.RTA_GATEWAY in attrs else None
                source = ipaddress.ip_address(attrs[nl.RTA_PREFSRC]) if nl.RTA_PREFSRC in attrs else None
                metrics = attributes(attrs.get(nl.RTA_METRICS, b""), 0)
                mtu = number(metrics.get(nl.RTAX_MTU, b""))
                return Route(number(attrs[nl.RTA_OIF]), gateway, is_local, source, mtu)
        except OSError as error:
            if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                raise
        return None

    def resolve(self, interface: int, address: Address, *, anew: bool = False) -> None:
        """Have the kernel resolve a neighbour's MAC; the answer arrives as an event. `anew`: discard the known one."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        attrs = attribute(nl.NDA_DST, address.packed)
        steps = [(nl.RTM_NEWNEIGH, nl.NLM_F_CREATE, nl.NTF_USE)]
        if anew:
            steps.insert(0, (nl.RTM_DELNEIGH, 0, 0))
        for kind, flags, neighbour in steps:
            head = nl.NdMsg(ndm_family=family, ndm_ifindex=interface, ndm_flags=neighbour)
            for _ in self.request(kind, flags | nl.NLM_F_ACK, nl.NDMSG.pack(head) + attrs):
                pass


class Networks(Netlink):
    """Reads which networks other network namespaces have. As Netlink."""

    def __init__(self) -> None:
        super().__init__()
        self._socket.setsockopt(SOL_NETLINK, nl.NETLINK_GET_STRICT_CHK, 1)  # else the namespace is not looked at

    def of(self, elsewhere: int, version: int) -> frozenset[Network]:
        """The networks of a namespace's own addresses, but for those of loopback and of one link.

        Args:
            elsewhere: Interface.elsewhere.
            version: of IP, 4 or 6.

        Returns:
            None of a namespace that is gone, or that this process may not look into.
        """
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        target = attribute(nl.IFA_TARGET_NETNSID, elsewhere.to_bytes(4, sys.byteorder, signed=True))
        payload = nl.IFADDRMSG.pack(nl.IfAddrMsg(ifa_family=family)) + target
        found = set()
        try:
            for body in self.request(nl.RTM_GETADDR, nl.NLM_F_DUMP, payload):
                attrs = attributes(body, nl.IFADDRMSG.size)
                raw = attrs.get(nl.IFA_LOCAL) or attrs.get(nl.IFA_ADDRESS)
                if raw is None or nl.IFA_TARGET_NETNSID not in attrs:
                    continue  # a kernel that does not know the question answers for this namespace
                bits = nl.IFADDRMSG.load("ifa_prefixlen", body)
                network = ipaddress.ip_network((raw, bits), strict=False)
                if not (network.is_loopback or network.is_link_local):
                    found.add(network)
        except OSError:
            return frozenset()
        return frozenset(found)


class Monitor:
    """Tells when a Topology, or what the `mask` of groups announces, may have changed.

    Args:
        family: of netlink, NETLINK_*.
    """

    def __init__(self, mask: int = GROUPS, family: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, family
        )
        try:
            self._socket.bind((0, mask))
        except OSError as error:
            self._socket.close()
            raise DatapathError(f"cannot follow network changes: {error.strerror}", where="netlink") from error
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
