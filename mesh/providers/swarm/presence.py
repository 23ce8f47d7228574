# SPDX-License-Identifier: Apache-2.0
"""Whether this host is meant to run a Docker Engine, also while none answers.

`provider = auto` serves the swarm on such a host and waits for it: a demo there would take ports that are the swarm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mesh.config.keys import KEYS, Config

UNITS: Final = ("docker.service", "docker.socket")
UNIT_DIRECTORIES: Final = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
BOOTED: Final = "run/systemd/system"  # exists where systemd runs the host: sd_booted(3)


def docker_trace(config: Config, root: Path = Path("/")) -> str:
    """Why an Engine is expected on this host, in a few words; empty where there is no trace of one.

    The first of these that holds:

    1. docker_host is set to something else than its default.
    2. The socket of docker_host exists.
    3. systemd runs this host, and docker.service or docker.socket is enabled.
    4. docker_data_root has a directory `swarm`, which dockerd makes when it first starts, or cannot be looked into.

    A docker binary alone, or a unit on a host that systemd does not run, is no trace.

    Args:
        root: of all paths.
    """
    if config.docker_host != KEYS["docker_host"].default:
        return f"docker_host is {config.docker_host}"
    socket = config.docker_host.removeprefix("unix://")
    if _holds((root / socket.lstrip("/")).exists):
        return f"{socket} exists"
    if _holds((root / BOOTED).is_dir):
        for unit in _enabled(root):
            return f"{unit} is enabled"
    swarm = f"{config.docker_data_root}/swarm"
    if _holds((root / swarm.lstrip("/")).is_dir):
        return f"{swarm} exists"
    return ""


def _enabled(root: Path) -> Iterator[str]:
    """Units of Docker that some target or socket wants."""
    for directory in UNIT_DIRECTORIES:
        for kind in ("wants", "requires"):
            for link in sorted((root / directory).glob(f"*.{kind}/docker.*")):
                if link.name in UNITS:
                    yield link.name


def _holds(look: Callable[[], bool]) -> bool:
    """What a look at a path says; that it is forbidden says that there is something."""
    try:
        return look()
    except PermissionError:
        return True
    except OSError:
        return False
