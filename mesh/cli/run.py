# SPDX-License-Identifier: Apache-2.0
"""`mesh run`: the daemon."""

from __future__ import annotations

import sys
from typing import Any

import click

from mesh.config.load import config_options, load


@click.command()
@click.option("--take-over", is_flag=True, help="Take over the ports of the daemon that runs in this state directory.")
@config_options
def run(take_over: bool, **flags: Any) -> None:
    """Run the daemon: serve what the local swarm publishes, or an embedded demo where there is no Docker.

    Where Docker is installed but not up, or in no swarm yet, it waits for the swarm and never serves the demo.

    Every configuration key is a flag. Flags override the environment (MESH_ENGINE, …), the environment overrides the
    file (--config, by default /etc/mesh/mesh.toml), and the file overrides the defaults.

    \b
    Signals:   SIGTERM, SIGINT   stop accepting, wait for connections (--drain-timeout), exit; twice: exit at once
               SIGHUP            reload the configuration
    Example:   mesh run                                   the swarm, or the demo where there is no Docker
               mesh run --provider static --static-file services.toml
               mesh run --take-over                       upgrade without a refused connection
    """
    config = load(flags)
    from mesh.agent import agent  # noqa: PLC0415 -- late: the engines are not needed by the other commands

    sys.exit(agent.run(config, reload=lambda: load(flags), take_over=take_over))
