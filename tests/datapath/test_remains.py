# SPDX-License-Identifier: Apache-2.0
"""What the kernel engine leaves when its agent goes, met by those who do not want it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.config import Config
from mesh.datapath.kernel_remains import strangers
from tests.daemon import Daemon
from tests.datapath.kernel_driver import Driver
from tests.datapath.kernel_plane import PORT, TARGET, Connection, Plane, refused
from tests.lab.netns import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def engine(serving: Driver) -> Driver:
    """Not the suite's, which is a name."""
    return serving


def mesh(plane: Plane, *command: str) -> subprocess.CompletedProcess[str]:
    """`mesh COMMAND`, with nobody to ask."""
    line = (str(Path(sys.executable).with_name("mesh")), *command, "--state-dir", str(plane.state))
    return plane.node.run(*line, check=False, env=os.environ | {"MESH_BPF_FS": str(plane.bpffs)})


def stop(plane: Plane, seconds: float) -> subprocess.CompletedProcess[str]:
    return mesh(plane, "stop", "--release", "--timeout", str(seconds))


def serving_static(plane: Plane, name: str, **config: object) -> contextlib.AbstractContextManager[Daemon]:
    """The daemon, which serves one backend."""
    file = plane.lab.directory / "static.toml"
    file.write_text(
        f"""[[services]]
name = "web"
[services.options]
health = "off"
[[services.ports]]
published = {PORT}
target = {TARGET}
[[services.backends]]
name = "{name}"
address = "{plane.namespaces[name].address}"
"""
    )
    options = {"provider": "static", "static_file": file, "bpf_fs": plane.bpffs, "drain_timeout": 0} | config
    return contextlib.closing(Daemon(plane.node, plane.lab.directory / "daemon", **options))


def test_released_without_a_daemon(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    engine.kill()
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    done = mesh(plane, "status")
    assert done.returncode == 3 and "forwards on" in done.stderr and "mesh stop --release" in done.stderr, done
    done = stop(plane, 0.5)
    assert done.returncode == 1 and "1 flows still go" in done.stdout, done
    assert refused(plane.client, plane.node.address)  # handed back: nobody else serves here
    connection.echo()
    connection.close()
    done = stop(plane, PATIENCE)
    assert done.returncode == 0 and "taken off" in done.stdout, done
    assert [*(plane.bpffs / "mesh").iterdir(), *plane.state.glob("kernel-*")] == []
    assert "mesh_" not in plane.node.run("bpftool", "net").stdout
    done = stop(plane, 0)
    assert done.returncode and "no daemon answers there" in done.stderr, done


def test_of_another_build(plane: Plane, engine: Driver) -> None:
    """Its tables cannot be read: the programs go at once."""
    engine.kill()
    (home,) = (plane.bpffs / "mesh").iterdir()
    (contract,) = home.iterdir()
    contract.rename(home / "1-ffffffffffff")
    done = stop(plane, PATIENCE)
    assert done.returncode == 0 and "taken off" in done.stdout, done
    assert plane.pins() == [] and refused(plane.client, plane.node.address)


def test_the_proxy_engine_takes_its_place(plane: Plane, engine: Driver) -> None:
    old = next(c for c in iter(lambda: Connection(plane.client, plane.node.address), None) if c.backend == "b1")
    engine.kill()
    with serving_static(plane, "b2", engine="proxy", state_dir=plane.state) as daemon:
        wait_for(lambda: "its programs go with the flows" in daemon.tail(), "found and handed back")
        assert set(plane.calls(60)) == {"b2"}
        old.echo()
        assert plane.pins()
        old.close()
        wait_for(lambda: not plane.pins(), "taken off")
        assert set(plane.calls(60)) == {"b2"}


@pytest.mark.parametrize("engine_next", ["proxy", "kernel", "none"])
def test_a_killed_proxys_redirection_is_taken_away(plane: Plane, engine_next: str) -> None:
    def tables() -> str:
        return plane.node.run("nft", "list", "tables").stdout

    with serving_static(plane, "b1", engine="proxy", state_dir=plane.state, intercept="nft") as daemon:
        assert "table inet mesh_" in tables()
        daemon.kill()
        assert "table inet mesh_" in tables() and refused(plane.client, plane.node.address)
        if engine_next == "none":
            done = stop(plane, 0)
            assert done.returncode == 0 and "taken off" in done.stdout, done
        else:
            daemon.config |= {"engine": engine_next, "intercept": "bind"}
            daemon.start()
            assert set(plane.calls(20)) == {"b1"}
        assert "table inet mesh_" not in tables()


@pytest.fixture
def neighbour(plane: Plane, engine: Driver) -> Iterator[Daemon]:
    with serving_static(plane, "b2", engine="kernel", state_dir=plane.lab.directory / "another") as daemon:
        yield daemon


def test_programs_of_another_state_directory_are_named(plane: Plane, engine: Driver, neighbour: Daemon) -> None:
    config = Config(state_dir=str(plane.lab.directory / "another"), bpf_fs=str(plane.bpffs))
    with plane.node.entered():
        (pins,) = strangers(config)
    (problem,) = wait_for(lambda: [p for p in neighbour.state()["problems"] if "state directory" in p], "said")
    assert str(pins) in problem and "mesh stop --release" in problem
    engine.close(release=True)
    engine.end()
    with plane.node.entered():
        assert strangers(config) == []
    assert set(plane.calls(60)) == {"b2"}
