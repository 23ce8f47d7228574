# SPDX-License-Identifier: Apache-2.0
"""A new service label is a row of the label table and a field of the model: everything between carries it unasked.

Shown on a copy of the package with labels of three kinds added, and by a look at the sources: whoever names a field of
the options makes use of it.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mesh
from mesh.model import HealthCheck, ServiceOptions

PACKAGE = Path(mesh.__file__).parent
EDITS = {
    "model.py": (
        ("    deny: tuple[Network, ...] = ()", "    pacing: int = 0\n    trusted: tuple[Network, ...] = ()\n"),
        ("    fall: int = 3", "    threshold: float = 1.0\n"),
    ),
    "providers/labels.py": (
        (
            '    "deny": _Option(_NETWORKS, _networks),',
            '    "pacing": _integer(0, 9),\n    "trusted": _Option(_NETWORKS, _networks),\n'
            '    "health.threshold": _duration(0.0, 9),\n',
        ),
    ),
}
"""By file: a line, and what comes behind it."""

JOURNEY = '''
import asyncio, json, sys
from pathlib import Path
from ipaddress import ip_address, ip_network

from mesh.api.services import Services
from mesh.cluster import wire
from mesh.cluster.translate import Incoming, Outgoing
from mesh.config.keys import Config
from mesh.datapath.base import Applied, FrontendEntry
from mesh.datapath.kernel.journal import Journal
from mesh.model import HealthCheck, HealthView, ServiceOptions
from mesh.providers.static import parse_static
from mesh.providers.swarm.decode import NO_GATEWAY, Answers, decode
from mesh.reconcile.compose import compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Picture
from mesh.reconcile.plan import plan

directory = Path(sys.argv[1])
assert Path(sys.modules["mesh"].__file__).is_relative_to(directory)
wanted = ServiceOptions(
    pacing=5, trusted=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")), health=HealthCheck(threshold=2.5)
)

# labels -> inventory
labels = {"mesh.pacing": "5", "mesh.trusted": "10.0.0.0/8, fd00::/8", "mesh.health.threshold": "2500ms"}
port = {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8000, "PublishMode": "ingress"}
services = [{"ID": "s", "Spec": {"Name": "web", "Labels": labels}, "Endpoint": {"Ports": [port]}}]
info = {"Name": "n", "Swarm": {"NodeID": "n", "LocalNodeState": "active", "ControlAvailable": True}}
bodies = [json.dumps(body).encode() for body in (info, services, [], [], [], [])]
read = decode(Answers(*bodies, gateway=NO_GATEWAY)).inventory
assert not read.problems, read.problems
assert read.services[0].options == wanted

# file -> inventory
text = """
[[services]]
name = "web"
options = { pacing = 5, trusted = ["10.0.0.0/8", "fd00::/8"], health-threshold = "2500ms" }
[[services.ports]]
published = 8000
target = 80
"""
text = text.replace("[[services.ports]]", "backends = []\\n[[services.ports]]")
assert parse_static(text, "file").services[0].options == wanted

# inventory -> wire -> other side
message = wire.decode(wire.encode(wire.Snapshot(1, Outgoing().content(read, {}))))
inventory = Incoming().inventory(message.content)
assert inventory.services == read.services

# other side -> journal -> restart
desired = compose(inventory, HealthView(), Drained(), Config())
step = plan(Applied(), desired)
Journal(directory / "names.json").put(step, Applied())
(restored,) = Journal(directory / "names.json").read().frontends.values()
assert restored.options == wanted

# control API
(shown,) = Services("proxy").shown(Picture(inventory, HealthView(), Drained(), desired=desired), step.result)
print(json.dumps(shown["options"]))
'''


def test_a_new_label_travels_from_the_label_to_the_control_api(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "mesh", ignore=shutil.ignore_patterns("__pycache__", "*.pyx", "*.c"))
    for name, edits in EDITS.items():
        path = tmp_path / "mesh" / name
        text = path.read_text()
        for line, added in edits:
            (found,) = [each for each in text.splitlines(keepends=True) if each.startswith(line)]
            text = text.replace(found, found + added)
        path.write_text(text)
    command = [sys.executable, "-c", JOURNEY, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["pacing"], shown["trusted"], shown["health"]["threshold"]) == (5, ["10.0.0.0/8", "fd00::/8"], 2.5)


FIELDS = {field.name for kind in (ServiceOptions, HealthCheck) for field in dataclasses.fields(kind)}
MOST = 4  # fields that one function may use of one object


def lists_of_options(path: Path) -> Iterator[str]:
    """Where a file names more fields than it can make use of: in a call, a dict, a class, or of one object."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        named: dict[str, set[str]] = {}
        if isinstance(node, ast.Call):
            named["call"] = {keyword.arg for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Dict):
            named["dict"] = {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.ClassDef):
            fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
            named["class"] = {target.id for target in fields if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            for each in ast.walk(node):
                if isinstance(each, ast.Attribute):
                    named.setdefault(ast.unparse(each.value), set()).add(each.attr)
        for where, names in named.items():
            if len(names & FIELDS) > MOST:
                yield f"{path.name}:{getattr(node, 'lineno', 0)}: {where} names {', '.join(sorted(names & FIELDS))}"


def test_nobody_lists_the_options() -> None:
    """Who names most of the fields copies them one by one, and would have to be told of a new one."""
    owners = {PACKAGE / "model.py", PACKAGE / "providers" / "labels.py"}
    assert all([*lists_of_options(owner)] for owner in owners)
    found = [line for path in sorted(PACKAGE.rglob("*.py")) if path not in owners for line in lists_of_options(path)]
    assert not found, "\n".join(found)
