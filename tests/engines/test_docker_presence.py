# SPDX-License-Identifier: Apache-2.0
"""`provider = auto`: a demo only where there is no trace of Docker. Real sockets, unit files and directories."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mesh.agent.wiring import choose_provider
from mesh.config.keys import Config
from mesh.providers.swarm import docker_trace
from mesh.providers.swarm.presence import BOOTED

CONFIG = Config()


def enable(root: Path, directory: str, unit: str) -> None:
    """As `systemctl enable` does."""
    wants = root / directory / "multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / unit).symlink_to(f"/lib/systemd/system/{unit}")


def test_without_a_trace_of_docker_it_is_none(tmp_path: Path) -> None:
    (tmp_path / BOOTED).mkdir(parents=True)
    enable(tmp_path, "etc/systemd/system", "ssh.service")
    (tmp_path / "var/lib/docker").mkdir(parents=True)  # of a package that was installed and never started
    assert docker_trace(CONFIG, tmp_path) == ""


@pytest.mark.parametrize(
    "directory", ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"]
)
@pytest.mark.parametrize("unit", ["docker.service", "docker.socket"])
def test_an_enabled_unit_counts_where_systemd_runs_the_host(tmp_path: Path, directory: str, unit: str) -> None:
    enable(tmp_path, directory, unit)
    if directory != BOOTED:
        assert docker_trace(CONFIG, tmp_path) == ""
    (tmp_path / BOOTED).mkdir(parents=True, exist_ok=True)
    assert docker_trace(CONFIG, tmp_path) == f"{unit} is enabled"


def test_a_unit_that_is_installed_and_not_enabled_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / BOOTED).mkdir(parents=True)
    (tmp_path / "lib/systemd/system").mkdir(parents=True)
    (tmp_path / "lib/systemd/system/docker.service").touch()
    assert docker_trace(CONFIG, tmp_path) == ""


def test_the_directory_that_dockerd_makes_is_a_trace(tmp_path: Path) -> None:
    (tmp_path / "var/lib/docker/swarm").mkdir(parents=True)
    assert docker_trace(CONFIG, tmp_path) == "/var/lib/docker/swarm exists"
    assert docker_trace(Config(docker_data_root="/srv/docker"), tmp_path) == ""


def test_a_socket_is_a_trace(tmp_path: Path) -> None:
    """An Engine that has its socket and does not answer yet, as socket activation leaves it."""
    (tmp_path / "var/run").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/var/run/docker.sock")
        listening.listen()
        assert docker_trace(CONFIG, tmp_path) == "/var/run/docker.sock exists"


def test_an_engine_that_was_named_is_expected(tmp_path: Path) -> None:
    named = Config(docker_host="tcp://192.0.2.1:2375")
    assert docker_trace(named, tmp_path) == "docker_host is tcp://192.0.2.1:2375"


DROP = """
import os, sys
from pathlib import Path
from mesh.providers.swarm import docker_trace
from mesh.config.keys import Config
os.setgid(65534)
os.setuid(65534)
print(docker_trace(Config(), Path(sys.argv[1])))
"""


@pytest.mark.root
def test_a_data_root_that_is_closed_to_us_is_a_trace() -> None:
    """As /var/lib/docker is to all but root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        root = Path(made)
        root.chmod(0o755)
        (root / "var/lib/docker/swarm").mkdir(parents=True)
        (root / "var/lib/docker").chmod(0o710)
        done = subprocess.run([sys.executable, "-c", DROP, made], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "/var/lib/docker/swarm exists", done.stderr


async def test_auto_waits_for_docker_and_serves_a_demo_only_elsewhere(tmp_path: Path) -> None:
    config = Config(docker_data_root=str(tmp_path))
    here = docker_trace(config)  # of this host's own socket and units
    assert (await choose_provider(config))[0].provider == ("swarm" if here else "demo")
    (tmp_path / "swarm").mkdir()
    assert (await choose_provider(config))[0].provider == "swarm"
    assert (await choose_provider(Config(docker_host=f"unix://{tmp_path}/none")))[0].provider == "swarm"
    static = Config(docker_data_root=str(tmp_path), static_file=str(tmp_path / "services.toml"))
    assert (await choose_provider(static))[0].provider == "static"
