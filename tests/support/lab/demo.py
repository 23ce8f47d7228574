# SPDX-License-Identifier: Apache-2.0
"""`mesh run --provider demo` as a process on loopback: what a stranger without Docker gets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.polling import PATIENCE, wait_for
from tests.support.ports import free_port


def get(url: str, timeout: float = PATIENCE, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and body of a GET on a connection of its own."""
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Demo:
    """A running demo; `published` is its port, `http` its HTTP address. Ended with the context, whatever happens."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.state_dir = directory / "state"
        self.http = f"127.0.0.1:{free_port()}"
        self.log = directory / "log"
        command = [
            sys.executable, "-m", "mesh", "run", "--provider=demo", "--engine=proxy", "--intercept=bind",
            f"--state-dir={self.state_dir}", f"--http-listen={self.http}", "--drain-timeout=60", *flags,
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MESH_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def __enter__(self) -> Self:
        try:
            self._wait(lambda: get(f"http://{self.http}/readyz", 1)[0] == 200)
            self._wait(lambda: "curl http://127.0.0.1:" in self.output())
        except BaseException:
            self.close()
            raise
        match = re.search(r"curl http://127\.0\.0\.1:(\d+)/\n", self.output())
        assert match is not None, self.output()
        self.published = int(match[1])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _wait(self, condition: Any) -> None:
        def holds() -> bool:
            assert self.process.poll() is None, self.output()
            with contextlib.suppress(OSError):
                return bool(condition())
            return False

        try:
            wait_for(holds, "the demo", interval=0.05)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def mesh(self, *args: str) -> tuple[int, str]:
        """Exit code and output of a command of the CLI, at this daemon."""
        command = [sys.executable, "-m", "mesh", *args, f"--state-dir={self.state_dir}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        return done.returncode, done.stdout + done.stderr

    def json(self, *args: str) -> Any:
        """What a command of the CLI prints with --json."""
        return json.loads(self.mesh(*args, "--json")[1])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
