# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes the running daemon, evaluates our alerts and answers every query of our dashboard."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.demo import Demo, get
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: mesh
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A Prometheus of our own, on loopback, with its data in a directory that goes."""

    def __init__(self, directory: Path, target: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.format(rules=ROOT / "deploy/alerts.yml", target=target))
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.address}", "--storage.tsdb.retention.time=1h", "--log.level=warn",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip

    def api(self, path: str, **query: str) -> dict[str, Any]:
        status, body = get(f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}", 10)
        answer: dict[str, Any] = json.loads(body)
        assert status == 200 and answer["status"] == "success", body
        return dict(answer["data"])

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.api("query", query=expression)["result"])

    def wait(self, condition: Callable[[], object], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if condition():
                    return
            except (OSError, AssertionError):
                pass
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Demo, Prometheus]]:
    with Demo(tmp_path_factory.mktemp("demo")) as demo:
        for _ in range(20):
            get(f"http://127.0.0.1:{demo.published}/")
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), demo.http)
        try:
            prometheus.wait(lambda: prometheus.query('up{job="mesh"} == 1'))
            yield demo, prometheus
        finally:
            prometheus.close()


def test_scraped_as_openmetrics_without_complaint(scraped: tuple[Demo, Prometheus]) -> None:
    _, prometheus = scraped
    (target,) = prometheus.api("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    prometheus.wait(lambda: float(prometheus.query("sum(mesh_connections_opened_total)")[0]["value"][1]) >= 20)
    kinds = prometheus.api("metadata")
    assert kinds["mesh_connect_seconds"][0]["type"] == "histogram"
    assert kinds["mesh_build_info"][0]["help"].startswith("Always 1")
    assert len(prometheus.query("mesh_backend_info")) == 5


def test_what_prometheus_counts_is_what_was_done(scraped: tuple[Demo, Prometheus]) -> None:
    demo, prometheus = scraped
    before = float(prometheus.query("sum(mesh_backend_connections_opened_total)")[0]["value"][1])
    for _ in range(30):
        assert get(f"http://127.0.0.1:{demo.published}/")[0] == 200
    prometheus.wait(
        lambda: float(prometheus.query("sum(mesh_backend_connections_opened_total)")[0]["value"][1]) == before + 30
    )


def test_alerts_are_evaluated_and_silent(scraped: tuple[Demo, Prometheus]) -> None:
    _, prometheus = scraped
    prometheus.wait(
        lambda: all(rule["health"] == "ok" for group in prometheus.api("rules")["groups"] for rule in group["rules"])
    )
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) >= 10
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == []


def test_every_query_of_the_dashboard_is_answered(scraped: tuple[Demo, Prometheus]) -> None:
    _, prometheus = scraped
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    answered = 0
    time.sleep(3)  # rates want a few scrapes
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m")
            expression = expression.replace("$instance", ".*").replace("$service", ".*")
            answered += bool(prometheus.query(expression))
    assert answered >= 12  # the others have nothing to show while all is well
