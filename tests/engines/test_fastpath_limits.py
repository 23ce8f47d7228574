# SPDX-License-Identifier: Apache-2.0
"""The proxy engine at its limits and in long use: it waits, it does not spin, and it leaves nothing behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.support.fastpath_bench import TcpServer, ask, call, engine, reset, tcp
from tests.support.polling import wait_for


def test_more_clients_than_connections_wait() -> None:
    server, front = TcpServer(), tcp()
    with engine(max_connections=8) as mesh:
        mesh.serve({front: {"a": server.where}})
        socks = [call(front) for _ in range(24)]
        for sock in socks:
            sock.sendall(b"x")
        wait_for(lambda: mesh.counters(front).active == 8)
        wait_for(lambda: mesh.datapath.stats().totals["accept_pauses"])
        time.sleep(0.2)
        assert mesh.counters(front).active == 8
        for sock in socks:  # those that end make room for those that wait
            sock.settimeout(0.01)
        answered = set()
        while len(answered) < 24:
            for i, sock in enumerate(socks):
                if i in answered:
                    continue
                try:
                    assert sock.recv(1) == b"x"
                except TimeoutError:
                    continue
                answered.add(i)
                sock.close()
        assert mesh.quiet(front).opened == 24


STARVED = """
import resource, socket, sys, time
from mesh.datapath.base import Failure
from tests.support.fastpath_bench import TcpServer, call, engine, tcp
from tests.support.polling import wait_for

server = TcpServer()
front = tcp()
with engine() as mesh:
    mesh.serve({front: {"a": server.where}})
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
    clients = [socket.socket() for _ in range(25)]
    room = []
    try:  # leave little
        while True:
            room.append(socket.socket())
    except OSError:
        for sock in room[-40:]:
            sock.close()
    for sock in clients:
        sock.connect(("127.0.0.1", front.port))
    wait_for(lambda: mesh.datapath.stats().totals["accept_pauses"])
    began, spent = time.monotonic(), time.process_time()
    time.sleep(0.5)
    assert time.process_time() - spent < 0.5 * (time.monotonic() - began), "spins"  # a thread that spins takes a core
    for sock in clients + room:
        sock.close()
    wait_for(lambda: not mesh.datapath.stats().gauges["connections"])
    with call(front) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    mesh.quiet(front)
print("survived")
"""


def test_out_of_descriptors() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED, "700"], capture_output=True, text=True, check=False)
    assert done.stdout == "survived\n", done.stderr


def test_thousands_of_connections_leave_nothing_behind() -> None:
    servers, front = {"a": TcpServer(), "b": TcpServer()}, tcp()
    with engine() as mesh:
        mesh.serve({front: {n: s.where for n, s in servers.items()}})
        assert ask(front)
        mesh.quiet(front)
        wait_for(lambda: not any(s.open for s in servers.values()))
        gc.collect()  # sockets of earlier tests
        before = len(list(Path("/proc/self/fd").iterdir()))

        def client(seed: int) -> None:
            for i in range(500):
                with call(front) as sock:
                    sock.sendall(b"x" * ((i + seed) % 7 * 20000 + 1))
                    if i % 5 == 0:
                        reset(sock)
                    elif i % 5 == 1:
                        sock.recv(1)

        clients = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        now = mesh.quiet(front)
        assert now.opened + sum(now.failed.values()) >= 3001
        wait_for(lambda: not any(s.open for s in servers.values()))
        pipes = mesh.datapath.stats().gauges["pipes"]
        # Fewer, if what earlier tests left is collected meanwhile.
        wait_for(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before + 2 * pipes)


def test_many_connections_at_once() -> None:
    servers, front = {"a": TcpServer(), "b": TcpServer()}, tcp()
    with engine() as mesh:
        mesh.serve({front: {n: s.where for n, s in servers.items()}})
        socks = [call(front) for _ in range(1000)]
        for i, sock in enumerate(socks):
            sock.sendall(b"%d" % i)
        for i, sock in enumerate(socks):
            assert sock.recv(100) == b"%d" % i
        assert mesh.counters(front).active == 1000
        for sock in socks:
            sock.close()
        assert mesh.quiet(front).opened == 1000
