# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process in a namespace: `mesh run`, its state, metrics, descriptors, and its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE, wait_for

HTTP_PORT = 9550


def backends_of(state: dict[str, Any], service: str) -> dict[str, int]:
    """Weight by backend id of a service's frontends, from the answer of GET /state."""
    found: dict[str, int] = {}
    for entry in state["services"]:
        if entry["name"] == service:
            for frontend in entry["frontends"]:
                found |= {target["backend"]: target["weight"] for target in frontend["targets"]}
    return found


def environment() -> dict[str, str]:
    """This process' own, without what would be keys of the daemon."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MESH_")}


class Daemon:
    """One `mesh run`. Keyword arguments are configuration keys."""

    def __init__(
        self, namespace: Namespace, directory: Path, *, wait: bool = True, program: Any = None, **config: object
    ) -> None:
        self.namespace = namespace
        self.directory = directory
        self.config = {"state_dir": directory / "state", "http_listen": f"127.0.0.1:{HTTP_PORT}", **config}
        self.log = directory / "mesh.log"
        directory.mkdir(parents=True, exist_ok=True)
        self.program = program or Path(sys.executable).with_name("mesh")  # of this build, or of another one
        self.process: subprocess.Popen[Any]
        self.start(wait=wait)

    def start(self, *extra: str, wait: bool = True) -> None:
        """Start a (further) process with the same configuration."""
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in self.config.items()]
        command = [str(self.program), "run", *flags, *extra]
        with self.log.open("ab") as log:
            self.process = self.namespace.popen(*command, stdout=log, stderr=log, env=environment(), close_fds=True)
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"mesh run ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError):
                return self.get("/readyz")[0] == 200 and self.state()["pid"] == self.process.pid
            return False

        try:
            wait_for(ready, "mesh run ready", timeout=timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.tail()}") from None

    def tail(self, size: int = 6000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-size:]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET to its HTTP server."""
        with self.namespace.entered():
            sock = socket.create_connection(("127.0.0.1", HTTP_PORT), timeout=PATIENCE)
        connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT)
        connection.sock = sock
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/state")[1]))

    def metrics(self) -> dict[str, float]:
        """Value by series, as in the text format: `name{label="value"}`."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line and line[0] != "#"]
        return {match[1]: float(match[2]) for line in lines if (match := re.match(r"(.*\S) (\S+)$", line))}

    def total(self, name: str, **labels: str) -> float:
        """Sum over the series of a metric that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        series = self.metrics().items()
        return sum(v for k, v in series if re.split(r"[{ ]", k)[0] == name and all(w in k for w in wanted))

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self, timeout: float = PATIENCE) -> int:
        """SIGTERM and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(timeout))

    def release(self) -> None:
        """`mesh stop --release`: nothing of it is left in the node's kernel; also where the process is gone."""
        mesh = str(Path(sys.executable).with_name("mesh"))
        self.namespace.run(mesh, "stop", "--release", f"--state-dir={self.config['state_dir']}", env=environment())
        self.process.wait(PATIENCE)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.terminate()
                self.process.wait(20)
        if self.process.poll() is None:
            self.kill()
