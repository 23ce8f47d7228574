# SPDX-License-Identifier: Apache-2.0
"""Call a service with rules while the daemon is stopped or killed: whoever has the port then lets everybody in
(issue 12, item 14).
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh._maglev import SlotTable
from mesh.config.keys import Config
from mesh.datapath.base import FrontendEntry
from mesh.datapath.losses import Losses
from mesh.datapath.stop_rules import StopRules, closed_table, rules
from mesh.model import ANY_ADDRESS, Frontend, FrontendState, Protocol, ServiceOptions
from tests.support.lab.netns import Lab, Namespace
from tests.support.polling import wait_for

PORTS = {"open": 8000, "deny": 8001, "allow": 8002, "nobody": 8003, "closed": 8004, "one": 8005, "six": 8006}


def entries(client: Namespace, node: Namespace) -> dict[Frontend, FrontendEntry]:
    networks = [ipaddress.ip_network(text) for text in (client.address, client.address6)]
    options = {
        "open": ServiceOptions(),
        "deny": ServiceOptions(deny=(ipaddress.ip_network("198.51.100.0/24"), networks[0], networks[1])),
        "allow": ServiceOptions(allow=(ipaddress.ip_network("198.51.100.0/24"), networks[1])),
        "nobody": ServiceOptions(deny=(ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))),
        "closed": ServiceOptions(allow=(networks[0],), fail_closed=True),
        "one": ServiceOptions(deny=(networks[0],)),
        "six": ServiceOptions(allow=(ipaddress.ip_network("::/0"),)),
    }
    found = {}
    for name, port in PORTS.items():
        address = ipaddress.ip_address(node.address) if name == "one" else ANY_ADDRESS
        for protocol in Protocol:
            frontend = Frontend(address, port, protocol)
            state = FrontendState(frontend, name, name, options[name])
            found[frontend] = FrontendEntry(state, SlotTable.uniform(1021, 0), ())
    return found


def test_without_rules_there_is_nothing_but_a_chain() -> None:
    state = FrontendState(Frontend(ANY_ADDRESS, 80, Protocol.TCP), "s", "s", ServiceOptions())
    content, sets = rules([state])
    assert "drop" not in content and not sets


@contextlib.contextmanager
def docker(node: Namespace) -> Iterator[None]:
    """Somebody who has all ports, as Docker's own mesh has, and answers everybody."""
    sockets = []
    with node.entered():
        for port in PORTS.values():
            sockets.append(socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True))
    yield
    for sock in sockets:
        sock.close()


def reached(caller: Namespace, address: str) -> set[str]:
    """Names of the services whose port accepts a connection."""
    sockets = {}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with caller.entered():
        for name, port in PORTS.items():
            sock = sockets[name] = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(0.4)
            with contextlib.suppress(OSError):
                sock.connect((address, port))
    found = {name for name, sock in sockets.items() if _connected(sock)}
    for sock in sockets.values():
        sock.close()
    return found


def _connected(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return bool(sock.getpeername())
    return False


@pytest.mark.root
def test_rules_stay_in_nftables_while_nobody_runs(tmp_path: Path) -> None:
    with Lab() as lab:
        client, node = lab.host("client"), lab.host("node")
        config = Config(state_dir=str(tmp_path / "state"), on_stop="closed")
        with docker(node), node.entered():
            assert reached(client, node.address) == set(PORTS)
            everything = entries(client, node)
            closing = StopRules(config)
            assert closing.apply(everything) == ""
            assert closing.apply(everything) == ""  # nothing to do
            # Whatever ends the agent now, the table stays.
            assert reached(client, node.address) == {"open", "closed"}
            assert reached(client, node.address6) == {"open", "allow", "one", "six"}
            for address in (node.address, node.address6, "127.0.0.1"):
                assert reached(node, address) == set(PORTS), "processes of the node are admitted"
            closing.close()
            again = StopRules(Config(state_dir=config.state_dir))  # on_stop = open now: only who asks for it
            assert again.apply(everything) == ""
            assert reached(client, node.address) == set(PORTS)
            assert reached(client, node.address6) == set(PORTS) - {"closed"}
            assert again.apply({}) == ""
            assert closed_table(config.state_dir) not in node.run("nft", "list", "tables").stdout
            assert reached(client, node.address6) == set(PORTS)


@pytest.mark.root
@pytest.mark.parametrize(
    "command",
    ["flush ruleset", "delete table inet NAME", "flush chain inet NAME prerouting", "flush set inet NAME n0"],
)
def test_what_somebody_removes_is_put_back(tmp_path: Path, command: str) -> None:
    """`systemctl restart nftables` does, while the agent runs; and while none runs, for the next one."""
    with Lab() as lab:
        client, node = lab.host("client"), lab.host("node")
        config = Config(state_dir=str(tmp_path / "state"), on_stop="closed")
        name = closed_table(config.state_dir)

        def table() -> str:
            return node.run("nft", "-s", "list", "table", "inet", name, check=False).stdout

        with node.entered():
            losses = Losses()
            closing = StopRules(config, losses)
            assert closing.apply(entries(client, node)) == ""
            whole = table()
            node.run("nft", *command.replace("NAME", name).split())
            wait_for(lambda: table() == whole)
            wait_for(lambda: (losses.count, losses.missing) == (1, []))
            closing.close()
            node.run("nft", *command.replace("NAME", name).split())
            later = StopRules(config)
            assert later.apply(entries(client, node)) == ""
            assert re.sub("comment.*", "", table()) == re.sub("comment.*", "", whole)
            later.close()


@pytest.mark.root
def test_a_process_that_takes_over_has_its_own_table(tmp_path: Path) -> None:
    """The process before does not put back what its successor has changed."""
    with Lab() as lab:
        client, node = lab.host("client"), lab.host("node")
        config = Config(state_dir=str(tmp_path / "state"), on_stop="closed")
        with node.entered():
            before, after = Losses(), Losses()
            first, second = StopRules(config, before), StopRules(config, after)
            everything = entries(client, node)
            assert first.apply(everything) == ""
            some = {f: entry for f, entry in everything.items() if f.port == PORTS["nobody"]}
            assert second.apply(some) == ""
            first._look()
            assert (before.count, after.count) == (0, 0)
            assert str(PORTS["deny"]) not in node.run("nft", "list", "ruleset").stdout
            first.close()
            second.close()
