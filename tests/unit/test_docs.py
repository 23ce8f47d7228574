# SPDX-License-Identifier: Apache-2.0
"""What people read says what the code does. `make docs` writes the generated parts anew."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest

from mesh.cli.exit import Exit
from mesh.cli.main import COMMANDS
from mesh.config import keys
from mesh.config.load import load
from mesh.datapath.counters import Failure
from mesh.metrics import families
from mesh.providers.labels import KEYS
from tests.support import bpf_schema

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "OPERATIONS.md"
DATAPATH = ROOT / "docs" / "DATAPATH.md"
METRIC = re.compile(r"\bmesh_[a-z0-9_]+")
SUFFIXES = ("_bucket", "_sum", "_count")


def config_table() -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in keys.KEYS.values():
        default = f"{key.default:g}" if key.type == "float" else str(key.default)
        meaning = key.metadata["help"]
        if key.metadata["choices"]:
            meaning += f" ({', '.join(f'`{choice}`' for choice in key.metadata['choices'])})"
        live = " ↻" if key.metadata["live"] else ""
        meaning += "".join(f" (formerly `{was}`)" for was in key.metadata["was"])
        rows.append(f"| `{key.name}`{live} | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(rows)


def example() -> str:
    """deploy/mesh.toml.example."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# /etc/mesh/mesh.toml: every key with its default. Keep what you change. Environment (MESH_ENGINE, ...) and",
        "# flags (--engine, ...) win over it; unknown keys are refused. `mesh check` judges it, SIGHUP reads it again.",
    ]
    for key in keys.KEYS.values():
        meaning, choices = key.metadata["help"], key.metadata["choices"]
        value = json.dumps(key.default) if key.type == "str" else str(key.default)
        one_of = f" One of: {', '.join(choices)}." if choices else ""
        lines += ["", f"# {meaning[0].upper()}{meaning[1:]}.{one_of}", f"{key.name} = {value}"]
    return "\n".join(lines) + "\n"


EXAMPLE = ROOT / "deploy" / "mesh.toml.example"
GENERATED = [
    (README, "config", config_table),
    (OPERATIONS, "metrics", families.table),
    (DATAPATH, "programs", bpf_schema.program_table),
    (DATAPATH, "maps", bpf_schema.map_table),
]


def split(text: str, name: str) -> tuple[str, str, str]:
    """What is before, in and after the generated part of this name."""
    before, begin, rest = text.partition(f"<!-- generated:{name} -->\n")
    inside, end, after = rest.partition("<!-- /generated -->")
    assert begin and end
    return before + begin, inside, end + after


@pytest.mark.parametrize(("file", "name", "table"), GENERATED)
def test_generated_tables_are_up_to_date(file: Path, name: str, table: object) -> None:
    assert callable(table)
    assert split(file.read_text(), name)[1] == f"{table()}\n", "run: make docs"


def known_metrics() -> set[str]:
    names = {family.name for family in (*families.FAMILIES, *families.ENGINE.values())}
    return names | {name + suffix for name in names for suffix in SUFFIXES}


@pytest.mark.parametrize("file", ["README.md", "docs/OPERATIONS.md", "deploy/alerts.yml", "deploy/grafana.json"])
def test_metrics_that_are_named_exist(file: str) -> None:
    assert set(METRIC.findall((ROOT / file).read_text())) <= known_metrics()


def documented(heading: str) -> set[str]:
    """First column of the tables under a heading of OPERATIONS.md."""
    section = OPERATIONS.read_text().partition(f"\n{heading}\n")[2]
    section = re.split(r"\n#{2,3} ", section)[0]
    return {
        cell.strip("` ") for row in re.findall(r"^\| (`?[^|]+) \|", section, re.MULTILINE) for cell in row.split(",")
    }


def test_every_label_exit_code_cause_and_alert_is_explained() -> None:
    assert {f"mesh.{key}" for key in KEYS} <= documented("## Labels")
    assert {str(code.value) for code in Exit} <= documented("## Commands and exit codes")
    assert {cause.value for cause in Failure} <= documented("## Metrics")
    alerts = set(re.findall(r"- alert: (\w+)", (ROOT / "deploy/alerts.yml").read_text()))
    assert alerts == documented("## Alerts") - {"alert"}


def test_every_alert_has_a_runbook_and_it_exists() -> None:
    rules = (ROOT / "deploy/alerts.yml").read_text()
    links = re.findall(r"- alert: (\w+).*?runbook_url: (\S+?)#(\S+)$", rules, re.DOTALL | re.MULTILINE)
    assert [alert for alert, _, _ in links] == re.findall(r"- alert: (\w+)", rules)
    for alert, file, anchor in links:
        assert anchor == alert.lower(), alert
        assert anchor in anchors(ROOT / file), alert


def test_names_not_ids_are_what_alerts_and_panels_show() -> None:
    """Ids of tasks and nodes mean nothing to whoever is called at night."""
    shown = (ROOT / "deploy/alerts.yml").read_text()
    panels = json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]
    shown += "\n".join(target.get("legendFormat", "") for panel in panels for target in panel["targets"])
    assert not re.search(r"labels\.backend\b|\{\{\s*backend\s*\}\}", shown)


def test_state_keys_are_explained() -> None:
    from tests.support.metrics_samples import state

    shown = state()
    service = shown["services"][0]
    frontend = service["frontends"][0]
    text = OPERATIONS.read_text().partition("### /state")[2].partition("\n## ")[0]
    keys = {
        *shown,
        *service,
        *frontend,
        *frontend["targets"][0],
        *shown["provider"],
        *shown["apply"],
        *shown["drained"],
    }
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_commands_that_are_shown_exist() -> None:
    for file in (README, OPERATIONS):
        shown = set(re.findall(r"(?:^|`|bin/)mesh ([a-z][a-z-]*)", file.read_text(), re.MULTILINE))
        assert shown <= set(COMMANDS), file


def test_the_example_is_the_default() -> None:
    assert load({"config": str(EXAMPLE)}, {}) == keys.Config()
    assert EXAMPLE.read_text() == example(), "run: make docs"


def test_the_unit_waits_longer_than_the_daemon_drains() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/mesh.service")
    service = unit["Service"]
    assert service["Type"] == "notify" and int(service["WatchdogSec"]) > 0
    assert int(service["TimeoutStopSec"]) > keys.Config().drain_timeout
    assert service["ExecReload"].endswith("-HUP $MAINPID")


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


ONE_ENGINE = {
    family.name
    for family in (families.RETRIED, families.CONNECT, families.BACKEND_RETRIED, families.BACKEND_FAILED,
                   families.BACKEND_CONNECT, families.VERDICTS, *families.ENGINE.values())
}  # fmt: skip


def test_panels_that_name_no_engine_show_both() -> None:
    for panel in json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]:
        used = set(METRIC.findall(" ".join(target["expr"] for target in panel["targets"])))
        used = {name.removesuffix("_bucket") for name in used}
        assert " engine: " in panel["title"] or not used & ONE_ENGINE, panel["title"]


def test_what_developing_names_exists() -> None:
    text = (ROOT / "docs" / "DEVELOPING.md").read_text()
    for path in re.findall(r"(?<![\w/])(?:bpf|deploy|docs|mesh|tests)/[\w./]*\w/?", text):
        assert (ROOT / path).exists(), path
    for file, word in re.findall(r"-m pytest (\S+) -k (\w+)", text):
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), f"{file}: no test named {word}"


def anchors(file: Path) -> set[str]:
    """The headings of a document, as links name them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for file in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", file.read_text()):
            target = file.parent / path if path else file
            assert target.exists(), f"{file.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{file.name}: {path}#{anchor}"


def write() -> None:
    """Write what is generated into the documents."""
    for file, name, table in GENERATED:
        before, _, after = split(file.read_text(), name)
        file.write_text(f"{before}{table()}\n{after}")
    EXAMPLE.write_text(example())


if __name__ == "__main__":
    write()
