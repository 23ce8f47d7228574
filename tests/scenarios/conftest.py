# SPDX-License-Identifier: Apache-2.0
"""The node on which all scenarios are applied, and --update-golden."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab.netns import Lab, run, veth

ROOT = Path(__file__).parents[2]
TASKS = 4  # interfaces of tasks: 172.31.0.11 and fd00:31::11, and so on
LIMIT = 600.0  # seconds for all scenarios


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the maps hold now to the golden files")


def node(lab: Lab) -> str:
    """A node 192.0.2.11 with docker_gwbridge and tasks. What is printed of it never changes: MACs and neighbours are
    fixed, and there are no link-local addresses."""
    here, tasks = lab.host("node"), lab.namespace("tasks")
    assert here.address == "192.0.2.11"
    for scope in ("default", "eth0"):
        here.run("sysctl", "-qw", f"net.ipv6.conf.{scope}.addr_gen_mode=1")
    here.ip("-6", "address", "flush", "dev", "eth0", "scope", "link")
    here.bridge("docker_gwbridge", "172.31.0.1/24", "fd00:31::1/64")
    for number in range(1, TASKS + 1):
        veth(here, f"task{number}", tasks, f"eth{number}")
        here.ip("link", "set", f"task{number}", "master", "docker_gwbridge")
    for number in range(1, TASKS + 1):  # not before: a bridge that gets another MAC forgets its neighbours
        mac = f"02:00:00:00:00:{number:02x}"
        here.run("bridge", "fdb", "replace", mac, "dev", f"task{number}", "master", "static")
        for address in (f"172.31.0.{10 + number}", f"fd00:31::{10 + number}"):
            here.ip("neigh", "replace", address, "lladdr", mac, "dev", "docker_gwbridge", "nud", "permanent")
    (lab.directory / "bpf").mkdir()
    run("mount", "-t", "bpf", "bpf", str(lab.directory / "bpf"))
    lab.on_close(lambda: run("umount", "-l", str(lab.directory / "bpf"), check=False))
    files = sorted(map(str, Path(__file__).parent.glob("*.toml")))
    command = (sys.executable, "-m", "tests.scenarios.apply", str(lab.directory), *files)
    return here.run(*command, cwd=ROOT, timeout=LIMIT).stdout


@pytest.fixture(scope="session")
def applied() -> Iterator[dict[str, str]]:
    """What the maps hold, by scenario: one process applies them in turn, each by an engine of its own."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with Lab() as lab:
        yield json.loads(node(lab))
