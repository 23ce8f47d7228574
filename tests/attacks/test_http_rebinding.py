# SPDX-License-Identifier: Apache-2.0
"""A web page reads the whole state at the HTTP port by a name that it makes mean 127.0.0.1: DNS rebinding (item 20)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.lab.demo import Demo, get


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo"), "--http-hosts=metrics.example, 192.0.2.7") as running:
        yield running


def status(demo: Demo, host: str, path: str = "/state") -> int:
    return get(f"http://{demo.http}{path}", headers={"Host": host})[0]


@pytest.mark.parametrize("path", ["/state", "/metrics", "/nodes", "/", "/nothing"])
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:9550",
        "localhost.evil.example",
        "198.51.100.1",
        "[2001:db8::1]:80",
        "a:b:c",
        "0.0.0.0",
    ],
)
def test_a_strangers_name_is_refused(demo: Demo, host: str, path: str) -> None:
    assert status(demo, host, path) == 421


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:9550",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:1",
        "[::1]:9550",
        "metrics.example",
        "192.0.2.7:80",
    ],
)
def test_the_nodes_own_names_are_answered(demo: Demo, host: str) -> None:
    assert status(demo, host) == 200


def test_the_hosts_name_is_its_own(demo: Demo) -> None:
    assert status(demo, f"{socket.gethostname()}:9550") == 200


def test_a_caller_that_says_none_is_no_browser(demo: Demo) -> None:
    host, _, port = demo.http.partition(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert sock.recv(100).split()[1] == b"200"


def test_the_control_socket_has_no_names(demo: Demo) -> None:
    assert demo.mesh("status")[0] == 0
