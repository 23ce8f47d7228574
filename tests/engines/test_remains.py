# SPDX-License-Identifier: Apache-2.0
"""What the kernel engine leaves when its agent goes, met by those who do not want it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.config.keys import Config
from mesh.datapath.kernel.cleanup import find, foreign_instances
from mesh.datapath.kernel.fallback import Fallback
from mesh.datapath.proxy.listeners import Interceptor
from mesh.datapath.proxy.nft import NftTable, table_name
from mesh.model import Frontend, Protocol
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, Connection, Plane, refused
from tests.support.daemon import Daemon
from tests.support.polling import PATIENCE, wait_for

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
    options = {
        "provider": "static",
        "static_file": file,
        "bpf_fs": plane.bpffs,
        "drain_timeout": 0,
        "guard_hold": 0,
    } | config
    return contextlib.closing(Daemon(plane.node, plane.lab.directory / "daemon", **options))  # type: ignore[arg-type]


def test_released_without_a_daemon(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    engine.kill()
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    done = mesh(plane, "status")
    assert done.returncode == 3 and "still forward" in done.stderr and "mesh stop --release" in done.stderr, done
    done = stop(plane, 0.5)
    assert done.returncode == 1 and "1 flows still use" in done.stdout, done
    assert refused(plane.client, plane.node.address)  # handed back: nobody else serves here
    connection.echo()
    connection.close()
    done = stop(plane, PATIENCE)
    assert done.returncode == 0 and "are removed" in done.stdout, done
    assert [*(plane.bpffs / "mesh").iterdir(), *plane.state.glob("kernel-*")] == []
    assert "mesh_" not in plane.node.run("bpftool", "net").stdout
    done = stop(plane, 0)
    assert done.returncode == 0 and "none has left anything" in done.stdout, done


def test_flows_whose_client_is_gone_need_not_be_waited_for(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    engine.kill()
    done = mesh(plane, "stop", "--release", "--now")
    assert done.returncode == 0 and "are removed" in done.stdout, done
    assert plane.pins() == []
    connection.close()


def test_who_may_not_look_finds_nothing(plane: Plane, engine: Driver) -> None:
    config = Config(state_dir=str(plane.state), bpf_fs=str(plane.bpffs))
    plane.bpffs.chmod(0o700)
    with plane.node.entered():
        assert (remains := find(config)) and remains.programs
        os.seteuid(65534)
        try:
            assert not remains.programs and foreign_instances(config) == []
        finally:
            os.seteuid(0)


def test_of_another_build(plane: Plane, engine: Driver) -> None:
    """Its tables cannot be read: the programs go at once."""
    engine.kill()
    (home,) = (plane.bpffs / "mesh").iterdir()
    (contract,) = home.iterdir()
    contract.rename(home / "1-ffffffffffff")
    done = stop(plane, PATIENCE)
    assert done.returncode == 0 and "are removed" in done.stdout, done
    assert plane.pins() == [] and refused(plane.client, plane.node.address)


def test_the_proxy_engine_takes_its_place(plane: Plane, engine: Driver) -> None:
    old = next(c for c in iter(lambda: Connection(plane.client, plane.node.address), None) if c.backend == "b1")
    engine.kill()
    with serving_static(plane, "b2", engine="proxy", state_dir=plane.state) as daemon:
        wait_for(lambda: "its programs stay until their flows have ended" in daemon.tail(), "found and handed back")
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
            assert done.returncode == 0 and "are removed" in done.stdout, done
        else:
            daemon.config |= {"engine": engine_next, "intercept": "bind"}
            daemon.start()
            assert set(plane.calls(20)) == {"b1"}
        assert "table inet mesh_" not in tables()


def test_a_take_over_leaves_the_redirection_alone(plane: Plane) -> None:
    """The process that is taken over from serves by it until the other one does."""
    with plane.node.entered():
        table = NftTable(table_name(str(plane.state)))
        config = Config(state_dir=str(plane.state), intercept="nft")
        frontend = Frontend(ipaddress.ip_address("::"), PORT, Protocol.TCP)
        table.replace({frontend: 40000})
        Interceptor("nft", docker_host=False, threads=1, table=table.name, inherited={})
        Fallback(config, {}, docker_host=False)
        assert table.exists()
        Fallback(config, None, docker_host=False)
        assert not table.exists()


def test_the_next_engines_programs_stay(plane: Plane, engine: Driver) -> None:
    """A proxy that waits for flows of a kernel engine before it, and is taken over from by another kernel engine."""
    old = Connection(plane.client, plane.node.address)
    engine.kill()
    with serving_static(plane, "b2", engine="proxy", state_dir=plane.state, drain_timeout=60) as daemon:
        wait_for(lambda: "its programs stay until their flows have ended" in daemon.tail(), "found and handed back")
        proxied = Connection(plane.client, plane.node.address)
        process = daemon.process
        daemon.config["engine"] = "kernel"
        daemon.start("--take-over")
        old.close()  # the first process has nothing to wait for but its own connection
        proxied.echo()
        proxied.close()
        process.wait(PATIENCE)
        assert plane.pins() and set(plane.calls(20)) == {"b2"}
        assert daemon.state()["engine"] == "kernel"


def test_filters_of_another_daemon_stay(plane: Plane, engine: Driver) -> None:
    """Kernels before 6.6: an interface has one filter, and the other daemon has replaced the one of before."""
    engine.close(release=True)
    engine.end()
    first = plane.driver()
    first.pretend_kernel(major=6, minor=1)
    first.open()
    first.serve(services=[plane.web("b1")])
    first.kill()
    other = plane.driver(state_dir=plane.lab.directory / "another")
    other.pretend_kernel(major=6, minor=1)
    other.open()
    other.serve(services=[plane.web("b2")])
    assert set(plane.calls(20)) == {"b2"}
    done = stop(plane, PATIENCE)
    assert done.returncode == 0 and "are removed" in done.stdout, done
    assert set(plane.calls(20)) == {"b2"}
    other.close(release=True)
    other.end()
    assert "mesh_" not in plane.node.run("bpftool", "net").stdout


@pytest.fixture
def neighbour(plane: Plane, engine: Driver) -> Iterator[Daemon]:
    with serving_static(plane, "b2", engine="kernel", state_dir=plane.lab.directory / "another") as daemon:
        yield daemon


def test_programs_of_another_state_directory_are_named(plane: Plane, engine: Driver, neighbour: Daemon) -> None:
    config = Config(state_dir=str(plane.lab.directory / "another"), bpf_fs=str(plane.bpffs))
    with plane.node.entered():
        (pins,) = foreign_instances(config)
    (problem,) = wait_for(lambda: [p for p in neighbour.state()["problems"] if "state directory" in p], "said")
    assert str(pins) in problem and "mesh stop --release" in problem
    engine.close(release=True)
    engine.end()
    with plane.node.entered():
        assert foreign_instances(config) == []
    assert set(plane.calls(60)) == {"b2"}
