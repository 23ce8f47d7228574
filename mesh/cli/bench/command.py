# SPDX-License-Identifier: Apache-2.0
"""`mesh bench`: measure a service, through the mesh and directly."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import resource
import ssl
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import click
import uvloop

from mesh.cli.bench import report
from mesh.cli.bench import target as bench_target
from mesh.cli.bench.http import request
from mesh.cli.bench.load import Call, End, Kind, Load, Tally, dial
from mesh.cli.bench.target import Behind, Target
from mesh.cli.client import daemon_options
from mesh.cli.exit import Exit
from mesh.cli.output import Json, echo_json
from mesh.netaddr import is_mine

THROUGH, DIRECT = "through", "direct"
SLICES: Final = 2  # of each phase, the sides in turn, so that what drifts meets both
SAMPLE: Final = 128  # connections that are held to see where the kernel engine has put them
SPARE_FILES: Final = 64
MAX_DATAGRAM: Final = 65507
MAX_CONNECTIONS, MAX_SECONDS, MAX_COUNT, MAX_SIZE = 1024, 60, 1_000_000, 1 << 20
Phase = tuple[str, Call, bool]  # title, what is asked, on open connections


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. Seconds."""

    connections: int
    seconds: float
    count: int
    timeout: float
    echo: bool
    send: str
    size: int
    header: tuple[str, ...]
    by: str
    direct: bool
    insecure: bool


@click.command()
@click.argument("target", metavar="TARGET")
@click.option(
    "-c",
    "--connections",
    type=click.IntRange(1, MAX_CONNECTIONS),
    default=16,
    show_default=True,
    help="Concurrent connections.",
)
@click.option(
    "-t", "--seconds", type=click.FloatRange(0.1, MAX_SECONDS), default=3.0, show_default=True,
    help="Maximum time per phase and side.",
)  # fmt: skip
@click.option(
    "-n", "--count", type=click.IntRange(1, MAX_COUNT), default=10_000, show_default=True,
    help="Maximum connections, or requests, per phase and side.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(0.01, 60), default=5.0, show_default=True, help="Timeout for one response."
)
@click.option("--echo", is_flag=True, help="tcp, udp: the service echoes; verify that it does.")
@click.option("--send", default="", metavar="TEXT", help="tcp, udp: the payload (\\n and \\x00 are escapes).")
@click.option(
    "--size", type=click.IntRange(1, MAX_SIZE), default=64, show_default=True, help="Payload in bytes, without --send."
)
@click.option("--header", multiple=True, metavar="'NAME: VALUE'", help="http: an extra header; repeatable.")
@click.option(
    "--by", default="", metavar="HEADER", help="http: identify backends by this response header, or by `body`."
)
@click.option(
    "--direct/--no-direct", default=True, show_default=True, help="Compare with direct calls to this node's tasks."
)
@click.option("--insecure", is_flag=True, help="https: accept any certificate.")
@daemon_options
def bench(target: str, state_dir: Path, as_json: bool, **options: Any) -> None:
    """Measure a service: new connections per second, requests on open connections, latency percentiles with a
    histogram, throughput, and how connections are spread over the backends.

    TARGET is a published port, HOST:PORT, a service name, or a URL: http://…, https://…, tcp://HOST:PORT,
    udp://HOST:PORT. Without a scheme, one GET finds out whether the port speaks HTTP. tcp:// opens and closes
    connections, and exchanges data with --echo or --send. udp:// sends datagrams; any response counts, with --echo only
    the same bytes.

    On a node the daemon says which backends serve the port; this node's tasks are then also called directly, in turn
    with the calls through the mesh. Calls from the node itself take the local path (a socket connected straight to a
    task with the kernel engine). Run this on another host to measure what clients see.

    --seconds and --count bound the load; the first limit reached ends a phase. One process on one core makes it, good
    for some thousand connections per second; the result says so where the client is the bottleneck.

    \b
    Exit code: 0 every call was answered; 1 not all were; 3, 4 an unknown service name.
    Example:   mesh bench 8080
               mesh bench http://192.0.2.1:8080/ready --by server -c 64 -t 10
               mesh bench udp://192.0.2.1:7000 --send ping
    """
    chosen = Options(**options)
    _allow_files(chosen.connections)
    asked, behind = bench_target.ask(bench_target.parse(target), state_dir)
    asked, name = dataclasses.replace(asked, host=bench_target.resolve(asked.host, asked.port, asked.kind)), asked.host
    if behind.service and not is_mine(ipaddress.ip_address(asked.host)):
        behind = Behind(reason=f"{asked.host} is not an address of this node")
    if asked.kind is not Kind.UDP:
        greet = asked.kind is None
        http = _run(bench_target.reach(asked.host, asked.port, chosen.timeout, greet=greet))
        asked = dataclasses.replace(asked, kind=(Kind.HTTP if http else Kind.TCP) if greet else asked.kind)
    sides = {THROUGH: [End(asked.host, asked.port)]}
    if chosen.direct and behind.ends:
        sides[DIRECT] = behind.ends
    if not as_json:
        _introduce(asked, behind, sides)
    found: Json = {"target": asked.called, "kind": asked.kind.value if asked.kind else "", "phases": []}
    found |= {"service": behind.service, "frontend": behind.frontend, "engine": behind.engine}
    found |= {"behind": [dataclasses.asdict(end) | {"preface": end.preface.hex()} for end in behind.ends]}
    plan = phases(asked, name, chosen)
    before = bench_target.opened(state_dir, behind) if behind.service else Counter[str]()
    first: Tally | None = None
    for title, call, kept in plan:
        tallies = measure(sides, call, chosen, kept=kept)
        if first is None:
            first = tallies[THROUGH]
            now = bench_target.opened(state_dir, behind) if behind.service else Counter[str]()
            found["distribution"] = distribution(first, call, behind, now - before, sides[THROUGH][0])
        advice = report.advice(tallies)
        found["phases"].append(
            {"name": title, "sides": {side: report.summary(tally) for side, tally in tallies.items()}}
            | {"notes": advice}
        )
        if not as_json:
            report.phase(title, tallies)
            click.echo("\n".join(["", *advice, ""]) if advice else "", nl=False)
    if as_json:
        echo_json(found)
    else:
        _print_distribution(found["distribution"], behind)
    answered = all(
        phase["sides"][THROUGH]["operations"] and not phase["sides"][THROUGH]["errors"] for phase in found["phases"]
    )
    if not answered:
        sys.exit(Exit.NOT_READY)


def phases(target: Target, name: str, options: Options) -> list[Phase]:
    """What is measured, in this order; the first opens a connection per exchange."""
    if target.kind is Kind.HTTP:
        tls = _tls(options.insecure) if target.tls else None
        host = dataclasses.replace(target, host=name).called
        asked = [request(host, target.path, options.header, keep=keep) for keep in (False, True)]
        base = Call(Kind.HTTP, by=options.by, timeout=options.timeout, tls=tls, server_name=name if tls else None)
        return [
            ("new connections, one request each", dataclasses.replace(base, request=asked[0]), False),
            ("requests on kept connections", dataclasses.replace(base, request=asked[1]), True),
        ]
    payload = options.send.encode().decode("unicode_escape").encode("latin-1") if options.send else _filler(options)
    if target.kind is Kind.UDP:
        if len(payload) > MAX_DATAGRAM:
            raise click.BadParameter(f"a datagram has at most {MAX_DATAGRAM} bytes", param_hint="--size")
        call = Call(Kind.UDP, payload, echo=options.echo, timeout=options.timeout)
        return [("datagrams, a new socket each", call, False), ("datagrams on kept sockets", call, True)]
    if not (options.echo or options.send):
        return [("new connections", Call(Kind.TCP, timeout=options.timeout), False)]
    call = Call(Kind.TCP, payload, echo=options.echo, timeout=options.timeout)
    return [("new connections, one exchange each", call, False), ("exchanges on kept connections", call, True)]


def _filler(options: Options) -> bytes:
    return bytes(97 + n % 26 for n in range(options.size))


def _tls(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def measure(sides: dict[str, list[End]], call: Call, options: Options, *, kept: bool) -> dict[str, Tally]:
    """One phase: the sides in turn, in slices."""
    tallies = {side: Tally() for side in sides}
    count = max(1, options.count // SLICES)
    for turn in range(SLICES):
        for side in list(sides)[:: -1 if turn % 2 else 1]:
            load = Load(
                call,
                sides[side],
                connections=min(options.connections, count),
                kept=kept,
                seconds=options.seconds / SLICES,
                count=count,
            )
            tallies[side].add(_run(load.run()))
    return tallies


def _run(work: Any) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def distribution(tally: Tally, call: Call, behind: Behind, counted: Counter[str], end: End) -> Json:
    """Who got the new connections, and how that is known: `how` is empty where it is not."""
    if call.by:
        return {"how": f"by {call.by}, as they say themselves", "counts": dict(tally.told)}
    if counted.total() >= tally.operations // 2 and counted:
        return {"how": "as the daemon counted, other clients' included", "counts": dict(counted)}
    if behind.ends and call.kind is not Kind.UDP:
        held = _run(_where_to(call, behind, end))
        if held:
            return {"how": f"{held.total()} connections of this client, by their sockets", "counts": dict(held)}
    return {"how": "", "counts": {}}


async def _where_to(call: Call, behind: Behind, end: End) -> Counter[str]:
    """Hold some connections and look where they really end."""
    async with AsyncExitStack() as stack:
        ports = []
        for _ in range(SAMPLE):
            try:
                async with asyncio.timeout(call.timeout):
                    flow = await dial(dataclasses.replace(call, tls=None), end)
            except (OSError, TimeoutError):
                break
            stack.callback(flow.close)
            ports.append(int(flow.transport.get_extra_info("sockname")[1]))
        return bench_target.connected(ports, behind)


def _introduce(target: Target, behind: Behind, sides: dict[str, list[End]]) -> None:
    of = f"service {behind.service} at {behind.frontend}, {behind.engine} engine" if behind.service else behind.reason
    click.echo(f"{THROUGH:<8} {target.kind.value if target.kind else ''} {target.called} ({of})")
    if DIRECT in sides:
        click.echo(f"{DIRECT:<8} {bench_target.described(behind)}")
    elif behind.service:
        click.echo(f"{DIRECT:<8} not compared: {behind.reason or '--no-direct'}")


def _print_distribution(found: Json, behind: Behind) -> None:
    if found["how"]:
        known = not found["how"].startswith("by ")
        report.spread(Counter(found["counts"]), behind.shares if known else {}, found["how"])
    else:
        click.echo("\ndistribution over backends: not known here; --by HEADER or --by body lets them say it (http)")


def _allow_files(connections: int) -> None:
    """As many descriptors as are allowed.

    Raises:
        click.BadParameter: they do not do.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < connections + SPARE_FILES:
        raise click.BadParameter(f"this process may have {hard} descriptors only", param_hint="--connections")
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


__all__: Sequence[str] = ("bench",)
