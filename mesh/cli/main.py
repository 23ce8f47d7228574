# SPDX-License-Identifier: Apache-2.0
"""The command group: registers the commands, and turns errors into a line on stderr and an exit code."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import click

from mesh.cli.bench.command import bench
from mesh.cli.check.command import check
from mesh.cli.connectivity import connectivity_test
from mesh.cli.drain import drain, undrain
from mesh.cli.exit import DaemonRefusedError, DaemonUnreachableError, Exit
from mesh.cli.explain import explain
from mesh.cli.maps import maps
from mesh.cli.nodes import nodes
from mesh.cli.probe import probe
from mesh.cli.run import run
from mesh.cli.services import backends, services
from mesh.cli.status import status
from mesh.cli.stop import stop
from mesh.cli.trace import trace
from mesh.errors import ConfigError, MeshError


class _Group(click.Group):
    """Prints an error that a user can act on as one line on stderr; lists commands in the order of registration."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
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
        return list(self.commands)


def _fail(error: MeshError, code: Exit) -> None:
    click.echo(f"mesh: {error}", err=True)
    sys.exit(code)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 success; 1 not ready, or a check failed; 2 wrong usage or configuration; "
    "3 the daemon does not answer; 4 the daemon refused the request; 5 traffic is degraded.",
)
@click.version_option(metadata.version("mesh"), prog_name="mesh")
def main() -> None:
    """A routing mesh for Docker Swarm: forwards every connection to a published port to one healthy backend.

    \b
    Start:    mesh check                    can the daemon run here, and what to fix first
              mesh run                      the daemon: serves the local swarm, or a demo where there is none
    Read:     mesh status                   is the node healthy, and if not, why
              mesh nodes                    the cluster's nodes, and the paths from here to each
              mesh services                 published services and ports
              mesh backends web             the backends of a service, their health and share of connections
              mesh probe web.3                whether its own node reaches a backend, and the path there
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


for _command in (
    run,
    check,
    status,
    nodes,
    services,
    backends,
    probe,
    explain,
    maps,
    trace,
    bench,
    connectivity_test,
    drain,
    undrain,
    stop,
):
    main.add_command(_command)
