# SPDX-License-Identifier: Apache-2.0
"""`mesh run`: the daemon."""

from __future__ import annotations

import sys
from typing import Any

import click

from mesh.config.load import config_options, load


@click.command(short_help="The daemon.")
@click.option(
    "--take-over", is_flag=True, help="Take the ports over from the daemon that runs in this state directory."
)
@config_options
def run(take_over: bool, **flags: Any) -> None:
    """The daemon: serve what the local swarm publishes, else an embedded demo with its own backends.

    Every key of the configuration is a flag here. A flag wins over the environment (MESH_ENGINE, …), the environment
    over the file (--config, normally /etc/mesh/mesh.toml), the file over the default.

    \b
    Signals:   SIGTERM, SIGINT   accept nothing new, let connections end (--drain-timeout), leave; twice: at once
               SIGHUP            read the configuration again
    Example:   mesh run                                   the swarm, or the demo where there is none
               mesh run --provider static --static-file services.toml
               mesh run --take-over                       upgrade: no connection is refused
    """
    config = load(flags)
    from mesh.agent import agent  # noqa: PLC0415 -- late: the engines are not needed by the other commands

    sys.exit(agent.run(config, reload=lambda: load(flags), take_over=take_over))
