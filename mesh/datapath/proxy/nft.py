# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's nftables table, which redirects connections to it ahead of Docker's own rules.

It also keeps containers from the ports by which nodes hand flows to each other.

It redirects only for as long as somebody refreshes it: once the process is killed, its ports are closed, and what has
the connections otherwise gets them again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from mesh._abi import PASS_MARK
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Address, Frontend, Protocol

log = structlog.get_logger("mesh")


PRIORITY: Final = -110  # ahead of Docker's chains, which are at dstnat, -100
LIFETIME: Final = 30.0  # seconds for which the table redirects without being refreshed, at most
ALIVE: Final = "alive"  # the set of protocols that are redirected
GUARD_PRIORITY: Final = -10  # ahead of the filter chains of Docker and others, at 0
DROPPED: Final = "containers_dropped"  # the guard's counter


@dataclass(frozen=True, slots=True)
class Guard:
    """What containers are kept from: UDP `tunnel`, TCP and UDP `peer` at the addresses of nodes."""

    nodes: tuple[Address, ...]
    tunnel: int
    peer: int

    def chains(self) -> Iterator[str]:
        """The chains. What this host forwards comes from somebody else, unless a node's own address says otherwise and
        the way back to it is the way by which it came. Docker gives what leaves a container the address of its node
        only later (postrouting), so containers are recognised here."""
        by_family = {
            "ip": ("ipv4_addr", [str(a) for a in self.nodes if a.version == 4]),
            "ip6": ("ipv6_addr", [str(a) for a in self.nodes if a.version == 6]),
        }
        used = {family: what for family, what in by_family.items() if what[1]}
        yield f"  counter {DROPPED} {{ }}\n"
        for family, (kind, addresses) in used.items():
            yield f"  set nodes_{family} {{ type {kind}; elements = {{ {', '.join(addresses)} }} }}\n"
        yield "  chain strangers {\n"
        for family in used:
            yield f"    {family} saddr @nodes_{family} fib saddr . iif oif exists return\n"
        yield f"    counter name {DROPPED} drop\n  }}\n"
        yield f"  chain forward {{\n    type filter hook forward priority {GUARD_PRIORITY}; policy accept;\n"
        for family in used:
            for protocol, ports in (("udp", sorted({self.tunnel, self.peer})), ("tcp", [self.peer])):
                listed = ", ".join(map(str, ports))
                yield f"    {family} daddr @nodes_{family} {protocol} dport {{ {listed} }} jump strangers\n"
        yield "  }\n"


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
        if rules == self._rules and guard == self._guard:
            return
        own = {"prerouting": "", "output": f"    meta mark {PASS_MARK} return\n"}
        chains = "".join(
            f"  chain {hook} {{\n    type nat hook {hook} priority {PRIORITY}; policy accept;\n{passed}"
            f"    meta l4proto != @{ALIVE} return\n" + "".join(f"    {rule}\n" for rule in rules) + "  }\n"
            for hook, passed in own.items()
        )
        self._redirects = self._redirects or bool(rules)
        alive = f"  set {ALIVE} {{ type inet_proto; flags timeout; elements = {{ {self._elements} }} }}\n"
        guards = "".join(guard.chains()) if guard is not None else ""
        nat = f"{alive}{chains}" if self._redirects or guard is None else ""  # their hooks make the kernel track flows
        self.load(nat + guards)
        self._rules, self._guard = rules, guard

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

    def load(self, content: str) -> None:
        """Replace the table by one with this content.

        Raises:
            DatapathError: nft rejected it; the former one stays.
        """
        table = f"table inet {self.name}"
        self._run(f"{table}\ndelete {table}\n{table} {{\n{content}}}\n")

    def delete(self) -> None:
        """Delete the table. The flows that it redirected end, unless something else uses NAT on this host."""
        self._run(f"table inet {self.name}\ndelete table inet {self.name}\n")
        self._rules = self._guard = None

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
