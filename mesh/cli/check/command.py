# SPDX-License-Identifier: Apache-2.0
"""`mesh check`: can the daemon run here, one finding per question, with its remedy."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import Any

import click

from mesh.agent.wiring import choose_provider
from mesh.cli.check.cluster import check_cluster
from mesh.cli.check.docker import check_docker
from mesh.cli.check.finding import Finding, Level
from mesh.cli.check.firewall import check_firewall
from mesh.cli.check.host import check_host
from mesh.cli.check.paths import summed
from mesh.cli.exit import Exit
from mesh.cli.output import echo_json, echo_table
from mesh.config.keys import Config
from mesh.config.load import config_options, load
from mesh.errors import ConfigError, MeshError


@click.command()
@click.option("--cluster", is_flag=True, help="Check the paths to all other nodes instead; needs a running daemon.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@config_options
def check(as_json: bool, cluster: bool, **flags: Any) -> None:
    """Check whether the daemon can run here: configuration, engine, limits, ports, Docker, firewall, with remedies.

    Takes the flags of `mesh run`, so that it judges the configuration that would run. Needs no running daemon, here or
    elsewhere: it also tries the ports of mesh on the swarm's other nodes (all of them on a manager, the managers on a
    worker), where mesh answers or else the kernel, for a closed port. Each is open, blocked, or unknown. The last line
    sums up.

    With --cluster it asks the daemon for the swarm's nodes and tries the path to each of them as traffic takes it:
    control port (mutual TLS; certificates, version, engine), peer port by TCP and UDP, path MTU, and between kernel
    engines the tunnel in both directions. Clocks need not agree.

    \b
    Exit code: 0 no finding fails; 1 a finding would keep the daemon, or the nodes together, from serving.
    Example:   mesh check --engine proxy --http-listen 127.0.0.1:9551
               mesh check --cluster --json | jq '.[] | select(.level == "fail")'
    """
    config, findings = _config(flags)
    findings += check_cluster(config) if cluster else _check_here(config)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    else:
        rows: list[tuple[object, ...]] = [(f.level.value, f.what, f.found) for f in findings]
        echo_table(rows, "LEVEL", "WHAT", "FOUND", empty="")
        click.echo()
        remedies = [(f.level.value, f.what, f.remedy) for f in findings if f.remedy and f.level is not Level.OK]
        for remedy in dict.fromkeys(remedies):
            click.echo(": ".join(remedy))
        click.echo(summed(findings))
    if any(finding.level is Level.FAIL for finding in findings):
        sys.exit(Exit.NOT_READY)


def _check_here(config: Config) -> list[Finding]:
    resolved = _resolved(config)
    return [*check_host(resolved), *check_docker(config), *check_firewall(resolved)]


def _config(flags: dict[str, Any]) -> tuple[Config, list[Finding]]:
    """The configuration, or the default one and what is wrong with it."""
    try:
        config = load(flags)
        old = [Finding("configuration", Level.WARN, f"{p.where}: {p.message}", p.remedy) for p in config.problems]
        return config, old or [Finding("configuration", Level.OK, "can be used")]
    except ConfigError as error:
        found = f"{error.where}: {error.message}" if error.where else error.message
        return Config(), [Finding("configuration", Level.FAIL, found, error.remedy or "correct it")]


def _resolved(config: Config) -> Config:
    """With the provider that `auto` would come to, because the engine depends on it."""
    try:
        return asyncio.run(choose_provider(config))[0]
    except MeshError:  # reported where that provider is checked
        return config
