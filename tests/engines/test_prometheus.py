# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes the running daemon, evaluates our alerts and answers every query of our dashboard."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lab.demo import Demo, get
from tests.support.polling import wait_for
from tests.support.ports import free_port

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


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Demo, Prometheus]]:
    with Demo(tmp_path_factory.mktemp("demo")) as demo:
        for _ in range(20):
            get(f"http://127.0.0.1:{demo.published}/")
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), demo.http)
        try:
            prometheus.wait(lambda: prometheus.query('up{job="mesh"} == 1'), "a scrape")
            yield demo, prometheus
        finally:
            prometheus.close()


def test_scraped_as_openmetrics_without_complaint(scraped: tuple[Demo, Prometheus]) -> None:
    _, prometheus = scraped

    def well() -> bool:
        (target,) = prometheus.api("targets")["activeTargets"]
        return (target["health"], target["lastError"]) == ("up", "")

    prometheus.wait(well, "a scrape without a complaint")
    prometheus.wait(lambda: prometheus.sum("mesh_connections_opened_total") >= 20, "what was done")
    kinds = prometheus.api("metadata")
    assert kinds["mesh_connect_seconds"][0]["type"] == "histogram"
    assert kinds["mesh_build_info"][0]["help"].startswith("Always 1")
    assert len(prometheus.query("mesh_backend_info")) == 5


OPENED = "mesh_backend_connections_opened_total"


def told(demo: Demo) -> float:
    """What the daemon itself says."""
    body = get(f"http://{demo.http}/metrics")[1]
    return sum(float(value) for value in re.findall(rf"^{OPENED}{{[^}}]*}} (\S+)", body, re.MULTILINE))


def test_what_prometheus_counts_is_what_was_done(scraped: tuple[Demo, Prometheus]) -> None:
    demo, prometheus = scraped
    before = told(demo)
    prometheus.wait(lambda: prometheus.sum(OPENED) == before, "what the daemon tells")
    for _ in range(30):
        assert get(f"http://127.0.0.1:{demo.published}/")[0] == 200
    prometheus.wait(lambda: prometheus.sum(OPENED) == before + 30, "30 more")


def test_alerts_are_evaluated_and_silent(scraped: tuple[Demo, Prometheus]) -> None:
    _, prometheus = scraped

    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]

    def silent() -> bool:
        return all((rule["health"], rule["state"]) == ("ok", "inactive") for rule in rules())

    assert len(rules()) >= 10
    prometheus.wait(silent, "no alert")


def test_every_query_of_the_dashboard_is_answered(scraped: tuple[Demo, Prometheus]) -> None:
    _, prometheus = scraped
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    def answered() -> int:
        for name, value in (("$__rate_interval", "1m"), ("$instance", ".*"), ("$service", ".*")):
            expressions[:] = [expression.replace(name, value) for expression in expressions]
        return sum(bool(prometheus.query(expression)) for expression in expressions)

    # Rates want a few scrapes; the other queries have nothing to show while all is well.
    prometheus.wait(lambda: answered() >= 12, "twelve answers")
