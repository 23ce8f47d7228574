# SPDX-License-Identifier: Apache-2.0
"""The exposition: judged by prometheus_client's own parsers and by promtool, never by our own reading of the format."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mesh.datapath.base import BackendKey
from mesh.datapath.counters import COLUMNS, PLAIN, Counters, CounterTable, Failure, added
from mesh.metrics import families
from mesh.metrics.exposition import Exposition, Snapshot, collect, render
from tests.support.metrics_samples import NODES, frontend, snapshot, state, stats

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
Parser = Callable[[str], Iterable[Metric]]


def parsed(snap: Snapshot, accept: str = "", parse: Parser = parse_text) -> dict[str, Metric]:
    body, _ = render(snap, accept)
    return {metric.name: metric for metric in parse(body.decode())}


def value(metrics: dict[str, Metric], family: str, sample: str, **labels: str) -> float:
    """The one sample of a family that has these labels, others aside."""
    hits = [s for s in metrics[family].samples if s.name == sample and labels.items() <= s.labels.items()]
    assert len(hits) == 1, hits
    return hits[0].value


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (OPENMETRICS, parse_openmetrics)])
def test_both_formats_say_the_same(accept: str, parse: Parser) -> None:
    metrics = parsed(snapshot(), accept, parse)
    web0 = {"frontend": "*:10000/tcp", "service": "web0", "protocol": "tcp"}
    assert value(metrics, "mesh_connections_opened", "mesh_connections_opened_total", **web0) == 13
    assert value(metrics, "mesh_connections_active", "mesh_connections_active", **web0) == 3
    assert value(metrics, "mesh_connections_failed", "mesh_connections_failed_total", cause="refused", **web0) == 2
    assert value(metrics, "mesh_bytes", "mesh_bytes_total", direction="out", **web0) == 20000
    assert value(metrics, "mesh_connect_seconds", "mesh_connect_seconds_bucket", le="+Inf", **web0) == 11
    assert value(metrics, "mesh_connect_seconds", "mesh_connect_seconds_count", **web0) == 11
    backend = {"frontend": "*:10001/tcp", "service": "web1", "backend": "task1x2", "port": "80"}
    assert value(metrics, "mesh_backend_connections_opened", "mesh_backend_connections_opened_total", **backend) == 5
    assert value(metrics, "mesh_backend_info", "mesh_backend_info", backend="task1x2", name="web1.2", node="a") == 1
    assert value(metrics, "mesh_service_replicas", "mesh_service_replicas", service="web1") == 3
    assert value(metrics, "mesh_applies", "mesh_applies_total", result="ok") == 6
    assert value(metrics, "mesh_threads", "mesh_threads") == 2
    assert value(metrics, "mesh_verdicts", "mesh_verdicts_total", verdict="pass") == 4
    assert "process_open_fds" in metrics


def test_the_scraper_chooses_the_format() -> None:
    assert render(snapshot())[1].startswith("text/plain")
    body, content_type = render(snapshot(), OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n") and body.count(b"# EOF") == 1


@pytest.mark.parametrize("parse", [parse_text, parse_openmetrics])
def test_names_that_need_escaping(parse: Parser) -> None:
    odd = 'a"b\\c\nd'
    shown: dict[str, Any] = state(1, 1)
    shown["services"][0]["name"] = odd
    accept = OPENMETRICS if parse is parse_openmetrics else ""
    metrics = parsed(Snapshot(stats(1, 1), shown, True), accept, parse)
    assert value(metrics, "mesh_bytes", "mesh_bytes_total", direction="in", service=odd) == 10000
    assert value(metrics, "mesh_backend_weight", "mesh_backend_weight", service=odd) == 1


def test_no_series_twice() -> None:
    """A backend of two ports, and one whose target port just changed, are told apart."""
    shown: dict[str, Any] = state(1, 2)
    twin = {**shown["services"][0]["frontends"][0], "frontend": "*:443/tcp"}
    shown["services"][0]["frontends"].append(twin)
    counted = stats(1, 2)
    extra = {(frontend(0), BackendKey("task0x0", 8080, 6)): Counters(opened=1)}
    counted = replace(counted, backends={**counted.backends, **extra})
    body, _ = render(Snapshot(counted, shown, True))
    lines = [line.rpartition(" ")[0] for line in body.decode().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines))


def test_counters_that_outlive_their_frontend() -> None:
    """A frontend that is draining is in the engine's counters but no longer in the state."""
    metrics = parsed(Snapshot(stats(2, 2), state(1, 2), True))
    assert value(metrics, "mesh_connections_opened", "mesh_connections_opened_total", frontend="*:10001/tcp") == 13


def test_absent_rather_than_wrong() -> None:
    shown: dict[str, Any] = state(0, 0)
    shown["provider"]["age_seconds"] = None
    shown["apply"]["last_seconds"] = None
    metrics = parsed(Snapshot(stats(0, 0), shown, False))
    assert "mesh_provider_age_seconds" not in metrics
    assert "mesh_apply_last_seconds" not in metrics
    assert value(metrics, "mesh_ready", "mesh_ready") == 0


def test_every_failure_has_a_cause() -> None:
    counted = replace(stats(1, 0), frontends={frontend(0): Counters(failed=dict.fromkeys(Failure, 1))})
    metrics = parsed(Snapshot(counted, state(1, 0), True))
    assert {s.labels["cause"] for s in metrics["mesh_connections_failed"].samples} == {
        f.value for f in Failure if f is not Failure.UNANSWERED
    }
    assert value(metrics, "mesh_connections_unanswered", "mesh_connections_unanswered_total", service="web0") == 1


def test_nodes_and_the_certificate() -> None:
    metrics = parsed(snapshot())
    up = {s.labels["node"]: s.value for s in metrics["mesh_node_up"].samples}
    assert up == {"node-a": 1, "node-b": 0}
    family = "mesh_certificate_expiry_timestamp_seconds"
    assert value(metrics, family, family) == 1800000000
    assert value(metrics, "mesh_node_left", "mesh_node_left") == 0


def test_a_node_that_left_and_joined_again_is_one_node() -> None:
    """Swarm lists a node of the same name for each time that it joined: one series, and it is up if one is."""
    nodes = [{**node, "name": "node-a"} for node in NODES]
    metrics = parsed(replace(snapshot(), nodes=nodes))
    assert [(s.labels["node"], s.value) for s in metrics["mesh_node_up"].samples] == [("node-a", 1)]


def test_exported_families_are_the_declared_ones() -> None:
    shown: dict[str, Any] = state()
    shown["traffic"] = {"verdict": "degraded", "reasons": ["service web0: 1 of its 3 tasks"]}
    shown["services"][0]["frontends"][0]["targets"][0]["masked"] = "no path to a"
    counted = stats()
    udp = {frontend(0): replace(counted.frontends[frontend(0)], packets_in=1)}
    backends = {key: replace(c, packets_in=1) for key, c in counted.backends.items()}
    counted = replace(counted, frontends=udp, backends=backends, gauges={})
    assert set(collect(Snapshot(counted, shown, True, NODES))) == set(families.FAMILIES)


def test_a_backend_that_gets_another_port_is_labelled_with_it() -> None:
    exposition, shown = Exposition(), state()
    exposition.collect(Snapshot(stats(), shown, True))
    services = copy.deepcopy(shown["services"])
    for service in services:
        for target in (t for front in service["frontends"] for t in front["targets"]):
            target["port"] = 443
    found = exposition.collect(Snapshot(stats(), shown | {"services": services}, True))
    assert (
        found[families.BACKEND_SLOTS]
        == collect(Snapshot(stats(), shown | {"services": services}, True))[families.BACKEND_SLOTS]
    )
    assert b'port="443"' in found[families.BACKEND_SLOTS] and b'port="80"' not in found[families.BACKEND_SLOTS]


def test_masked_tasks_are_counted_by_service_and_node() -> None:
    shown: dict[str, Any] = state()
    shown["traffic"]["verdict"] = "degraded"
    for target in shown["services"][1]["frontends"][0]["targets"][:2]:
        target["masked"] = "no path to a"
    found = collect(Snapshot(stats(), shown, True))
    assert found[families.BACKENDS_MASKED] == b'mesh_backends_masked{service="web1",node="a"} 2'
    assert b'mesh_traffic{verdict="degraded"} 1' in found[families.TRAFFIC]
    assert found[families.PATH_UP] == b'mesh_path_up{node="b",path="tunnel"} 1'


def test_units_stand_last_in_names() -> None:
    for family in (*families.FAMILIES, *families.ENGINE.values()):
        bare = family.name.removesuffix("_total")
        assert (bare == family.name) is (family.kind is not families.Kind.COUNTER), family.name
        for unit in ("bytes", "packets", "seconds"):
            assert unit not in bare.split("_")[:-1], family.name


def rows_of(numbers: list[list[int]]) -> CounterTable[str]:
    """A table of rows "0", "1", ... with these numbers in the order of COLUMNS."""
    return CounterTable(tuple(str(i) for i in range(len(numbers))), list(zip(*numbers, strict=True)))


@given(st.lists(st.lists(st.integers(0, 2**63), min_size=len(COLUMNS), max_size=len(COLUMNS)), min_size=1, max_size=5))
def test_a_table_is_the_mapping_that_it_shows(numbers: list[list[int]]) -> None:
    table = rows_of([[closed + opened % 1000, closed, *rest] for opened, closed, *rest in numbers])
    again = CounterTable.of(dict(table))
    assert again == table and len(table) == len(numbers)
    spent = PLAIN.index("connect_ns")  # shown in seconds
    for i in range(len(COLUMNS)):
        if i != spent:
            assert list(again.column(i)) == list(table.column(i))


def test_the_proxy_beside_is_added_up() -> None:
    kernel = CounterTable(("a", "b"), [[5, 6], [1, 2]])
    proxy = rows_of([[1] * len(COLUMNS), [0] * len(COLUMNS), [2] * len(COLUMNS)])
    both = added(kernel, proxy, {"0": "b", "1": "x", "2": "c"}.get)
    assert list(both) == ["a", "b", "c"]
    assert (both["a"].opened, both["b"].opened, both["b"].closed, both["c"].opened) == (5, 7, 3, 2)
    assert both["b"].failed[Failure.REFUSED] == 1 and both["c"].connect_seconds[0] == 2
    assert added(kernel, rows_of([[0] * len(COLUMNS)]), lambda _: "a") is kernel


def test_text_that_is_kept_follows_what_it_names() -> None:
    """One exposition over changing sets of rows and names writes what a new one writes."""
    kept = Exposition()
    for services, backends in ((1, 2), (2, 3), (2, 3), (1, 3), (0, 0), (2, 1)):
        snap = snapshot(services, backends)
        columns = replace(
            snap.stats, frontends=CounterTable.of(snap.stats.frontends), backends=CounterTable.of(snap.stats.backends)
        )
        for shown in (replace(snap, stats=columns), replace(snap, stats=columns, ready=False)):
            assert kept.collect(shown) == Exposition().collect(shown)
    renamed = state(2, 1)
    renamed["services"][0]["name"] = "other 100%"
    assert kept.collect(replace(snap, state=renamed)) == collect(replace(snap, state=renamed))
