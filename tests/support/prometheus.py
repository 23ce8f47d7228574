# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus with our alerts, that scrapes one daemon or several."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.lab.demo import get
from tests.support.lab.netns import Namespace
from tests.support.polling import wait_for
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: mesh
    static_configs: {targets}
"""


class Prometheus:
    """A Prometheus of our own, on the loopback of a namespace (None: of the host). Its data goes with its directory.

    Args:
        target: an address, or addresses by what the label `instance` shall say.
        rules: the alerts, as they are on the disk.
    """

    def __init__(
        self,
        directory: Path,
        target: str | Mapping[str, str],
        namespace: Namespace | None = None,
        *,
        rules: Path = ROOT / "deploy/alerts.yml",
    ) -> None:
        self.namespace = namespace
        self.address = f"127.0.0.1:{free_port()}"
        config = directory / "prometheus.yml"
        targets: list[dict[str, Any]] = [{"targets": [target]}]
        if not isinstance(target, str):
            targets = [{"targets": [address], "labels": {"instance": name}} for name, address in target.items()]
        config.write_text(CONFIG.format(rules=rules, targets=json.dumps(targets)))
        self.log = directory / "log"
        with self.log.open("wb") as log:
            popen = subprocess.Popen if namespace is None else lambda args, **how: namespace.popen(*args, **how)
            self.process: subprocess.Popen[Any] = popen(
                [
                    "prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.address}", "--storage.tsdb.retention.time=1h", "--log.level=warn",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip

    def api(self, path: str, **query: str) -> dict[str, Any]:
        with self.namespace.entered() if self.namespace else contextlib.nullcontext():
            status, body = get(f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}")
        assert status == 200, body  # 503 with a line of text while it starts
        answer: dict[str, Any] = json.loads(body)
        assert answer["status"] == "success", body
        return dict(answer["data"])

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.api("query", query=expression)["result"])

    def sum(self, metric: str) -> float:
        """Over all series, as last scraped; -1 while there is none."""
        found = self.query(f"sum({metric})")
        return float(found[0]["value"][1]) if found else -1.0

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """A scrape that takes longer than the second between two has failed: what it brings comes with a later one."""

        def holds() -> object:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError, AssertionError):
                return condition()
            return False

        wait_for(holds, what, interval=0.2)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
