# SPDX-License-Identifier: Apache-2.0
"""The static file: what it says, where it is wrong, and that a broken edit changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.keys import Config
from mesh.errors import ConfigError, ProviderError
from mesh.model import Affinity, Intent, Inventory, ProbeKind, Protocol, PublishedPort
from mesh.providers.static import StaticProvider, parse_static
from tests.support.polling import until

GOOD = """\
[[services]]
name = "web"
[services.options]
affinity = "client-ip"
table-size = 65537
health = "http:/ready"
health-interval = "500ms"
allow = ["10.0.0.0/8", "2001:db8::/32"]
[[services.ports]]
published = 8000
target = 8080
[[services.ports]]
published = 53
target = 5353
protocol = "udp"
address = "192.0.2.1"
[[services.backends]]
name = "b"
address = "10.0.0.2"
draining = true
[[services.backends]]
name = "a"
address = "2001:db8::1"
port = 81
weight = 3

[[services]]
name = "api"
ports = [{ published = 8001, target = 80 }]
options = { enable = false, health = { check = "tcp", rise = 1 } }
"""


def test_a_file_becomes_an_inventory() -> None:
    found = parse_static(GOOD, "x.toml")
    api, web = found.services
    assert web.ports == (
        PublishedPort(53, 5353, Protocol.UDP, ipaddress.ip_address("192.0.2.1")),
        PublishedPort(8000, 8080, Protocol.TCP),
    )
    assert (web.options.affinity, web.options.table_size) == (Affinity.CLIENT_IP, 65537)
    assert (web.options.health.kind, web.options.health.path) == (ProbeKind.HTTP, "/ready")
    assert web.options.health.interval == 0.5
    assert [str(n) for n in web.options.allow] == ["10.0.0.0/8", "2001:db8::/32"]
    assert not api.options.enable
    assert api.options.health.rise == 1
    a, b = found.backends
    assert (a.id, a.service, a.port, a.weight, a.intent) == ("web/a", web.id, 81, 3, Intent.ACTIVE)
    assert (b.id, str(b.address), b.port, b.intent) == ("web/b", "10.0.0.2", 0, Intent.DRAINING)
    assert found.source == "static"


def test_an_empty_file_is_an_empty_inventory() -> None:
    assert parse_static("", "x.toml") == Inventory(source="static")


@pytest.mark.parametrize(
    ("edit", "line", "said"),
    [
        (("target = 8080", "target = 808000"), 11, "65535"),
        (("target = 8080", "targt = 8080"), 11, "did you mean target?"),
        (("target = 8080", "target = "), 11, "no TOML"),
        (("published = 53", 'published = "53"'), 13, "Expected `int`"),
        (("published = 8001", "published = 8000"), 29, "already published by service web"),
        (('protocol = "udp"', 'protocol = "sctp"'), 15, "sctp"),
        (('affinity = "client-ip"', 'affinity = "sticky"'), 4, "one of: client-ip, flow"),
        (('affinity = "client-ip"', 'afinity = "flow"'), 4, "did you mean affinity?"),
        (('health-interval = "500ms"', 'health-interval = "500"'), 7, "duration"),
        (('"10.0.0.0/8"', '"10.0.0.0/33"'), 8, "is not a network"),
        (("table-size = 65537", "table-size = 65536"), 5, "16381"),
        (("table-size = 65537", "table-size = [1]"), 5, "neither text"),
        (('address = "10.0.0.2"', 'address = "10.0.0.2:80"'), 19, "no address"),
        (('address = "10.0.0.2"', 'address = "0.0.0.0"'), 19, "cannot be connected to"),
        (('name = "a"', 'name = "b"'), 22, "another backend b"),
        (('name = "a"', 'name = "a b"'), 22, "regex"),
        (("weight = 3", "weight = -1"), 25, ">= 0"),
        (('name = "api"', 'name = "web"'), 28, "another service web"),
        (('[[services]]\nname = "api"', '[[service]]\nname = "api"'), 27, "did you mean services?"),
    ],
)
def test_an_error_names_line_and_remedy(edit: tuple[str, str], line: int, said: str) -> None:
    broken = GOOD.replace(*edit, 1)
    with pytest.raises(ProviderError) as caught:
        parse_static(broken, "x.toml")
    assert said in str(caught.value)
    assert caught.value.where == f"x.toml:{line}"


@given(st.text(alphabet=GOOD + "\"'[]{}=.#\n") | st.text())
def test_any_text_gives_an_inventory_or_an_error(text: str) -> None:
    with contextlib.suppress(ProviderError):
        parse_static(text, "x.toml")


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 40), st.text(max_size=8))
def test_any_edit_gives_an_inventory_or_an_error(at: int, length: int, text: str) -> None:
    with contextlib.suppress(ProviderError):
        parse_static(GOOD[:at] + text + GOOD[at + length :], "x.toml")


class Follower:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.provider = StaticProvider(Config(static_file=str(path)))
        self.inventories: list[Inventory] = []

    def replace(self, text: str) -> None:
        """As editors do: another file takes the name."""
        draft = self.path.with_suffix(".new")
        draft.write_text(text)
        os.replace(draft, self.path)  # noqa: PTH105


@contextlib.asynccontextmanager
async def following(path: Path) -> AsyncIterator[Follower]:
    follower = Follower(path)
    task = asyncio.create_task(follower.provider.run(follower.inventories.append))
    try:
        yield follower
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_changes_are_followed_and_broken_edits_are_not(tmp_path: Path) -> None:
    path = tmp_path / "services.toml"
    path.write_text(GOOD)
    async with following(path) as follower:
        status = follower.provider.status
        await until(lambda: len(follower.inventories) == 1)
        assert status().connected
        follower.replace(GOOD.replace("weight = 3", "weight = x"))
        await until(lambda: status().error)
        assert f"{path}:25" in status().error
        assert not status().connected
        assert len(follower.inventories) == 1
        path.unlink()
        await until(lambda: "No such file" in status().error)
        follower.replace(GOOD.replace("weight = 3", "weight = 4"))
        await until(lambda: len(follower.inventories) == 2)
        assert follower.inventories[-1].backends[0].weight == 4
        await until(lambda: status().connected)


async def test_reload_reads_at_once_and_publishes_only_changes(tmp_path: Path) -> None:
    path = tmp_path / "services.toml"
    path.write_text(GOOD)
    async with following(path) as follower:
        await until(lambda: follower.inventories)
        path.write_text(GOOD + "# nothing new\n")
        follower.provider.reload()
        await asyncio.sleep(0.3)
        assert len(follower.inventories) == 1
        path.write_text("")
        follower.provider.reload()
        await until(lambda: follower.inventories[-1] == Inventory(source="static"))


async def test_a_file_that_is_not_there_is_said_and_awaited(tmp_path: Path) -> None:
    path = tmp_path / "services.toml"
    async with following(path) as follower:
        await until(lambda: follower.provider.status().error)
        assert follower.provider.status().age_seconds is None
        path.write_bytes(b"name = '\xff'\n")
        await until(lambda: "not UTF-8" in follower.provider.status().error)
        path.write_text(GOOD)
        await until(lambda: follower.inventories)


def test_no_file_configured() -> None:
    with pytest.raises(ConfigError, match="static_file"):
        StaticProvider(Config())


def test_the_documented_example_is_right() -> None:
    document = (Path(__file__).parents[2] / "docs" / "OPERATIONS.md").read_text()
    example = document.split("## Static file")[1].split("```toml\n")[1].split("```")[0]
    found = parse_static(example, "OPERATIONS.md")
    assert [b.port for b in found.backends] == [8081]
    assert found.services[0].options.health.interval == 0.5


NODES = """\
[[services]]
name = "web"
[[services.ports]]
published = 80
target = 8080
[[services.backends]]
name = "near"
address = "10.0.0.1"
node = "one"
[[services.backends]]
name = "far"
address = "10.0.0.1"
node = "two"
[[services.backends]]
name = "shared"
address = "10.0.0.9"
[[nodes]]
name = "one"
address = "192.0.2.1"
[[nodes]]
name = "two"
address = "192.0.2.2"
engine = "proxy"
"""


def test_nodes_share_a_file_and_each_finds_itself() -> None:
    here = {name: parse_static(NODES, "f", lambda a, own=own: str(a) == own) for name, own in OWN.items()}
    for name, inventory in here.items():
        assert {(b.name, b.node, str(b.address), b.local) for b in inventory.backends} == {
            ("near", "one", "10.0.0.1" if name == "one" else "None", name == "one"),
            ("far", "two", "10.0.0.1" if name == "two" else "None", name == "two"),
            ("shared", name, "10.0.0.9", True),
        }
        assert [(n.id, str(n.address), n.engine) for n in inventory.nodes] == [
            ("one", "192.0.2.1", ""),
            ("two", "192.0.2.2", "proxy"),
        ]
    assert [b.id for b in here["one"].backends] == [b.id for b in here["two"].backends]


OWN = {"one": "192.0.2.1", "two": "192.0.2.2"}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('node = "two"', 'node = "three"', 13, "there is no node three"),
        ('name = "two"', 'name = "one"', 21, "there is another node one"),
        ('address = "192.0.2.2"', 'address = "here"', 22, "'here' is no address"),
        ('address = "192.0.2.1"', 'address = "192.0.2.9"', 17, "none of the nodes has an address of this host"),
    ],
)
def test_nodes_that_cannot_be(old: str, new: str, line: int, message: str) -> None:
    with pytest.raises(ProviderError, match=message) as caught:
        parse_static(
            NODES.replace(old, new, 1) if line != 13 else NODES.replace(old, new), "f", lambda a: str(a) == OWN["one"]
        )
    assert caught.value.where == f"f:{line}", caught.value


def test_this_host_is_asked_which_node_it_is() -> None:
    away = NODES.replace("192.0.2.", "203.0.113.")
    with pytest.raises(ProviderError, match="none of the nodes"):
        parse_static(away, "f")
    assert {b.name for b in parse_static(away.replace("203.0.113.1", "127.0.0.1"), "f").backends if b.local} == {
        "near",
        "shared",
    }
