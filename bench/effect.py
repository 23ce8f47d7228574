# SPDX-License-Identifier: Apache-2.0
"""How long a change takes until new connections obey it, from the moment at which the daemon is told.

`file`: the static provider's file names another backend, and SIGHUP says so. `drain`: POST /drain on the socket.
A client connects without a pause; the time is until the beginning of the last connection that still got the old one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bench.lab import BACKENDS, NODE, Lab, LabError
from bench.peers.mesh import MeshKernel, MeshProxy
from mesh.cli.client import call

PORT: Final = 8090
TIMES: Final = 10
PAUSE: Final = 0.5  # seconds between changes
PEER: Final = str(Path(__file__).with_name("effect_peer.py"))
NAMES: Final = ("backend0", "backend1")
Seen = Sequence[tuple[float, str]]  # when it began to connect, who answered


def effect_file(weights: tuple[int, int]) -> str:
    """One service with two backends."""
    lines = ["[[services]]", 'name = "effect"', "[services.options]", 'health = "off"']
    lines += ["[[services.ports]]", f"published = {PORT}", f"target = {PORT}"]
    for name, address, weight in zip(NAMES, BACKENDS, weights, strict=False):
        lines += ["[[services.backends]]", f'name = "{name}"', f'address = "{address}"', f"weight = {weight}"]
    return "\n".join(lines) + "\n"


def delays(seen: Seen, changes: Sequence[tuple[float, str]]) -> list[float]:
    """Seconds from each change to the beginning of the last connection that got the backend which it takes out.

    A change that did not show before the next one counts as PAUSE: at least that.
    """
    found = []
    ends = [at for at, _ in changes[1:]] + [changes[-1][0] + PAUSE]
    for (at, gone), end in zip(changes, ends, strict=True):
        within = [(began, name) for began, name in seen if at <= began < min(end, at + PAUSE)]
        late = not within or within[-1][1] == gone
        found.append(PAUSE if late else max((began - at for began, name in within if name == gone), default=0.0))
    return found


def failures(seen: Seen) -> dict[str, int]:
    """Connections that failed, by errno."""
    return dict(Counter(name for _, name in seen if name.startswith("error")))


def watched(lab: Lab, change: Callable[[int], str]) -> dict[str, Any]:
    """TIMES changes: {"seconds", "errors"}. `change` makes the nth and returns which backend it takes out, if any."""
    argv = (sys.executable, PEER, "watch", NODE, str(PORT))
    client = lab.start("client", *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin and client.stdout
    client.stdout.readline()
    time.sleep(PAUSE)
    changes = []
    for n in range(TIMES):
        at = time.monotonic()
        gone = change(n)
        if gone:
            changes.append((at, gone))
        time.sleep(max(0.0, at + PAUSE - time.monotonic()))
    client.stdin.close()
    lines = client.stdout.read().decode().splitlines()
    lab.stop(client)
    seen = [(float(began), name) for began, name in (line.split() for line in lines)]
    return {"seconds": delays(seen, changes), "errors": failures(seen)}


def of_engine(lab: Lab, kind: type[MeshKernel | MeshProxy]) -> list[dict[str, Any]]:
    """Both kinds of change to one engine."""

    class Effect(kind):  # type: ignore[misc,valid-type]
        name = f"{kind.name}-effect"

        def text(self) -> str:
            return effect_file((1, 0))

        def wait(self) -> None:
            argv = (sys.executable, PEER, "watch", NODE, str(PORT))
            lab.wait_until(
                self.processes[0], lambda: "backend0" in lab.run("client", *argv, stdin="x"), self.log("node")
            )

    side = Effect(lab)
    try:
        side.start()

        def by_file(n: int) -> str:
            side.write(effect_file((n % 2, 1 - n % 2)))
            side.processes[0].send_signal(signal.SIGHUP)
            return NAMES[n % 2 == 1]

        def by_drain(n: int) -> str:
            call(side.state("node"), "/undrain" if n % 2 else "/drain", body={"kind": "backend", "name": NAMES[0]})
            return "" if n % 2 else NAMES[0]

        rows = [{"side": kind.name, "change": "file"} | watched(lab, by_file)]
        side.write(effect_file((1, 1)))
        side.processes[0].send_signal(signal.SIGHUP)
        time.sleep(PAUSE)
        rows.append({"side": kind.name, "change": "drain"} | watched(lab, by_drain))
        return rows
    finally:
        side.stop()


def measure(lab: Lab) -> list[dict[str, Any]]:
    """[{"side", "change", "seconds": [...], "errors"}] for each engine."""
    servers = []
    try:
        for i, name in enumerate(NAMES):
            argv = (sys.executable, PEER, "serve", name, BACKENDS[i], str(PORT))
            server = lab.start(name, *argv, stdout=subprocess.PIPE)
            servers.append(server)
            if not server.stdout or not server.stdout.readline():
                raise LabError("a server that says its name does not start")
        return [row for kind in (MeshKernel, MeshProxy) for row in of_engine(lab, kind)]
    finally:
        for server in servers:
            lab.stop(server)
