# SPDX-License-Identifier: Apache-2.0
"""The command group: finds the commands, and turns errors into a line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any, Final, TextIO, cast

import click

from mesh.cli.exit import DaemonRefusedError, DaemonUnreachableError, Exit
from mesh.errors import ConfigError, MeshError
from mesh.text import Printable, printable

COMMANDS: Final = {
    "run": ("run", "Run the daemon."),
    "check": ("check.command", "Can the daemon run here: findings and remedies."),
    "status": ("status", "Is the node healthy, and if not, why."),
    "nodes": ("nodes", "The cluster's nodes, and the paths from here to each."),
    "services": ("services", "Published services and ports."),
    "backends": ("services", "Backends: health and share of new connections."),
    "probe": ("probe", "Whether a backend answers on its own node, and the path there."),
    "explain": ("explain", "Which backend a connection gets, and why."),
    "maps": ("maps", "What the kernel engine's programs forward by."),
    "trace": ("trace", "Connections as they open, close, are reset or dropped."),
    "bench": ("bench.command", "Measure a service: connections, latency, throughput, distribution."),
    "connectivity-test": ("connectivity", "Every node calls every task through every node."),
    "drain": ("drain", "Stop new connections to a backend or a node."),
    "undrain": ("drain", "Resume new connections to a backend or a node."),
    "keys": ("keys", "The swarm's keys by which nodes prove themselves; a new one."),
    "stop": ("stop", "Stop the daemon; hand the ports back if asked to."),
}
"""The module below `mesh.cli` that has the command, and what `mesh --help` says of it: in the order of that list. Only
the module of the command that runs is imported, because imports are most of what a command costs."""


class _Group(click.Group):
    """Imports the command that is asked for; prints an error that a user can act on as one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with contextlib.redirect_stdout(cast(TextIO, Printable(sys.stdout))):
                return super().invoke(ctx)
        except ConfigError as error:
            _fail(error, Exit.USAGE)
        except DaemonUnreachableError as error:
            _fail(error, Exit.UNREACHABLE)
        except DaemonRefusedError as error:
            _fail(error, Exit.REFUSED)
        except MeshError as error:
            _fail(error, Exit.NOT_READY)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mesh.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _fail(error: MeshError, code: Exit) -> None:
    click.echo(f"mesh: {printable(str(error))}", err=True)
    sys.exit(code)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 success; 1 not ready, or a check failed; 2 wrong usage or configuration; "
    "3 the daemon does not answer; 4 the daemon refused the request; 5 traffic is degraded.",
)
@click.version_option(package_name="mesh", prog_name="mesh")
def main() -> None:
    """A routing mesh for Docker Swarm: forwards every connection to a published port to one healthy backend.

    \b
    Start:    mesh check                    can the daemon run here, and what to fix first
              mesh run                      the daemon: serves the local swarm, or a demo where there is none
    Read:     mesh status                   is the node healthy, and if not, why
              mesh nodes                    the cluster's nodes, and the paths from here to each
              mesh services                 published services and ports
              mesh backends web             the backends of a service, their health and share of connections
              mesh probe web.3              whether its own node reaches a backend, and the path there
              mesh explain 192.0.2.7:40000 192.0.2.1:8080    which backend a connection gets, and why
              mesh trace --service web      connections as they open and close
              mesh bench 8080               measure a service, and which backends answer
              mesh check --cluster          can this node reach every other node
              mesh connectivity-test        every node calls every task through every node
              mesh maps                     what the kernel engine's programs forward by, as text
    Change:   mesh drain node worker-3      no new connections to that node, from any; open ones stay
              mesh undrain node worker-3
              mesh stop --release           stop the daemon and hand the ports back to Docker

    Commands that read take --json for scripts.
    """
