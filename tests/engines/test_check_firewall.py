# SPDX-License-Identifier: Apache-2.0
"""`mesh check` lists the firewall rules that what mesh forwards does not pass."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.cli.check.firewall import GENERAL, remedy_for, rules_of
from tests.support.lab.netns import Lab, Namespace

SAVED = """\
*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -s 203.0.113.0/24 -j DROP
-A DOCKER-USER -m comment --comment "the office's" -j LOG
-A DOCKER-USER -j RETURN
COMMIT
"""
LISTED = """\
table ip filter {
	chain DOCKER-USER {
		type filter hook forward priority filter; policy accept;
		ip saddr 203.0.113.0/24 counter packets 0 bytes 0 drop
		counter packets 7 bytes 420 return
		return
	}
}
"""


def test_rules_are_read_from_either_tool() -> None:
    assert list(rules_of(SAVED)) == [
        "DOCKER-USER -s 203.0.113.0/24 -j DROP",
        'DOCKER-USER -m comment --comment "the office\'s" -j LOG',
    ]
    assert list(rules_of(LISTED)) == ["DOCKER-USER ip saddr 203.0.113.0/24 counter packets 0 bytes 0 drop"]
    assert list(rules_of("")) == []


def test_the_remedy_is_the_label_that_says_the_same() -> None:
    assert "mesh.deny=203.0.113.0/24" in remedy_for("DOCKER-USER -s 203.0.113.0/24 -j DROP")
    assert "mesh.allow=10.0.0.0/8" in remedy_for("DOCKER-USER ! -s 10.0.0.0/8 -i eth0 -j REJECT --reject-with x")
    for other in (
        "DOCKER-USER -j DROP",
        "DOCKER-USER -s 10.0.0.0/8 -j ACCEPT",
        "DOCKER-USER -p tcp --dport 80 -j DROP",
        "DOCKER-USER ip saddr 203.0.113.0/24 counter packets 0 bytes 0 drop",
    ):
        assert remedy_for(other) == GENERAL


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Lab() as made:
        yield made.namespace("fw")


@pytest.mark.root
def test_check_lists_the_rules_of_this_namespace(namespace: Namespace, tmp_path: Path) -> None:
    (tmp_path / "services.toml").write_text("")
    command = [sys.executable, "-m", "mesh", "check", "--provider", "static"]
    command += ["--static-file", str(tmp_path / "services.toml"), "--state-dir", str(tmp_path / "state")]
    command += ["--engine", "proxy"]  # the finding is the same for both engines

    def findings() -> list[tuple[str, str, str]]:
        done = namespace.run(*command, "--json", check=False)
        return [(f["level"], f["found"], f["remedy"]) for f in json.loads(done.stdout) if f["what"] == "firewall"]

    assert findings() == [("ok", "no rule in DOCKER-USER", "")]
    for tool in ("iptables", "ip6tables"):
        namespace.run(tool, "-N", "DOCKER-USER")
        namespace.run(tool, "-A", "FORWARD", "-j", "DOCKER-USER")
        namespace.run(tool, "-A", "DOCKER-USER", "-j", "RETURN")
    assert findings() == [("ok", "no rule in DOCKER-USER", "")]
    namespace.run("iptables", "-I", "DOCKER-USER", "-s", "203.0.113.0/24", "-j", "DROP")
    namespace.run("iptables", "-I", "DOCKER-USER", "-p", "tcp", "--dport", "8080", "-j", "DROP")
    namespace.run("ip6tables", "-I", "DOCKER-USER", "!", "-s", "2001:db8::/32", "-j", "REJECT")
    found = findings()
    assert [level for level, _, _ in found] == ["warn"] * 3
    shown = {text.partition(": ")[2]: remedy for _, text, remedy in found}
    assert "mesh.deny=203.0.113.0/24" in shown["DOCKER-USER -s 203.0.113.0/24 -j DROP"]
    (sixth,) = [remedy for rule, remedy in shown.items() if "2001:db8::/32" in rule]
    assert "mesh.allow=2001:db8::/32" in sixth
    (port,) = [remedy for rule, remedy in shown.items() if "8080" in rule]
    assert port == GENERAL
    table = namespace.run(*command, check=False).stdout
    assert "warn: firewall: label mesh.deny=203.0.113.0/24" in table
