# SPDX-License-Identifier: Apache-2.0
"""Malformed requests at the HTTP port fill the disk with tracebacks, at every log level (item 16).

255 MB were logged in 60 s. A path that is not UTF-8 made the answer fail with 500.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from mesh.listener import HTTP
from tests.support.lab.demo import Demo, get
from tests.support.polling import PATIENCE, wait_for
from tests.support.sockets import closed

REQUESTS = 200
MALFORMED = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: x\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 10000 + b"\r\n\r\n",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo"), "--log-level=error") as running:
        yield running


def ask(demo: Demo, request: bytes) -> bytes:
    """What is answered on a connection of its own."""
    host, _, port = demo.http.partition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        sock.sendall(request)
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:  # it had not read everything
            pass
    return answer


def test_malformed_requests_are_refused_and_not_logged(demo: Demo) -> None:
    before = len(demo.output())
    for i in range(REQUESTS):
        answer = ask(demo, MALFORMED[i % len(MALFORMED)])
        assert not answer or answer.split()[1] == b"400", answer
    said = demo.output()[before:]
    assert "Traceback" not in said
    assert len(said) < 2000
    assert get(f"http://{demo.http}/readyz")[0] == 200


def test_idle_connections_of_one_address_are_bounded(demo: Demo) -> None:
    host, _, port = demo.http.partition(":")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        for sock in idle:
            sock.setblocking(False)
        wait_for(lambda: sum(map(closed, idle)) >= 100 - HTTP, "most are sent away")
        with socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0)) as other:
            other.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(100).split()[1] == b"200"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/%ff%80", b"404"),
        ("/state/%ed%b2%80", b"404"),
        ("/explain?source=%ff&destination=%80", b"400"),
        ("/explain?source=1.2.3.4:5&destination=1.2.3.4:5&protocol=%ff", b"400"),
        ("/explain?source=%0d%0aX:%20y&destination=b", b"400"),
    ],
)
def test_a_path_that_is_not_utf8_is_its_senders_error(demo: Demo, path: str, status: bytes) -> None:
    answer = ask(demo, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] == status, answer
    assert b'"error":' in answer and answer.decode()
    assert "Traceback" not in demo.output()
