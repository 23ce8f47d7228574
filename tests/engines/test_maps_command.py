# SPDX-License-Identifier: Apache-2.0
"""`mesh maps` against the maps of a live kernel engine, and of one whose process was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mesh.cli.exit import Exit
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, Plane

ROOT = Path(__file__).parents[2]


def maps(plane: Plane, *more: str, state: Path | None = None) -> subprocess.CompletedProcess[str]:
    where = ("--state-dir", str(state or plane.state), "--bpf-fs", str(plane.bpffs))
    command = plane.node.command(sys.executable, "-m", "mesh", "maps", *where, *more)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def test_maps_are_printed_with_and_without_a_daemon(plane: Plane, serving: Driver) -> None:
    ids = serving.serve(services=[plane.web("b1", "b2", "b3", options={"deny": ["203.0.113.0/24"]})])["ids"]
    done = maps(plane, "--json")
    assert (done.returncode, done.stderr) == (Exit.OK, "")
    found = json.loads(done.stdout)
    assert {b["name"]: b["id"] for b in found["backends"]} == ids
    for backend in found["backends"]:
        assert (backend["address"], backend["port"]) == (plane.namespaces[backend["name"]].address, TARGET)
        assert (backend["path"], backend["state"], backend["bridge"]) == ("here", "active", "docker_gwbridge")
    (frontend,) = found["frontends"]
    assert (frontend["frontend"], frontend["service"], frontend["table_size"]) == (f"*:{PORT}/tcp", "web", 1021)
    assert sum(owner["current"] for owner in frontend["owners"]) == 1021
    assert found["acl"] == [{"acl": frontend["acl"], "source": "203.0.113.0/24", "action": "deny"}]
    assert {"address": plane.node.address, "kind": "own"} in found["addresses"]
    assert found["config"]["netns"] == "this"
    before = maps(plane).stdout
    assert f"frontend {frontend['id']}  *:{PORT}/tcp  web" in before and frontend["digest"] in before
    seen, _ = serving.explain(source=plane.client.address, port=40000, destination=plane.node.address, to=PORT)
    assert seen["owner"] in ids.values()
    serving.kill()
    assert maps(plane).stdout == before


def test_why_there_are_no_maps(plane: Plane, tmp_path: Path) -> None:
    done = maps(plane, state=tmp_path)
    assert done.returncode == Exit.NOT_READY
    assert "no maps of the kernel engine" in done.stderr and "--state-dir" in done.stderr
    assert done.stderr.count("\n") == 1
