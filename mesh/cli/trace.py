# SPDX-License-Identifier: Apache-2.0
"""`mesh trace`: live connections, with bcc."""

from __future__ import annotations

import ipaddress
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mesh import netaddr
from mesh.cli.client import call, daemon_options
from mesh.cli.exit import DaemonRefusedError

if TYPE_CHECKING:
    from mesh.trace.connections import Row

_HEADER = ("time", "event", "service", "backend", "client", "seconds", "in", "out", "rtt ms", "retr", "why")
_WIDTHS = (12, 6, 16, 24, 22, 9, 10, 10, 7, 4, 0)


def _wanted(service: str, backend: str, client: str) -> Callable[[Row], bool]:
    try:
        network = ipaddress.ip_network(client, strict=False) if client else None
    except ValueError as error:
        raise click.BadParameter(f"{error}; give an address or a network", param_hint="--client") from error

    def keep(row: Row) -> bool:
        if service and row.service != service:
            return False
        if backend and not row.backend.startswith(backend):
            return False
        return network is None or netaddr.split_address_port(row.client)[0] in network

    return keep


def _line(values: tuple[object, ...]) -> str:
    def shown(value: object, width: int) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
        return text.ljust(width)

    return " ".join(shown(value, width) for value, width in zip(values, _WIDTHS, strict=True)).rstrip()


@click.command()
@click.option("--service", default="", help="Only this service.")
@click.option("--backend", default="", help="Only backends whose name starts with this.")
@click.option("--client", default="", help="Only clients with this address or in this network.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Stop after this time (default: at ctrl-C).")
@daemon_options
def trace(service: str, backend: str, client: str, seconds: float | None, state_dir: Path, as_json: bool) -> None:
    """Show connections through the mesh as they open and close, as the sockets of the local tasks see them.

    Needs root, Debian's python3-bpfcc and kernel headers. It costs nothing while it does not run. With the kernel
    engine the client is the real one. The proxy engine uses two connections: the client's own is shown without a
    backend, the one to the task with this node as its client. Health probes appear as connections from this node that
    carry no data.

    \b
    Example:   mesh trace --service web
               mesh trace --client 192.0.2.0/24 --json
    """
    from mesh.trace.connections import ConnectionTrace  # noqa: PLC0415 -- bcc is optional

    if service and not any(known["name"] == service for known in call(state_dir, "/state")["services"]):
        raise DaemonRefusedError(f"no service {service!r} is published", remedy="`mesh services` lists them")
    running = ConnectionTrace(lambda: call(state_dir, "/state"), _wanted(service, backend, client))
    if not as_json:
        click.echo(_line(_HEADER))
    try:
        for row in running.rows(seconds):
            if as_json:
                click.echo(json.dumps(row.as_dict()))
                continue
            moment = datetime.fromtimestamp(row.time).strftime("%H:%M:%S.%f")[:12]
            click.echo(
                _line(
                    (
                        *(moment, row.event, row.service, row.backend, row.client, row.duration, row.bytes_in),
                        *(row.bytes_out, row.rtt_ms, row.retransmits, row.reason),
                    )
                )
            )
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    if running.lost:
        click.echo(f"mesh: {running.lost} events were lost because they came too fast; narrow the filter", err=True)
