# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's nftables table, which redirects connections to it ahead of Docker's own rules.

It also keeps containers from the ports by which nodes hand flows to each other.

It redirects only for as long as somebody refreshes it: once the process is killed, its ports are closed, and what has
the connections otherwise gets them again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from mesh import _linux as nl
from mesh._abi import PASS_MARK
from mesh.datapath.netlink import Monitor, Netlink, attribute, attributes, groups
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol

log = structlog.get_logger("mesh")


PRIORITY: Final = -110  # ahead of Docker's chains, which are at dstnat, -100
LIFETIME: Final = 30.0  # seconds for which the table redirects without being refreshed, at most
MARGIN: Final = 0.5  # seconds before its end in which a table without its set may have ended already
ALIVE: Final = "alive"  # the set of protocols that are redirected
GUARD_PRIORITY: Final = -10  # ahead of the filter chains of Docker and others, at 0
DROPPED: Final = "containers_dropped"  # the guard's counter


@dataclass(frozen=True, slots=True)
class Guard:
    """What containers are kept from: UDP `tunnel`, TCP and UDP `peer` at the addresses of nodes."""

    nodes: tuple[Address, ...]
    tunnel: int
    peer: int

    def sets(self) -> Mapping[str, tuple[str, str]]:
        """The sets of nodes' addresses that are not empty: by name, the type and the elements."""
        by_version = {v: ", ".join(str(a) for a in self.nodes if a.version == v) for v in (4, 6)}
        named = {4: ("nodes_ip", "ipv4_addr"), 6: ("nodes_ip6", "ipv6_addr")}
        return {named[v][0]: (named[v][1], elements) for v, elements in by_version.items() if elements}

    def chains(self, writer: str) -> Iterator[str]:
        """The chains; a comment names `writer`.

        What this host forwards comes from somebody else, unless a node's own address says otherwise and the way back to
        it is the way by which it came. Docker gives what leaves a container the address of its node only later
        (postrouting), so containers are recognised here.
        """
        sets = self.sets()
        used = [name.removeprefix("nodes_") for name in sets]
        yield f"  counter {DROPPED} {{ }}\n"
        for name, (kind, elements) in sets.items():
            yield f"  set {name} {{ type {kind}; elements = {{ {elements} }} }}\n"
        yield "  chain strangers {\n"
        for family in used:
            yield f"    {family} saddr @nodes_{family} fib saddr . iif oif exists return\n"
        yield f'    counter name {DROPPED} drop comment "{writer}"\n  }}\n'
        yield f"  chain forward {{\n    type filter hook forward priority {GUARD_PRIORITY}; policy accept;\n"
        for family in used:
            for protocol, ports in (("udp", sorted({self.tunnel, self.peer})), ("tcp", [self.peer])):
                listed = ", ".join(map(str, ports))
                yield f"    {family} daddr @nodes_{family} {protocol} dport {{ {listed} }} jump strangers\n"
        yield "  }\n"


def monitor() -> Monitor:
    """Tells when somebody has changed nftables.

    Raises:
        DatapathError: the kernel does not announce it, or CAP_NET_ADMIN is missing.
    """
    return Monitor(groups(nl.NFNLGRP_NFTABLES), nl.NETLINK_NETFILTER)


def count_of(content: str) -> int:
    """The number of rules in a table's content, which has one on each line of a chain."""
    return sum(line.startswith("    ") and not line.startswith("    type ") for line in content.splitlines())


def table_name(state_dir: str) -> str:
    """The name of this instance's table: there is one per state directory."""
    return f"mesh_{hashlib.sha256(str(Path(state_dir).resolve()).encode()).hexdigest()[:8]}"


class NftTable:
    """This instance's table. Every change replaces all of it in one transaction.

    Args:
        lifetime: seconds for which it redirects without `refresh`.
    """

    def __init__(self, name: str, lifetime: float = LIFETIME) -> None:
        self.name = name
        self._elements = ", ".join(f"{protocol} timeout {lifetime * 1000:.0f}ms" for protocol in Protocol)
        self._rules: tuple[str, ...] | None = None
        self._guard: Guard | None = None
        self._redirects = False  # it has redirected at some time
        self._count = 0  # rules of all chains; 0: this process has not written it
        self._filled: tuple[str, ...] = ()  # sets that always have elements
        self._lifetime = lifetime
        self._expires = 0.0  # when it stops redirecting by itself, monotonic
        self.writer = f"{os.getpid()}-{time.monotonic_ns():x}"  # in a comment: the rules are this process'

    @staticmethod
    def usable() -> bool:
        """Whether the nft command exists and may list the ruleset."""
        if shutil.which("nft") is None:
            return False
        done = subprocess.run(["nft", "list", "tables"], capture_output=True, check=False, timeout=10)
        return done.returncode == 0

    def exists(self) -> bool:
        """Whether the table exists, whoever made it; False also where nft cannot be used."""
        if shutil.which("nft") is None:
            return False
        command = ["nft", "list", "table", "inet", self.name]
        try:
            return subprocess.run(command, capture_output=True, check=False, timeout=10).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False

    def delete_stale(self) -> None:
        """Delete the table that a killed process has left: it redirects to closed ports. Failures are logged."""
        try:
            if self.exists():
                self.delete()
        except DatapathError as error:
            log.warning("cannot delete the nftables table of an earlier process", error=str(error))

    def replace(self, ports: Mapping[Frontend, int], guard: Guard | None = None) -> None:
        """Redirect exactly these frontends to these ports. Without any the chains stay, for established flows.

        Args:
            guard: what containers are kept from; None: nothing.

        Raises:
            DatapathError: nft rejected the table; the former one stays.
        """
        rules = tuple(self._rules_of(ports))
        if rules != self._rules or guard != self._guard:
            self._write(rules, guard)

    def _write(self, rules: tuple[str, ...], guard: Guard | None) -> None:
        own = {"prerouting": "", "output": f"    meta mark {PASS_MARK} return\n"}
        chains = "".join(
            f"  chain {hook} {{\n    type nat hook {hook} priority {PRIORITY}; policy accept;\n{passed}"
            f'    meta l4proto != @{ALIVE} return comment "{self.writer}"\n'
            + "".join(f"    {rule}\n" for rule in rules)
            + "  }\n"
            for hook, passed in own.items()
        )
        self._redirects = self._redirects or bool(rules)
        alive = f"  set {ALIVE} {{ type inet_proto; flags timeout; elements = {{ {self._elements} }} }}\n"
        guards = "".join(guard.chains(self.writer)) if guard is not None else ""
        nat = f"{alive}{chains}" if self._redirects or guard is None else ""  # their hooks make the kernel track flows
        self.load(nat + guards, guard.sets() if guard is not None else ())
        self._rules, self._guard = rules, guard
        self._expires = time.monotonic() + self._lifetime

    def lost(self) -> bool:
        """Whether somebody else has deleted the table or part of it, since this process has written it.

        The table of another process, which takes over from this one, is not lost.

        Raises:
            OSError: the kernel does not say.
        """
        if not self._count:
            return False
        netlink = Netlink(nl.NETLINK_NETFILTER)
        try:
            rules = list(self._dump(netlink, nl.NFT_MSG_GETRULE, {nl.NFTA_RULE_TABLE: self.name}))
            marks = [rule.get(nl.NFTA_RULE_USERDATA, b"") for rule in rules]
            if any(marks) and not any(self.writer.encode() in mark for mark in marks):
                return False
            return len(rules) != self._count or any(self._is_empty(netlink, name) for name in self._sets())
        finally:
            netlink.close()

    def _sets(self) -> list[str]:
        """The sets that are never empty now."""
        found = list(self._filled)
        if self._rules and time.monotonic() < self._expires - MARGIN:  # later it may have expired by itself
            found.append(ALIVE)
        return found

    def _is_empty(self, netlink: Netlink, name: str) -> bool:
        names = {nl.NFTA_SET_ELEM_LIST_TABLE: self.name, nl.NFTA_SET_ELEM_LIST_SET: name}
        answers = list(self._dump(netlink, nl.NFT_MSG_GETSETELEM, names))
        return not any(each.get(nl.NFTA_SET_ELEM_LIST_ELEMENTS) for each in answers)

    @staticmethod
    def _dump(netlink: Netlink, message: int, names: Mapping[int, str]) -> Iterable[dict[int, bytes]]:
        head = nl.NFGENMSG.pack(nl.NfGenMsg(nfgen_family=nl.NFPROTO_INET))
        payload = head + b"".join(attribute(kind, name.encode() + b"\0") for kind, name in names.items())
        try:
            for body in netlink.request(nl.NFNL_SUBSYS_NFTABLES << 8 | message, nl.NLM_F_DUMP, payload):
                yield attributes(body, nl.NFGENMSG.size)
        except FileNotFoundError:  # the table, or the set in it
            return

    def restore(self) -> None:
        """Put the table as it was last replaced, and redirect for another lifetime.

        Raises:
            DatapathError: nft rejected it.
        """
        self._write(self._rules or (), self._guard)

    def refresh(self) -> None:
        """Redirect for another lifetime. Does nothing where nothing is redirected.

        Raises:
            DatapathError: nft rejected it; somebody else has deleted the table.
        """
        if not self._rules:
            return
        element = f"element inet {self.name} {ALIVE} {{ {self._elements} }}\n"
        protocols = f"element inet {self.name} {ALIVE} {{ {', '.join(map(str, Protocol))} }}\n"
        self._run(f"add {element}delete {protocols}add {element}")  # the first: an element may have expired
        self._expires = time.monotonic() + self._lifetime

    def load(self, content: str, filled: Iterable[str] = ()) -> None:
        """Replace the table by one with this content.

        Args:
            filled: names of the sets in it that always have elements; for `lost`.

        Raises:
            DatapathError: nft rejected it; the former one stays.
        """
        table = f"table inet {self.name}"
        self._run(f"{table}\ndelete {table}\n{table} {{\n{content}}}\n")
        self._count, self._filled = count_of(content), tuple(filled)

    def delete(self) -> None:
        """Delete the table. The flows that it redirected end, unless something else uses NAT on this host."""
        self._run(f"table inet {self.name}\ndelete table inet {self.name}\n")
        self._rules = self._guard = None
        self._count = 0

    @staticmethod
    def _rules_of(ports: Mapping[Frontend, int]) -> Iterable[str]:
        for protocol in Protocol:
            chosen = {f: port for f, port in sorted(ports.items()) if f.protocol is protocol}
            for frontend, port in chosen.items():
                if frontend.address != ANY_ADDRESS:
                    family = "ip6" if frontend.address.version == 6 else "ip"
                    yield f"{family} daddr {frontend.address} {protocol} dport {frontend.port} dnat to :{port}"
            pairs = ", ".join(f"{f.port} : {port}" for f, port in chosen.items() if f.address == ANY_ADDRESS)
            if pairs:
                yield f"fib daddr type local meta l4proto {protocol} dnat to :{protocol} dport map {{ {pairs} }}"

    def _run(self, script: str) -> None:
        try:
            done = subprocess.run(
                ["nft", "-f", "-"], input=script, text=True, capture_output=True, check=False, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DatapathError(
                f"cannot run nft: {error}", remedy='install nftables, or set intercept = "bind"'
            ) from None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise DatapathError(f"nft refused the table: {lines[0]}", where=f"nftables table inet {self.name}")
