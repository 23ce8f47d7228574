# SPDX-License-Identifier: Apache-2.0
"""What `mesh check` finds out about DOCKER-USER, the chain for an operator's own rules on forwarded packets.

What mesh carries does not pass it: the kernel engine forwards past netfilter, and connections of the proxy engine end
at the node. docs/OPERATIONS.md, Firewall.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

from mesh.cli.check.finding import Finding, Level
from mesh.config.keys import Config

WHAT: Final = "firewall"
CHAIN: Final = "DOCKER-USER"
READERS: Final = (  # per IP version: what to try, in this order
    (("iptables-save", "-t", "filter"), ("nft", "list", "chain", "ip", "filter", CHAIN)),
    (("ip6tables-save", "-t", "filter"), ("nft", "list", "chain", "ip6", "filter", CHAIN)),
)
EVERYBODY: Final = ("0.0.0.0/0", "::/0")
GENERAL: Final = "say it to mesh: labels mesh.allow and mesh.deny on the services that it is meant for"


def check_firewall(config: Config) -> Iterator[Finding]:
    """Every rule of DOCKER-USER, with the label that says the same where there is one."""
    if config.provider == "demo":
        return
    rules: list[str] = []
    for readers in READERS:
        found = _read(readers)
        if isinstance(found, Finding):
            yield found
            return
        rules += found
    if not rules:
        yield Finding(WHAT, Level.OK, f"no rule in {CHAIN}")
    for rule in rules:
        yield Finding(WHAT, Level.WARN, f"does not apply to what mesh forwards: {rule}", remedy_for(rule))


def _read(readers: tuple[tuple[str, ...], ...]) -> list[str] | Finding:
    """The rules by the first reader that is installed; none installed: none. A finding where they cannot be read."""
    for command, *arguments in readers:
        path = shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            continue
        done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, timeout=10)
        if done.returncode == 0:
            return list(rules_of(done.stdout))
        if command == "nft" and os.geteuid() == 0:  # there is no such chain
            return []
        error = (done.stderr.strip().splitlines() or ["?"])[0]
        return Finding(WHAT, Level.WARN, f"{CHAIN} cannot be read: {error}", "run this as root")
    return []


def rules_of(text: str) -> Iterator[str]:
    """The rules of DOCKER-USER in what iptables-save or `nft list chain` print, but for Docker's own plain RETURN."""
    inside = False
    for line in text.splitlines():
        rule = line.strip()
        if rule.startswith("chain "):  # nft
            inside = rule.split()[1] == CHAIN
        elif inside and rule == "}":
            inside = False
        elif inside and rule and not rule.startswith(("type ", "policy ")):
            words = rule.split()
            if words[0] == "counter":
                words = words[5:]
            if words != ["return"]:
                yield f"{CHAIN} {rule}"
        elif rule.startswith(f"-A {CHAIN} ") and rule != f"-A {CHAIN} -j RETURN":
            yield rule.removeprefix("-A ")


def remedy_for(rule: str) -> str:
    """The label that says what an iptables rule about a source says, else that there are labels."""
    words = shlex.split(rule)
    target = words[words.index("-j") + 1] if "-j" in words[:-1] else ""
    if target not in ("DROP", "REJECT") or "-s" not in words[:-1]:
        return GENERAL
    at = words.index("-s")
    source, inverted = words[at + 1], words[at - 1] == "!"
    if source in EVERYBODY:
        return GENERAL
    return f"label mesh.{'allow' if inverted else 'deny'}={source} on the services that it is meant for"
