# SPDX-License-Identifier: Apache-2.0
"""The command group: what all commands share, and how errors and exit codes reach the shell."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import click

from mesh.cli.exit import DaemonRefusedError, DaemonUnreachableError, Exit
from mesh.errors import ConfigError, MeshError


def _exit_code(error: MeshError) -> Exit:
    if isinstance(error, ConfigError):
        return Exit.USAGE
    if isinstance(error, DaemonUnreachableError):
        return Exit.UNREACHABLE
    return Exit.REFUSED if isinstance(error, DaemonRefusedError) else Exit.NOT_READY


class _Group(click.Group):
    """Errors a person can act on are one line on stderr, not a traceback; commands are listed as they were added."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshError as error:
            click.echo(f"mesh: {error}", err=True)
            sys.exit(_exit_code(error))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done and well; 1 not ready, or a check failed; 2 wrong usage or configuration; "
    "3 the daemon does not answer; 4 the daemon cannot do what was asked.",
)
@click.version_option(metadata.version("mesh"), prog_name="mesh")
def main() -> None:
    """A routing mesh for Docker Swarm: carries every connection to a published port to one healthy backend.

    \b
    Start:    mesh check          can it run here, and what would help
              mesh run            the daemon (the local swarm, else a demo with its own backends)
    LocalView:     mesh status         is it well
              mesh services       what is published
              mesh backends web   who serves it
              mesh explain 192.0.2.7:40000 192.0.2.1:8080    where does this connection go, and why
              mesh trace --service web      connections as they come and go
              mesh bench 8080               how fast is it, and who answers
              mesh check --cluster          does this node reach every other one, and why not
    Change:   mesh drain node worker-3      no new connections there; those it has stay
              mesh undrain node worker-3
              mesh stop --release           stop and hand the ports back to Docker

    Commands that read take --json for scripts.
    """


def _register() -> None:
    from mesh.cli import change, read, run, trace  # noqa: PLC0415 -- they import what is above
    from mesh.cli.bench import command as bench  # noqa: PLC0415 -- they import what is above
    from mesh.cli.check import command as check  # noqa: PLC0415 -- they import what is above

    for command in (
        run.run, check.check, read.status, read.services, read.backends, read.explain, trace.trace, bench.bench,
        change.drain, change.undrain, change.stop,
    ):  # fmt: skip
        main.add_command(command)


_register()
