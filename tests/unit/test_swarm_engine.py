# SPDX-License-Identifier: Apache-2.0
"""A peer on Docker's socket that answers garbage, half, late or nothing: the last good state serves on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from mesh.config.keys import Config
from mesh.errors import ConfigError, ProviderError
from mesh.model import Inventory
from mesh.providers.swarm import SwarmProvider, detect
from mesh.providers.swarm.decode import NO_GATEWAY, Answers
from mesh.providers.swarm.engine import Engine, engine_url
from mesh.providers.swarm.local_node import LocalView, decode_local, keep_role
from mesh.providers.swarm.watch import plain_key, tls_context, watch, watch_request
from tests.support.polling import PATIENCE, until

PORT = {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8000, "PublishMode": "ingress"}
STATUS = {"State": "running", "ContainerStatus": {"ContainerID": "c1"}}
GOOD: dict[str, object] = {
    "/version": {"ApiVersion": "1.41", "MinAPIVersion": "1.12"},
    "/info": {"Swarm": {"NodeID": "n1", "LocalNodeState": "active", "ControlAvailable": True}},
    "/services": [{"ID": "s1", "Spec": {"Name": "web"}, "Endpoint": {"Ports": [PORT]}}],
    "/tasks": [{"ID": "t1", "ServiceID": "s1", "NodeID": "n1", "Status": STATUS, "DesiredState": "running"}],
    "/nodes": [{"ID": "n1"}],
    "/containers/json": [{"Id": "c1"}],
    "/containers/json?health": [],
    "/networks/docker_gwbridge": {"Name": "docker_gwbridge", "Containers": {"c1": {"IPv4Address": "172.18.0.3/16"}}},
}


def http(body: bytes, *, length: int | None = None, status: str = "200 OK") -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode() + body


class Peer:
    """Answers raw bytes on a Unix socket; `answer` maps a path to them, None: never."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[str] = []
        self.events: list[asyncio.StreamWriter] = []
        self.answer: Callable[[str], bytes | None] = self.good

    @staticmethod
    def good(path: str) -> bytes:
        bare = path.partition("?")[0]
        key = bare + "?health" if "health" in path else bare
        return http(json.dumps(GOOD[key]).encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split(b" ")[1].decode()
                path = "/" + path.split("/", 2)[2] if path.startswith("/v1") else path
                self.asked.append(path)
                if path.startswith("/events"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
                    self.events.append(writer)
                    continue
                reply = self.answer(path)
                if reply is None:
                    continue
                writer.write(reply)
                await writer.drain()
                if not reply.startswith(b"HTTP/1.1 200") or reply.endswith(b"#"):
                    break
        writer.close()


@contextlib.asynccontextmanager
async def peer_in(directory: Path) -> AsyncIterator[Peer]:
    made = Peer(directory / "docker.sock")
    server = await asyncio.start_unix_server(made.serve, made.path)
    yield made
    server.close()


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[Peer]:
    with tempfile.TemporaryDirectory() as directory:
        async with peer_in(Path(directory)) as made:
            yield made


@pytest_asyncio.fixture
async def engine(peer: Peer) -> AsyncIterator[Engine]:
    made = Engine(f"unix://{peer.path}", request_seconds=PATIENCE)
    yield made
    await made.close()


BAD: dict[str, bytes] = {
    "closed": b"#",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n#",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le#",
    "half a body": http(b'[{"ID": "s1"', length=500) + b"#",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n[#",
    "a wrong chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n[#",
    "wrong compression": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "a wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n[]#",
    "a long head": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n[]#",
    "no JSON": http(b"<html>"),
    "other JSON": http(b'{"message": 7}'),
    "null": http(b"null"),
    "no text": http(b'["\xff\xfe"]'),
    "an error": http(b'{"message": "swarm is locked"}', status="503 X"),
    "a redirect": b"HTTP/1.1 307 X\r\nLocation: ::::\r\nContent-Length: 0\r\n\r\n",
}
PATHS = ["/version", "/info", "/services", "/tasks", "/nodes", "/containers/json", "/networks/docker_gwbridge"]


async def test_no_answer_is_a_provider_error() -> None:
    """One path of each peer stays without; all at once, for each takes its time."""
    from mesh.providers.swarm.decode import decode

    async def ask(path: str, directory: str) -> None:
        async with peer_in(Path(directory)) as peer:
            peer.answer = lambda asked: None if asked.startswith(path) else peer.good(asked)
            engine = Engine(f"unix://{peer.path}", request_seconds=2.0)
            with pytest.raises(ProviderError) as caught:
                decode(await engine.read())
            assert path in caught.value.where
            await engine.close()

    with contextlib.ExitStack() as stack:
        directories = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in PATHS]
        await asyncio.gather(*map(ask, PATHS, directories))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", BAD)
async def test_a_bad_answer_is_a_provider_error(peer: Peer, engine: Engine, how: str, path: str) -> None:
    from mesh.providers.swarm.decode import decode

    peer.answer = lambda asked: BAD[how] if asked.startswith(path) else peer.good(asked)
    with pytest.raises(ProviderError) as caught:
        decode(await engine.read())
    assert path in caught.value.where


async def test_a_good_answer(peer: Peer, engine: Engine) -> None:
    from mesh.providers.swarm.decode import decode

    (backend,) = decode(await engine.read()).inventory.backends
    assert (backend.id, str(backend.address)) == ("t1", "172.18.0.3")


@pytest.mark.parametrize(
    ("networks", "named"),
    [
        ([{"Name": "ingress", "Ingress": True, "Options": {"encrypted": "", "vxlanid_list": "4096"}}], "ingress"),
        ([{"Name": "ingress", "Ingress": True, "Options": {"vxlanid_list": "4096"}}], ""),
        ([{"Name": "ingress", "Ingress": True, "Options": None}], ""),
        ([{"Name": "mine", "Ingress": False, "Options": {"encrypted": ""}}], ""),
        ([], ""),
    ],
)
async def test_an_encrypted_ingress_network_is_noticed(
    peer: Peer, engine: Engine, networks: list[object], named: str
) -> None:
    peer.answer = lambda path: http(json.dumps(networks).encode()) if "/networks" in path else peer.good(path)
    assert await engine.encrypted_ingress() == named


async def test_an_engine_over_tcp(peer: Peer) -> None:
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = Engine(f"tcp://127.0.0.1:{port}")
    assert await made.negotiate() == "1.41"
    await made.close()
    server.close()


async def test_no_gateway_network_yet(peer: Peer, engine: Engine) -> None:
    from mesh.providers.swarm.decode import decode

    def answer(path: str) -> bytes:
        return http(b'{"message": "no such network"}', status="404 X") if "gwbridge" in path else peer.good(path)

    peer.answer = answer
    (backend,) = decode(await engine.read()).inventory.backends
    assert backend.address is None


@pytest.mark.parametrize(
    ("newest", "oldest", "chosen"),
    [("1.41", "1.12", "1.41"), ("1.99", "1.44", "1.51"), ("1.99", "1.60", "1.60"), ("2.0", "2.0", "2.0")],
)
async def test_version_is_negotiated(peer: Peer, engine: Engine, newest: str, oldest: str, chosen: str) -> None:
    peer.answer = lambda _: http(json.dumps({"ApiVersion": newest, "MinAPIVersion": oldest}).encode())
    assert await engine.negotiate() == chosen


@pytest.mark.parametrize("line", [b"garbage\n", b'{"Type": 7}\n', b"[]\n", b"\xff\n", b"x" * 5_000_000])
async def test_bad_events_are_provider_errors(peer: Peer, engine: Engine, line: bytes) -> None:
    with pytest.raises(ProviderError):
        async for event in engine.events():
            assert event is None
            peer.events[0].write(line)


async def test_the_end_of_events_is_a_provider_error(peer: Peer, engine: Engine) -> None:
    with pytest.raises(ProviderError, match="ended"):
        async for _ in engine.events():
            peer.events[0].close()


@pytest.mark.parametrize(
    "host", ["", "docker.sock", "unix://", "ssh://host", "npipe:////./pipe/docker", "tcp://", "tcp://h:x"]
)
def test_no_address_of_an_engine(host: str) -> None:
    with pytest.raises(ConfigError, match="docker_host"):
        engine_url(host)
    with pytest.raises(ConfigError):
        SwarmProvider(Config(docker_host=host))


@pytest.mark.parametrize("how", BAD)
async def test_the_last_good_state_serves_on(peer: Peer, how: str) -> None:
    config = Config(
        docker_host=f"unix://{peer.path}",
        docker_exec_root="/nonexistent",
        state_dir=str(peer.path.parent),
        docker_poll_interval=0.05,
    )
    provider, published = SwarmProvider(config), list[Inventory]()
    running = asyncio.create_task(provider.run(published.append))
    try:
        await until(lambda: published)
        peer.answer = lambda path: BAD[how] if path.startswith("/tasks") else peer.good(path)
        await until(lambda: provider.status().error)
        status = provider.status()
        assert not status.connected
        assert status.age_seconds is not None
        assert "/tasks" in status.error
        peer.answer = peer.good
        await until(lambda: provider.status().connected)
        assert len(published) == 1
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert running.cancelled()


async def test_who_follows_again_is_told_again(peer: Peer) -> None:
    """As an agent does whose node was a manager before."""
    provider = SwarmProvider(
        Config(docker_host=f"unix://{peer.path}", docker_exec_root="/nonexistent", state_dir=str(peer.path.parent))
    )
    for _ in range(2):
        published = list[Inventory]()
        running = asyncio.create_task(provider.run(published.append))
        await until(lambda: published)  # noqa: B023
        running.cancel()
        await asyncio.wait([running])


def test_an_engine_that_starts_or_ends_does_not_know_its_role() -> None:
    """One that ends called itself inactive, and its worker's agent took itself for a manager, whose Engine is away."""

    def look(state: str, control: bool) -> LocalView:
        swarm = {"NodeID": "n1" if control else "", "LocalNodeState": state, "ControlAvailable": control}
        info = json.dumps({"Swarm": swarm}).encode()
        return decode_local(Answers(info, b"[]", b"[]", b"[]", b"[]", b"[]", NO_GATEWAY))

    worker = LocalView("n1", worker=True, managers={"m": "192.0.2.9"})
    starting = keep_role(look("pending", False), worker)
    assert (starting.node, starting.worker, starting.managers) == ("n1", True, {"m": "192.0.2.9"})
    assert keep_role(look("inactive", False), worker) == starting
    promoted = keep_role(look("active", True), worker)
    assert (promoted.node, promoted.worker, promoted.managers) == ("n1", False, {})


async def test_a_death_is_published_without_a_read(peer: Peer) -> None:
    config = Config(
        docker_host=f"unix://{peer.path}",
        docker_exec_root="/nonexistent",
        state_dir=str(peer.path.parent),
        docker_poll_interval=3600,
    )
    provider, published = SwarmProvider(config), list[Inventory]()
    running = asyncio.create_task(provider.run(published.append))
    try:
        await until(lambda: published and provider.status().doorbell == "events")
        peer.answer = lambda _: None  # no read ever ends
        attributes = {"com.docker.swarm.task.id": "t1"}
        event = {"Type": "container", "Action": "die", "Actor": {"ID": "c1", "Attributes": attributes}}
        peer.events[0].write(json.dumps(event).encode() + b"\n")
        await until(lambda: not published[-1].backends)
        assert published[-1].services
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_detect_is_false_for_garbage(peer: Peer) -> None:
    config = Config(docker_host=f"unix://{peer.path}")
    assert await detect(config)
    peer.answer = lambda _: BAD["no JSON"]
    with structlog.testing.capture_logs() as said:
        assert not await detect(config)
    assert [entry["event"] for entry in said] == ["cannot tell whether this node is in a swarm: docker does not answer"]
    with structlog.testing.capture_logs() as said:
        assert not await detect(Config(docker_host=f"unix://{peer.path}.none"))
    assert said == []


def test_watch_request_is_what_swarm_expects() -> None:
    assert watch_request(("task",)) == b"\0\0\0\0\x0a" + b"\x0a\x08\x0a\x04task\x10\x07"


HEADERS = b"kek-version: 0\nraft-dek: Cc+x/=\n\n"
KEY = b"-----BEGIN EC PRIVATE KEY-----\n%bMHcCAQEE\nAwEH\n-----END EC PRIVATE KEY-----\n" % HEADERS


def test_plain_key_has_no_headers() -> None:
    plain = KEY.replace(HEADERS, b"")
    assert plain_key(KEY) == plain
    assert plain_key(KEY.replace(b"\n", b"\r\n")) == plain
    assert plain_key(plain) == plain


@pytest.mark.parametrize(
    ("pem", "said"),
    [
        (b"", "no private key"),
        (KEY.replace(b"kek-version: 0", b"Proc-Type: 4,ENCRYPTED"), "autolock"),
        (KEY.replace(b"EC PRIVATE", b"ENCRYPTED PRIVATE"), "autolock"),
    ],
)
def test_keys_that_cannot_be_used(pem: bytes, said: str) -> None:
    with pytest.raises(ProviderError, match=said):
        plain_key(pem)


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="docker_data_root"):
        tls_context(tmp_path)
    gc.collect()  # what earlier tests left
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for name in ("swarm-root-ca.crt", "swarm-node.crt", "swarm-node.key"):
        (tmp_path / name).write_bytes(KEY)
    with pytest.raises(ProviderError):
        tls_context(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


async def test_watch_without_a_swarm(tmp_path: Path) -> None:
    with pytest.raises(ProviderError):
        async for _ in watch(tmp_path / "control.sock", tmp_path):
            raise AssertionError


async def test_a_cancelled_read_ends_though_the_engine_refuses_at_the_same_moment(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node is demoted: its Engine says that it is no manager just when its agent stops reading."""
    refuses = asyncio.Event()

    async def get(path: str) -> bytes:
        await refuses.wait()
        raise ProviderError("This node is not a swarm manager", where=path)

    engine._prefix = "/v1.41"
    monkeypatch.setattr(engine, "_get", get)
    reading = asyncio.create_task(engine.read())
    for _ in range(3):
        await asyncio.sleep(0)  # until all requests are under way
    refuses.set()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert reading.cancelled()
