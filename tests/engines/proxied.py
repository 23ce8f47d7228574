# SPDX-License-Identifier: Apache-2.0
"""The proxy engine by itself in a namespace, a server that says its name, and a client that asks who answers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from mesh.config.keys import Config
from mesh.datapath.proxy.engine import ProxyDatapath
from mesh.model import Frontend
from tests.support.fastpath_bench import Served, TcpServer
from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE

PORT = 8080
STATE = "/nonexistent/intercept"


def says(name: bytes, host: str = "127.0.0.1", port: int = 0) -> TcpServer:
    def answer(sock: socket.socket) -> None:
        sock.sendall(name)
        while data := sock.recv(100):
            sock.sendall(data)

    return TcpServer(answer, host, port)


def who(namespace: Namespace, host: str, port: int = PORT) -> bytes:
    with namespace.entered():
        sock = socket.create_connection((host, port), timeout=PATIENCE)
    with sock:
        return sock.recv(100)


@contextlib.contextmanager
def open_engine(
    node: Namespace, inherited: dict[Frontend, list[int]] | None = None, **keys: object
) -> Iterator[Served]:
    docker_host = bool(keys.pop("docker_host", False))
    config = Config(**{"threads": 2, "state_dir": STATE, **keys})  # type: ignore[arg-type]
    datapath = ProxyDatapath(config, inherited=inherited, docker_host=docker_host)
    with node.entered():
        datapath.open()
        try:
            yield Served(datapath)
        finally:
            datapath.close(release=True)
