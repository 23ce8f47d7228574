# SPDX-License-Identifier: Apache-2.0
"""A process of the node keeps a connected UDP socket; its task ends, and the address goes to another service's (24).

The kernel asks no program when a connected socket sends, so its datagrams went to the stranger until it was closed.
"""

from __future__ import annotations

import errno
import socket

import pytest

from tests.engines.kernel_plane import PORT, Plane
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def connected(plane: Plane, address: str, family: int = socket.AF_INET) -> socket.socket:
    with plane.node.entered():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    sock.connect((address, PORT))
    return sock


def ask(sock: socket.socket) -> str:
    sock.send(b"hello")
    return sock.recv(100).decode().split()[0]


@pytest.mark.parametrize("target", ["127.0.0.1", "node", "::ffff:127.0.0.1"])
def test_a_connected_socket_never_reaches_another_service(plane: Plane, target: str) -> None:
    address = plane.node.address if target == "node" else target
    engine = plane.driver()
    engine.open()
    dns = plane.web("b1", protocol="udp") | {"name": "dns"}
    engine.serve(services=[dns])
    with plane.node.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.connect((plane.namespaces["b1"].address, 8080))  # by itself: the hooks have nothing to do with it
        own.settimeout(PATIENCE)
        with connected(plane, address, socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            assert ask(sock) == "b1"
            b2 = plane.web("b2", protocol="udp") | {"name": "dns"}
            stranger = plane.web("b1", protocol="udp") | {"name": "other", "published": PORT + 1}
            engine.serve(services=[b2])  # b1 is gone ...
            engine.serve(services=[b2, stranger])  # ... and another service has its address
            with pytest.raises(OSError) as ended:
                ask(sock)
            assert ended.value.errno == errno.EDESTADDRREQ  # it is connected no more
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED  # as a reader gets it
            sock.connect((address, PORT))
            assert ask(sock) == "b2"
        assert ask(own) == "b1"
    assert engine.problems() == []
    engine.close(release=True)
    engine.end()


def test_a_connected_socket_does_not_stay_where_its_task_was(plane: Plane) -> None:
    """The task lives on, but Docker has given it another address: the former one is somebody else's next."""
    engine = plane.driver()
    engine.open()
    dns = plane.web("b1", protocol="udp")
    engine.serve(services=[dns])
    with connected(plane, "127.0.0.1") as sock:
        assert ask(sock) == "b1"
        plane.namespaces["b1"].ip("address", "flush", "dev", "eth0")
        plane.namespaces["b1"].add_address("eth0", "172.31.0.99/24")
        engine.serve(services=[dns | {"backends": {"b1": ["172.31.0.99", *dns["backends"]["b1"][1:]]}}])
        with pytest.raises(OSError) as ended:
            ask(sock)
        assert ended.value.errno == errno.EDESTADDRREQ
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
        sock.connect(("127.0.0.1", PORT))
        assert ask(sock) == "b1"
    engine.close(release=True)
    engine.end()


def test_the_next_agent_ends_them_too(plane: Plane) -> None:
    """The task ended while no agent ran."""
    engine = plane.driver()
    engine.open()
    engine.serve(services=[plane.web("b1", protocol="udp")])
    with connected(plane, "127.0.0.1") as sock:
        assert ask(sock) == "b1"
        engine.again()
        engine.serve(services=[plane.web("b2", protocol="udp")])

        def ended() -> bool:
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED

        wait_for(ended)
    engine.close(release=True)
    engine.end()
