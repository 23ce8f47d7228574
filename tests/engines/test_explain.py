# SPDX-License-Identifier: Apache-2.0
"""`mesh explain` over a running daemon: the tables and, with the kernel engine, the loaded program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh import _bpf
from tests.engines.topology import UDP, WEB, Topology
from tests.support import peers

pytestmark = pytest.mark.root


def explain(topology: Topology, source: str, port: int, to: int, *options: str) -> subprocess.CompletedProcess[str]:
    state = str(topology.lab.directory / "mesh" / "state")
    command = [sys.executable, "-m", "mesh", "explain", f"{source}:{port}", f"{topology.node.address}:{to}"]
    return topology.node.run(*command, "--state-dir", state, *options, check=False)


def answer(topology: Topology, port: int, to: int = WEB, *options: str) -> Any:
    return json.loads(explain(topology, topology.client.address, port, to, "--json", *options).stdout)


def test_tables_and_program_say_where_traffic_goes(topology: Topology) -> None:
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "5", "-c", "1", "-p", "29100", "-v")
    for port, name in report.seen:
        told = answer(topology, port)
        assert told["backend"]["name"].endswith(name)
        if topology.engine == "proxy":
            assert (told["program"], told["agree"]) == (None, None)
        else:
            assert told["agree"] is True
            assert told["program"]["backend"] == told["backend"]
            assert (told["program"]["slot"], told["program"]["hash"]) == (told["slot"], told["hash"])
    told = answer(topology, 29100, UDP, "--proto", "udp")
    assert told["agree"] is (True if topology.engine == "kernel" else None)


def test_the_table_shows_both(topology: Topology) -> None:
    done = explain(topology, topology.client.address, 29100, WEB)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("program")]
    assert done.returncode == 0
    assert ("agrees: " if topology.engine == "kernel" else "none: this engine") in line
    assert explain(topology, topology.client.address, 29100, 4711).returncode == 4


def test_a_denied_client_is_denied_by_both(topology: Topology) -> None:
    web, *others = topology.default()
    web.options["deny"] = f"{topology.client.address}/32"
    topology.change(web, *others)
    told = answer(topology, 29100)
    assert told["backend"] is None and any("mesh.deny" in reason for reason in told["reasons"])
    if topology.engine == "kernel":
        assert (told["agree"], told["program"]["verdict"]) == (True, "denied")
    assert explain(topology, topology.client.address, 29100, WEB).returncode == 1


@contextmanager
def taken_from_the_program(topology: Topology) -> Iterator[None]:
    """A published port that the loaded program does not know any more, behind the daemon's back."""
    (pin,) = Path(topology.bpf_fs()).glob("mesh/*/*/mesh_ports")
    ports = _bpf.Mapping(_bpf.Map.open(str(pin)))
    offset = WEB * ports.step
    word = ports.load32(offset)
    assert word
    ports.store32(offset, 0)
    try:
        yield
    finally:
        ports.store32(offset, word)


@pytest.mark.bpf
@pytest.mark.only("kernel")
def test_a_disagreement_is_shouted_about(topology: Topology) -> None:
    with taken_from_the_program(topology):
        done = explain(topology, topology.client.address, 29100, WEB)
        told = answer(topology, 29100)
    assert done.returncode == 1
    assert "DISAGREES: not ours" in done.stdout and "THE LOADED PROGRAM AND THE TABLES DISAGREE" in done.stdout
    assert told["agree"] is False and told["backend"]
    assert answer(topology, 29100)["agree"] is True
