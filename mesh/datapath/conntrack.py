# SPDX-License-Identifier: Apache-2.0
"""Connection tracking's memory of UDP flows, by ctnetlink: what is older than our taking a port over is removed.

The kernel asks NAT rules of the first datagram of a flow only, and remembers a flow for as long as its sender does not
pause for longer than half a minute. So a sender that spoke before its service was there would never reach it, and one
whose service is no longer ours would never reach anybody else.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Final

import structlog

from mesh import _linux as nl
from mesh.datapath.netlink import Netlink, attribute, attributes, word
from mesh.model import Flow, Frontend, Protocol
from mesh.netaddr import is_mine

FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
PROTOCOL_AND_PORT: Final = 1 << 3 | 1 << 5  # CTA_PROTO_NUM and CTA_PROTO_DST_PORT as bits of CTA_FILTER_ORIG_FLAGS
WAIT: Final = 1.0  # seconds in which whoever had the port may answer a flow's first datagram
LONGEST: Final = 5.0  # seconds for which flows from before are looked for
UNFILTERED: Final = (errno.EINVAL, errno.EOPNOTSUPP)  # what a kernel without CTA_FILTER says, before 5.8

log = structlog.get_logger("mesh")


@dataclass(frozen=True, slots=True)
class Entry:
    """A UDP flow that the kernel remembers.

    `flow`: as its sender sees it. `port`: where its datagrams are led. `answered`: somebody has answered it. `name`:
    what deletes it.
    """

    family: int
    flow: Flow
    port: int
    answered: bool
    name: bytes


def nested(kind: int, data: bytes) -> bytes:
    return attribute(kind | nl.NLA_F_NESTED, data)


def message(kind: int) -> int:
    return nl.NFNL_SUBSYS_CTNETLINK << 8 | kind


def head(family: int) -> bytes:
    return nl.NFGENMSG.pack(nl.NfGenMsg(nfgen_family=family))


class Conntrack:
    """A socket to connection tracking, in the network namespace of the thread that makes it. Not thread-safe."""

    def __init__(self) -> None:
        self._netlink = Netlink(nl.NETLINK_NETFILTER)

    def close(self) -> None:
        self._netlink.close()

    def of(self, frontend: Frontend) -> list[Entry]:
        """The flows of clients that call a UDP frontend.

        Raises:
            OSError: connection tracking does not say.
        """
        found = [entry for family in FAMILIES for entry in self._dump(family, frontend.port)]
        calls = {e.flow.destination for e in found}
        ours = {a for a in calls if a == frontend.address or (frontend.address.is_unspecified and is_mine(a))}
        return [entry for entry in found if entry.flow.destination in ours]

    def _dump(self, family: int, port: int) -> Iterator[Entry]:
        protocol = attribute(nl.CTA_PROTO_NUM, bytes([Protocol.UDP]))
        wanted = nested(nl.CTA_TUPLE_PROTO, protocol + attribute(nl.CTA_PROTO_DST_PORT, port.to_bytes(2, "big")))
        flags = attribute(nl.CTA_FILTER_ORIG_FLAGS, word(PROTOCOL_AND_PORT))
        narrow = nested(nl.CTA_TUPLE_ORIG, wanted) + nested(nl.CTA_FILTER, flags)
        try:
            bodies = list(self._request(family, narrow))
        except OSError as error:
            if error.errno not in UNFILTERED:
                raise
            bodies = list(self._request(family, b""))
        for body in bodies:
            entry = read(family, body, port)
            if entry is not None:
                yield entry

    def _request(self, family: int, payload: bytes) -> Iterator[bytes]:
        return self._netlink.request(message(nl.IPCTNL_MSG_CT_GET), nl.NLM_F_DUMP, head(family) + payload)

    def delete(self, entry: Entry) -> None:
        """Have the kernel forget a flow; one that it has forgotten already is no error.

        Raises:
            OSError: it refuses.
        """
        kind = message(nl.IPCTNL_MSG_CT_DELETE)
        try:
            for _ in self._netlink.request(kind, nl.NLM_F_ACK, head(entry.family) + entry.name):
                pass
        except FileNotFoundError:
            pass


def read(family: int, body: bytes, port: int) -> Entry | None:
    """One entry of a dump; None: it is none of UDP to this port."""
    attrs = attributes(body, nl.NFGENMSG.size)
    original, reply = (attributes(attrs.get(kind, b""), 0) for kind in (nl.CTA_TUPLE_ORIG, nl.CTA_TUPLE_REPLY))
    called, answers = (attributes(tuple_.get(nl.CTA_TUPLE_PROTO, b""), 0) for tuple_ in (original, reply))
    if called.get(nl.CTA_PROTO_NUM) != bytes([Protocol.UDP]):
        return None
    if int.from_bytes(called.get(nl.CTA_PROTO_DST_PORT, b""), "big") != port:
        return None
    addresses = attributes(original.get(nl.CTA_TUPLE_IP, b""), 0)
    four = family == socket.AF_INET
    source, destination = (
        ipaddress.ip_address(addresses.get(kind, b""))
        for kind in ((nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST) if four else (nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST))
    )
    source_port = int.from_bytes(called.get(nl.CTA_PROTO_SRC_PORT, b""), "big")
    name = nested(nl.CTA_TUPLE_ORIG, attrs[nl.CTA_TUPLE_ORIG]) + attribute(nl.CTA_ID, attrs.get(nl.CTA_ID, b""))
    return Entry(
        family,
        Flow(source, source_port, destination, port, Protocol.UDP),
        int.from_bytes(answers.get(nl.CTA_PROTO_SRC_PORT, b""), "big"),
        bool(int.from_bytes(attrs.get(nl.CTA_STATUS, b""), "big") & nl.IPS_SEEN_REPLY),
        name,
    )


def unanswered(frontend: Frontend) -> list[Flow]:
    """The flows of clients that call a UDP frontend and that nobody has answered, as far as the kernel tracks them."""
    found: list[Flow] = []
    _ask(lambda conntrack: found.extend(entry.flow for entry in conntrack.of(frontend) if not entry.answered))
    return found


class Cleaner:
    """Has the kernel forget UDP flows that are older than our redirection, or outlive it. Not thread-safe.

    A flow that somebody answers stays with who does: nothing is cut where we take a port over. One that nobody has
    answered in `WAIT` seconds is forgotten, and its next datagram is asked our rules.

    Attributes:
        count: flows that were forgotten.
    """

    def __init__(self) -> None:
        self.count = 0
        self._begun: dict[Frontend, _Begun] = {}

    def begin(self, ports: Mapping[Frontend, int]) -> None:
        """These frontends are redirected to these ports from now on; TCP has its own ends."""
        now = time.monotonic()
        udp = {f: port for f, port in ports.items() if f.protocol is Protocol.UDP}
        self._begun |= {f: _Begun(port, now + WAIT, now + LONGEST) for f, port in udp.items()}
        if udp:
            self.look(now)

    def end(self, ports: Mapping[Frontend, int]) -> None:
        """These frontends are no longer redirected to these ports."""
        for frontend in ports:
            self._begun.pop(frontend, None)
        udp = {f: port for f, port in ports.items() if f.protocol is Protocol.UDP}

        def work(conntrack: Conntrack) -> None:
            for frontend, port in udp.items():
                self._forget(conntrack, (e for e in conntrack.of(frontend) if e.port == port))

        if udp:
            _ask(work)

    def look(self, now: float) -> None:
        """To be called every second or so."""

        def work(conntrack: Conntrack) -> None:
            for frontend, begun in self._begun.items():
                old = {e.name: e for e in conntrack.of(frontend) if e.port != begun.port and not e.answered}
                if now >= begun.due:
                    self._forget(conntrack, (old[name] for name in old.keys() & begun.seen))
                    begun.due = now + WAIT
                begun.seen = begun.seen | old.keys()

        if self._begun:
            _ask(work)
            self._begun = {frontend: begun for frontend, begun in self._begun.items() if now < begun.until}

    def _forget(self, conntrack: Conntrack, entries: Iterable[Entry]) -> None:
        for entry in entries:
            conntrack.delete(entry)
            self.count += 1


@dataclass(slots=True)
class _Begun:
    """A frontend that has just begun to be redirected to `port`. Times are monotonic."""

    port: int
    due: float  # when who was seen unanswered is forgotten
    until: float
    seen: Set[bytes] = frozenset()


def _ask(work: Callable[[Conntrack], None]) -> None:
    """Have something done with connection tracking; where that is out of reach, it is logged."""
    try:
        conntrack = Conntrack()
        try:
            work(conntrack)
        finally:
            conntrack.close()
    except OSError as error:
        log.warning("old UDP flows may not find their service: connection tracking is out of reach", error=str(error))
