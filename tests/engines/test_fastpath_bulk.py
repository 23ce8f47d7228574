# SPDX-License-Identifier: Apache-2.0
"""The proxy engine's TCP in bulk: back pressure, both directions at once, urgent data, and what follows."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from tests.support.fastpath_bench import TcpServer, call, engine, read_all, reset, tcp
from tests.support.polling import PATIENCE, wait_for

MEGABYTE = 1 << 20


@pytest.mark.parametrize("slow", ["client", "backend"])
def test_back_pressure_and_integrity(slow: str) -> None:
    """A reader that stalls stops the writer (so nothing piles up here), and every byte arrives in order."""
    data = os.urandom(24 * MEGABYTE)
    go = threading.Event()
    got: list[bytes] = []

    def backend(sock: socket.socket) -> None:
        if slow == "client":
            sock.sendall(data)
        else:
            go.wait(PATIENCE)
            got.append(read_all(sock))

    server, front = TcpServer(backend), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            if slow == "client":
                wait_for(lambda: stalled(mesh, front))
                assert mesh.counters(front).bytes_out < len(data)
                got.append(read_all(sock))
            else:
                sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
                sender.start()
                wait_for(lambda: stalled(mesh, front))
                assert mesh.counters(front).bytes_in < len(data)
                go.set()
                sender.join()
                assert read_all(sock) == b""
        wait_for(lambda: got)
        assert got[0] == data
        mesh.quiet(front)


def stalled(mesh, front) -> bool:  # type: ignore[no-untyped-def]
    """Whether bytes flowed and have stopped."""
    before = mesh.counters(front)
    time.sleep(0.2)
    after = mesh.counters(front)
    return before == after and (after.bytes_in or after.bytes_out) > 0


def test_both_directions_at_once() -> None:
    server, front = TcpServer(), tcp()
    data = os.urandom(32 * MEGABYTE)
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
            sender.start()
            assert read_all(sock) == data
            sender.join()
        now = mesh.quiet(front)
        assert (now.bytes_in, now.bytes_out) == (len(data), len(data))


def test_urgent_data_stays_in_its_place() -> None:
    got: list[bytes] = []
    server, front = TcpServer(lambda sock: got.append(read_all(sock))), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            for i in range(50):
                sock.sendall(b"plain%02d" % i)
                sock.send(b"!", socket.MSG_OOB)
            sock.sendall(b"end")
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        wait_for(lambda: got)
        assert got[0].replace(b"!", b"") == b"".join(b"plain%02d" % i for i in range(50)) + b"end"
        mesh.quiet(front)


@pytest.mark.parametrize("how", ["end", "reset"])
def test_what_follows_bulk_behind_a_slow_reader(how: str) -> None:
    """News of bytes is unwanted while the reader stalls; what is small, and the end, still come through afterwards."""
    data = os.urandom(24 * MEGABYTE)
    go = threading.Event()
    got: list[bytes] = []

    def backend(sock: socket.socket) -> None:
        go.wait(PATIENCE)
        got.append(sock.recv(len(data), socket.MSG_WAITALL))
        sock.sendall(b"all")
        got.append(sock.recv(5, socket.MSG_WAITALL))
        sock.sendall(b"small")
        try:
            got.append(sock.recv(1))
        except ConnectionResetError:
            got.append(b"reset")

    server, front = TcpServer(backend), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:
            sender = threading.Thread(target=sock.sendall, args=(data,))
            sender.start()
            wait_for(lambda: stalled(mesh, front))
            go.set()
            sender.join()
            assert sock.recv(3, socket.MSG_WAITALL) == b"all"
            for piece in (b"a", b"bc", b"de"):
                sock.sendall(piece)
            assert sock.recv(5, socket.MSG_WAITALL) == b"small"
            if how == "reset":
                reset(sock)
        wait_for(lambda: len(got) == 3)
        assert got == [data, b"abcde", b"reset" if how == "reset" else b""]


def test_urgent_data_behind_a_slow_reader() -> None:
    """An urgent mark in spliced data is not taken for the end."""
    data = os.urandom(24 * MEGABYTE)
    go = threading.Event()
    got: list[bytes] = []

    def backend(sock: socket.socket) -> None:
        go.wait(PATIENCE)
        got.append(read_all(sock))

    server, front = TcpServer(backend), tcp()
    with engine() as mesh:
        mesh.serve({front: {"a": server.where}})
        with call(front) as sock:

            def send() -> None:
                sock.sendall(data)
                sock.send(b"!", socket.MSG_OOB)
                sock.sendall(b"end")
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            wait_for(lambda: stalled(mesh, front))
            go.set()
            sender.join()
            assert read_all(sock) == b""
        assert got[0] in (data + b"!end", data + b"end")
        mesh.quiet(front)
