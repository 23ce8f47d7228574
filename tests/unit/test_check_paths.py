# SPDX-License-Identifier: Apache-2.0
"""`mesh check` before the first start: what is said of each port of other nodes, and which nodes Docker lists."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest

from mesh.cli.check.docker import others
from mesh.cli.check.finding import Finding, Level
from mesh.cli.check.host import check_host
from mesh.cli.check.paths import Other, Port, check_paths, finding, summed
from mesh.config.keys import Config
from tests.support.ports import free_port

TWO = Other("two", ipaddress.ip_address("192.0.2.2"))


@pytest.mark.parametrize(
    ("protocol", "found", "agent", "level", "word"),
    [
        ("tcp", "", True, Level.OK, "open, mesh answers"),
        ("tcp", "nobody listens", False, Level.OK, "open, nobody listens there yet"),
        ("udp", "nobody listens", False, Level.OK, "open, nobody listens there yet"),
        ("tcp", "no answer", False, Level.FAIL, "blocked, no answer"),
        ("udp", "no answer", True, Level.FAIL, "blocked, no answer"),
        ("udp", "no answer", False, Level.WARN, "unknown, neither mesh nor the kernel there answers"),
        ("udp", "not permitted", False, Level.WARN, "unknown, without the right to see packets"),
        ("tcp", "No route to host", False, Level.FAIL, "blocked, no route to host"),
    ],
)
def test_a_port_is_open_blocked_or_unknown(protocol: str, found: str, agent: bool, level: Level, word: str) -> None:
    said = finding(TWO, Port("peer port", protocol, 9552, found), agent=agent)
    assert (said.level, said.found) == (level, f"192.0.2.2 {protocol} 9552: {word}")
    assert bool(said.remedy) == (level is not Level.OK)
    if level is Level.FAIL:
        assert f"{protocol.upper()} 9552" in said.remedy


def test_closed_ports_are_answered_by_the_kernel() -> None:
    config = Config(engine="proxy", cluster_port=free_port(), peer_port=free_port())
    found = list(check_paths(config, None, [Other("two", ipaddress.ip_address("127.0.0.1"))]))
    assert [f.what for f in found] == ["two control port tcp", "two peer port tcp", "two peer port udp"]
    assert all(f.level is Level.OK and "open, nobody listens" in f.found for f in found)
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with silent:
        silent.bind(("127.0.0.1", config.peer_port))
        found = list(check_paths(config, None, [Other("two", ipaddress.ip_address("127.0.0.1"))]))
    assert [f.level for f in found] == [Level.OK, Level.OK, Level.WARN]


def test_nodes_that_are_down_are_not_tried() -> None:
    for other in (Other("two", TWO.address, up=False), Other("two", None)):
        (said,) = check_paths(Config(engine="proxy"), None, [other])
        assert said.level is Level.WARN and "not tried" in said.found


def test_which_nodes_docker_lists() -> None:
    def node(name: str, address: str, manager: str = "", state: str = "ready") -> dict[str, object]:
        shown: dict[str, object] = {
            "ID": name,
            "Description": {"Hostname": f"host-{name}"},
            "Status": {"State": state, "Addr": address},
        }
        return shown | ({"ManagerStatus": {"Addr": manager}} if manager else {})

    swarm = {
        "NodeID": "a",
        "RemoteManagers": [{"NodeID": "a", "Addr": "192.0.2.1:2377"}, {"NodeID": "b", "Addr": "[2001:db8::2]:2377"}],
    }
    listed = [
        node("a", "192.0.2.1"),
        node("b", "0.0.0.0", "192.0.2.2:2377"),
        node("c", "192.0.2.3", state="down"),
        node("d", "127.0.0.1", "192.0.2.4:2377"),
    ]
    assert [(o.name, str(o.address), o.up) for o in others(swarm, listed)] == [
        ("host-b", "192.0.2.2", True),
        ("host-c", "192.0.2.3", False),
        ("host-d", "192.0.2.4", True),
    ]
    assert [(o.name, str(o.address)) for o in others(swarm, [])] == [("manager [2001:db8::2]:2377", "2001:db8::2")]


def test_the_sum() -> None:
    ok, warn, fail = (Finding("x", level, "y") for level in Level)
    assert summed([ok, ok, warn, fail]) == "2 ok, 1 warning, 1 error"
    assert summed([warn, warn]) == "0 ok, 2 warnings, 0 errors"


def test_the_static_file_is_parsed(tmp_path: Path) -> None:
    def said(text: str) -> Finding:
        (tmp_path / "services.toml").write_text(text)
        config = Config(
            engine="proxy",
            provider="static",
            static_file=str(tmp_path / "services.toml"),
            state_dir=str(tmp_path),
            http_listen="",
        )
        (found,) = [each for each in check_host(config) if each.what == "static file"]
        return found

    good = '[[services]]\nname = "web"\nports = [{ published = 80, target = 8080 }]\n'
    good += '[[services.backends]]\nname = "a"\naddress = "192.0.2.9"\n'
    found = said(good)
    assert found.level is Level.OK and "1 services, 1 backends" in found.found, found
    found = said(good.replace("192.0.2.9", "nowhere"))
    assert found.level is Level.FAIL and "services.toml:6" in found.found and "no address" in found.found
    assert said("[[services").level is Level.FAIL
