# SPDX-License-Identifier: Apache-2.0
"""Node certificates that cannot be used, what is said of them, and that a node whose relay does not listen says so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from mesh.cluster.credentials import CredentialsError, CredentialsWatch, load
from mesh.cluster.relay_client import RelayProvider
from mesh.cluster.relay_server import RelayServer
from mesh.config.keys import Config
from mesh.errors import plain
from tests.support.cluster_provider import make_provider
from tests.support.polling import until
from tests.support.ports import free_port
from tests.support.relay import Authority

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.mark.parametrize("content", ["", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
@pytest.mark.parametrize("broken", ["certificate", "key", "ca"])
def test_a_broken_file_is_named_with_the_way_out(authority: Authority, broken: str, content: str) -> None:
    files = authority.node("n1")
    path: Path = getattr(files, broken)
    path.write_text(content)
    with pytest.raises(CredentialsError) as caught:
        load(files)
    assert caught.value.where == str(path)
    assert caught.value.message == ("is no private key in PEM" if broken == "key" else "is no certificate in PEM")
    assert "leave the swarm and join again" in caught.value.remedy


def test_a_key_of_another_node_is_named(authority: Authority, tmp_path: Path) -> None:
    files = authority.node("n1")
    files.key.write_bytes(Authority(tmp_path).key)
    with pytest.raises(CredentialsError) as caught:
        load(files)
    assert (caught.value.where, caught.value.message) == (str(files.key), f"is not the key of {files.certificate}")


def test_a_certificate_out_of_its_time_is_a_problem(authority: Authority) -> None:
    for name, begins, ends, said in (
        ("good", NOW - DAY, NOW + DAY, ""),
        ("expired", NOW - 2 * DAY, NOW - DAY, "expired on"),
        ("early", NOW + DAY, NOW + 2 * DAY, "is this node's clock right?"),
    ):
        watch = CredentialsWatch(authority.node(name, begins, ends))
        watch.current()
        assert said in watch.problem()
        assert bool(watch.problem()) is bool(said)


def test_files_that_break_later_are_a_problem_and_the_old_ones_serve_on(authority: Authority) -> None:
    files = authority.node("n1")
    watch = CredentialsWatch(files)
    good = watch.current()
    text = files.key.read_bytes()
    files.key.write_text("garbage, longer than before")
    assert watch.current() is good
    assert "is no private key" in watch.problem()
    files.key.write_bytes(text)
    watch.current()
    assert not watch.problem()


def test_a_node_whose_certificate_is_removed_has_left_the_swarm(authority: Authority) -> None:
    files = authority.node("n1")
    watch = CredentialsWatch(files)
    assert not watch.left()  # none was ever used
    good = watch.current()
    assert not watch.left()
    files.certificate.unlink()
    assert watch.current() is good and watch.left()
    assert "has left the swarm" in watch.problem()


@contextlib.asynccontextmanager
async def running(*parts: object) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(part) for part in parts]  # type: ignore[call-overload]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [
        (NOW - 2 * DAY, NOW - DAY, "no TLS: certificate has expired"),
        (NOW + DAY, NOW + 2 * DAY, "no TLS: certificate is not yet valid"),
    ],
)
async def test_a_manager_out_of_its_time_is_told_in_plain_words(
    authority: Authority, begins: datetime, ends: datetime, said: str
) -> None:
    server = RelayServer(CredentialsWatch(authority.node("manager", begins, ends)), free_port())

    async def managers() -> list[tuple[str, int]]:
        return [("127.0.0.1", server.port)]

    client = RelayProvider(CredentialsWatch(authority.node("n1")), managers)
    async with running(server.run(), client.run(lambda inventory: None)):
        await until(lambda: said in client.status().error)
    assert client.status().error.startswith(f"manager 127.0.0.1:{server.port}: {said} (`mesh check --cluster` shows")


async def test_a_manager_whose_relay_cannot_listen_says_so(authority: Authority) -> None:
    """An autolocked swarm: without this its workers' agents learn nothing, and `mesh status` calls all well."""
    files = authority.node("n1")
    files.key.write_bytes(files.key.read_bytes().replace(b"BEGIN PRIVATE", b"BEGIN ENCRYPTED PRIVATE"))
    config = Config(
        docker_data_root=str(files.key.parents[2]),
        docker_host=f"unix://{authority.directory}/none.sock",
        docker_exec_root=str(authority.directory),
        cluster_port=free_port(),
    )
    provider = make_provider(config)
    async with running(provider.run(lambda inventory: None)):
        await until(lambda: provider.status().problems)
        (problem,) = provider.status().problems
    assert problem.startswith(f"cluster_port {config.cluster_port}: workers are told nothing from here: {files.key}")
    assert "autolocked" in problem


async def test_errors_of_connections_are_plain(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    for url, path, said in (
        ("http://docker/", tmp_path / "none.sock", "No such file or directory"),
        ("http://docker/", tmp_path / "dead.sock", "Connection refused"),
        (f"http://127.0.0.1:{free_port()}/", None, "Connection refused"),
    ):
        connector = aiohttp.UnixConnector(str(path)) if path else aiohttp.TCPConnector()
        async with aiohttp.ClientSession(connector=connector) as session:
            with pytest.raises(aiohttp.ClientError) as caught:
                await session.get(url)
        assert plain(caught.value) == said
    assert plain(TimeoutError()) == "no answer in time"
    assert plain(ValueError()) == "ValueError"
    assert plain(ssl.SSLError(1, "x")) == "no TLS: x"
