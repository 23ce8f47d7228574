# SPDX-License-Identifier: Apache-2.0
"""The lock of a state directory, and the two sides of a hand-over in two threads; notifications to systemd."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.agent.lock import Lock
from mesh.agent.systemd import Notifier
from mesh.agent.takeover import SOCKET, Predecessor, Successor, TakeoverError, close_all
from mesh.errors import MeshError
from mesh.model import ANY_ADDRESS, EngineKind, Frontend, Protocol

WEB = Frontend(ANY_ADDRESS, 8080, Protocol.TCP)
DNS = Frontend(ipaddress.IPv4Address("192.0.2.1"), 53, Protocol.UDP)


def test_one_lock_for_one_directory(tmp_path: Path) -> None:
    lock = Lock.acquire(tmp_path / "state")
    with pytest.raises(MeshError, match=f"pid {os.getpid()} already"):
        Lock.acquire(tmp_path / "state")
    lock.close()
    Lock.acquire(tmp_path / "state").close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeshError, match="--state-dir"):
        Lock.acquire(tmp_path / "file")


@contextlib.contextmanager
def old_process(state_dir: Path, act: Callable[[Predecessor], None]) -> Iterator[list[Exception]]:
    """Accepts one process that asks, in a thread; yields what went wrong there."""
    errors: list[Exception] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(state_dir / SOCKET))
        server.listen()
        server.settimeout(30)

        def serve() -> None:
            predecessor = Predecessor(server.accept()[0])
            try:
                predecessor.hello()
                act(predecessor)
            except TakeoverError as error:
                errors.append(error)
            finally:
                predecessor.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield errors
        thread.join(30)
        assert not thread.is_alive()


def test_sockets_and_lock_change_hands(tmp_path: Path) -> None:
    lock = Lock.acquire(tmp_path)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(450)]
        listeners = {WEB: [s.fileno() for s in sockets[:449]], DNS: [sockets[449].fileno()]}

        def act(predecessor: Predecessor) -> None:
            assert predecessor.engine == EngineKind.PROXY
            predecessor.offer(EngineKind.PROXY, lock, listeners)
            predecessor.yours()

        with old_process(tmp_path, act) as errors:
            successor = Successor.connect(tmp_path, EngineKind.PROXY)
            assert successor is not None
            assert (successor.pid, successor.engine) == (os.getpid(), EngineKind.PROXY)
            assert {f: len(d) for f, d in successor.listeners.items()} == {WEB: 449, DNS: 1}
            for mine, descriptor in zip(sockets, (d for ds in successor.listeners.values() for d in ds), strict=True):
                assert os.path.sameopenfile(mine.fileno(), descriptor)
                assert not os.get_inheritable(descriptor)
            successor.serving()
        assert not errors
        lock.close()
        with pytest.raises(MeshError, match="already uses"):  # the successor's share holds it
            Lock.acquire(tmp_path)
        close_all([d for ds in successor.listeners.values() for d in ds])
        successor.lock.close()
        Lock.acquire(tmp_path).close()


def test_a_new_process_that_goes_leaves_the_old_one_its_place(tmp_path: Path) -> None:
    lock = Lock.acquire(tmp_path)
    with old_process(tmp_path, lambda p: p.offer(EngineKind.PROXY, lock, {})) as errors:
        successor = Successor.connect(tmp_path, EngineKind.PROXY)
        assert successor is not None
        successor.abandon()
    assert "went away" in str(errors[0])
    with pytest.raises(MeshError, match="already uses"):
        Lock.acquire(tmp_path)
    lock.close()


def test_a_refusal_has_its_reason(tmp_path: Path) -> None:
    with old_process(tmp_path, lambda p: p.refuse("not today")), pytest.raises(TakeoverError, match="not today"):
        Successor.connect(tmp_path, EngineKind.PROXY)


def test_nobody_runs(tmp_path: Path) -> None:
    assert Successor.connect(tmp_path, EngineKind.PROXY) is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / SOCKET))
    assert Successor.connect(tmp_path, EngineKind.PROXY) is None


def test_garbage_is_refused(tmp_path: Path) -> None:
    with old_process(tmp_path, lambda p: None) as errors, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / SOCKET))
        client.sendall(b"GET / HTTP/1.1\r\n")
    assert "cannot be understood" in str(errors[0])


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
        notifier = Notifier(environ)
        assert notifier.watchdog == 3.0
        notifier.ready("2 ports")
        assert manager.recv(1000).decode().splitlines() == ["READY=1", "STATUS=2 ports", f"MAINPID={os.getpid()}"]
        notifier.reloading()
        assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        notifier.stopping("draining")
        assert manager.recv(1000) == b"STOPPING=1\nSTATUS=draining"
        notifier.alive()
        assert manager.recv(1000) == b"WATCHDOG=1"
    notifier.alive()  # nobody listens any more: no reason to fail
    assert Notifier({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog == 0.0
    Notifier({}).ready("nobody asked")
