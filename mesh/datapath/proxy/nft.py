# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's nftables table, which redirects connections to it ahead of Docker's own rules.

It redirects only for as long as somebody refreshes it: once the process is killed, its ports are closed, and what has
the connections otherwise gets them again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import structlog

from mesh import _linux as nl
from mesh.datapath.netlink import Monitor, Netlink, attribute, attributes, groups
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Frontend, Protocol

log = structlog.get_logger("mesh")


PRIORITY: Final = -110  # ahead of Docker's chains, which are at dstnat, -100
LIFETIME: Final = 30.0  # seconds for which the table redirects without being refreshed, at most
MARGIN: Final = 0.5  # seconds before its end in which a table without its set may have ended already
ALIVE: Final = "alive"  # the set of protocols that are redirected


def monitor() -> Monitor:
    """Tells when somebody has changed nftables.

    Raises:
        DatapathError: the kernel does not announce it, or CAP_NET_ADMIN is missing.
    """
    return Monitor(groups(nl.NFNLGRP_NFTABLES), nl.NETLINK_NETFILTER)


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
        self._lifetime = lifetime
        self._expires = 0.0  # when it stops redirecting by itself, monotonic
        self._writer = f"{os.getpid()}-{time.monotonic_ns():x}"  # marks the rules as this process'

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

    def replace(self, ports: Mapping[Frontend, int]) -> None:
        """Redirect exactly these frontends to these ports. Without any the chains stay, for established flows.

        Raises:
            DatapathError: nft rejected the table; the former one stays.
        """
        rules = tuple(self._rules_of(ports))
        if rules != self._rules:
            self._write(rules)

    def _write(self, rules: tuple[str, ...]) -> None:
        chains = "".join(
            f"  chain {hook} {{\n    type nat hook {hook} priority {PRIORITY}; policy accept;\n"
            f'    meta l4proto != @{ALIVE} return comment "{self._writer}"\n'
            + "".join(f"    {rule}\n" for rule in rules)
            + "  }\n"
            for hook in ("prerouting", "output")
        )
        alive = f"  set {ALIVE} {{ type inet_proto; flags timeout; elements = {{ {self._elements} }} }}\n"
        table = f"table inet {self.name}"
        self._run(f"{table}\ndelete {table}\n{table} {{\n{alive}{chains}}}\n")
        self._rules = rules
        self._expires = time.monotonic() + self._lifetime

    def lost(self) -> bool:
        """Whether somebody else has deleted the table or part of it, since it was last replaced.

        The table of another process, which takes over from this one, is not lost.

        Raises:
            OSError: the kernel does not say.
        """
        if self._rules is None:
            return False
        netlink = Netlink(nl.NETLINK_NETFILTER)
        try:
            rules = list(self._dump(netlink, nl.NFT_MSG_GETRULE, {nl.NFTA_RULE_TABLE: self.name}))
            marks = [rule.get(nl.NFTA_RULE_USERDATA, b"") for rule in rules]
            if any(marks) and not any(self._writer.encode() in mark for mark in marks):
                return False
            if len(rules) != 2 * (1 + len(self._rules)):
                return True
            if not self._rules or time.monotonic() > self._expires - MARGIN:  # then it may have expired by itself
                return False
            names = {nl.NFTA_SET_ELEM_LIST_TABLE: self.name, nl.NFTA_SET_ELEM_LIST_SET: ALIVE}
            answers = self._dump(netlink, nl.NFT_MSG_GETSETELEM, names)
            return not any(each.get(nl.NFTA_SET_ELEM_LIST_ELEMENTS) for each in answers)
        finally:
            netlink.close()

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
        self._write(self._rules or ())

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

    def delete(self) -> None:
        """Delete the table. The flows that it redirected end, unless something else uses NAT on this host."""
        self._run(f"table inet {self.name}\ndelete table inet {self.name}\n")
        self._rules = None

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
