# SPDX-License-Identifier: Apache-2.0
"""Load and integrity peers: C programs beside this file, compiled when they are first needed, and their reports."""

from __future__ import annotations

import fcntl
import functools
import json
import mmap
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "peers"


@functools.cache
def program(source: Path, *more: Path) -> Path:
    """The program of C files, compiled unless it is newer than its sources."""
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / source.stem
    sources = [source, *more, *source.parent.glob("*.h")]
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() or target.stat().st_mtime <= max(path.stat().st_mtime for path in sources):
            flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-pthread"]
            subprocess.run(["gcc", *flags, "-o", target, source, *more], check=True)
    return target


@dataclass(frozen=True)
class Report:
    """What a load saw. `failures` are (cause, identity or "", count)."""

    started: int
    ok: int
    failed: int
    requests: int
    longest: float  # seconds, the slowest answer
    seconds: float
    identities: dict[str, int] = field(default_factory=dict)  # answers to first requests
    failures: tuple[tuple[str, str, int], ...] = ()
    seen: tuple[tuple[int, str], ...] = ()  # client port and identity of each connection, with -v

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Report:
        names = raw["names"]
        return cls(
            **{key: raw[key] for key in ("started", "ok", "failed", "requests", "longest", "seconds", "identities")},
            failures=tuple((f["cause"], f["identity"], f["count"]) for f in raw["failures"]),
            seen=tuple((port, names[i] if i >= 0 else "") for port, i in raw["seen"]),
        )

    def failures_but_of(self, *identities: str) -> list[tuple[str, str, int]]:
        """The failures of connections that did not belong to one of these backends."""
        return [failure for failure in self.failures if failure[1] not in identities]


class Load:
    """A load that runs in a namespace until it is done or told to stop.

    with Load(client, address, 8000, "-c", "16") as load: ...; report = load.stop()
    """

    def __init__(self, client: Namespace, address: str, port: int, *options: str) -> None:
        live = os.memfd_create("answers")
        try:
            os.ftruncate(live, 8)
            self._answers = mmap.mmap(live, 8)
            command = [str(program(HERE / "load.c")), "-L", str(live), *options, address, str(port)]
            self._process = client.popen(*command, stdout=subprocess.PIPE, text=True, pass_fds=(live,))
        finally:
            os.close(live)

    def wait_ready(self) -> None:
        """With -k: until each connection has had its first answer, or has failed."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line == "ready\n", line

    @property
    def answers(self) -> int:
        """Answers so far."""
        return int.from_bytes(self._answers[:], sys.byteorder)

    def wait_more(self, count: int = 100) -> None:
        """Until so many further answers have come; more than it has connections at once: some of them began after
        this call."""
        goal = self.answers + count

        def reached() -> bool:
            if self.answers < goal and not self.running:
                raise RuntimeError(f"the load is over with {self.answers} answers")
            return self.answers >= goal

        wait_for(reached, f"{count} further answers of a load")

    def wait(self, timeout: float = PATIENCE) -> Report:
        """Until it is done by itself."""
        out, _ = self._process.communicate(timeout=timeout)
        return Report.of(json.loads(out.splitlines()[-1]))

    def stop(self, timeout: float = PATIENCE) -> Report:
        """Tell it to stop; connections under way may finish."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def load(client: Namespace, address: str, port: int, *options: str, timeout: float = PATIENCE) -> Report:
    """Run a load to its end."""
    with Load(client, address, port, *options) as running:
        return running.wait(timeout)


class Stream:
    """The caller's side of a checked stream; `options` are those of stream.c."""

    def __init__(self, client: Namespace, address: str, port: int, tag: str, *options: str) -> None:
        command = [str(program(HERE / "stream.c")), "call", address, str(port), "-t", tag, *options]
        self._process = client.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def resume(self) -> None:
        """With -s: begin to read."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait(self, timeout: float = PATIENCE) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=timeout)
        return dict(json.loads(out))


class StreamServer:
    """The other side, in a backend's namespace; it ends with the namespace."""

    def __init__(self, namespace: Namespace, port: int, log: Path) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = namespace.popen(str(program(HERE / "stream.c")), "serve", str(port), stdout=out)

    def reports(self, tag: str) -> list[dict[str, Any]]:
        """What it says of the ended connections of this tag."""
        return [r for line in self.log.read_text().splitlines() if (r := json.loads(line))["tag"] == tag]
