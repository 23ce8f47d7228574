# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes the running daemon, evaluates our alerts and answers every query of our dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.lab.demo import Demo, get
from tests.support.prometheus import ROOT, Prometheus


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
        return all((rule["health"], rule.get("state", "inactive")) == ("ok", "inactive") for rule in rules())

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
