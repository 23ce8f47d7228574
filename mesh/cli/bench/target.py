# SPDX-License-Identifier: Apache-2.0
"""What `mesh bench` is pointed at: an address, or what the daemon knows under a port or a service's name."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import click
from prometheus_client.parser import text_string_to_metric_families

from mesh import netaddr
from mesh.cli.bench.load import End, Kind, cause_of
from mesh.cli.client import call
from mesh.cli.exit import DaemonRefusedError, DaemonUnreachableError
from mesh.cli.output import Json, address_port
from mesh.errors import MeshError
from mesh.health.probe import PROXY_LOCAL

SCHEMES: Final = {"http": Kind.HTTP, "https": Kind.HTTP, "tcp": Kind.TCP, "udp": Kind.UDP}
GREETING: Final = b"GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
OPENED: Final = "mesh_backend_connections_opened"


@dataclass(frozen=True, slots=True)
class Target:
    """Where to call. `kind` None: to be found out. `called` is how a person would write it, without scheme."""

    kind: Kind | None
    tls: bool
    host: str
    port: int
    path: str = "/"
    service: str = ""

    @property
    def called(self) -> str:
        return netaddr.join_host_port(self.host, self.port)


@dataclass(slots=True)
class Behind:
    """What the daemon says of the port: who stands behind it. Empty `service`: nothing is known, for `reason`."""

    service: str = ""
    frontend: str = ""
    engine: str = ""
    ends: list[End] = field(default_factory=list)
    elsewhere: int = 0  # backends of other nodes, which cannot be called from here past the mesh
    names: dict[str, str] = field(default_factory=dict)  # by backend id
    shares: dict[str, float] = field(default_factory=dict)  # of the slots, by name
    reason: str = ""


def parse(text: str) -> Target:
    """A port, `host:port`, or a URL with scheme http, https, tcp or udp; anything else is a service's name.

    Raises:
        click.BadParameter: it is none of these.
    """
    if text.isdigit() and 0 < int(text) < 65536:
        return Target(None, tls=False, host="127.0.0.1", port=int(text))
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in SCHEMES:
        raise click.BadParameter(f"{scheme}:// is not one of {', '.join(SCHEMES)}", param_hint="TARGET")
    if not separator and not re.search(r":\d+(/|$)", text):
        return Target(None, tls=False, host="", port=0, service=text)
    try:
        url = urlsplit(text if separator else f"//{text}")
        port = url.port or {"http": 80, "https": 443}.get(scheme, 0)
    except ValueError as error:
        raise click.BadParameter(f"{text}: {error}", param_hint="TARGET") from error
    if not url.hostname or not port:
        raise click.BadParameter(f"{text}: needs a host and a port", param_hint="TARGET")
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    kind = SCHEMES[scheme] if separator else Kind.HTTP if url.path else None
    return Target(kind, tls=scheme == "https", host=url.hostname, port=port, path=path)


def resolve(host: str, port: int, kind: Kind | None) -> str:
    """The first address of a name.

    Raises:
        MeshError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM if kind is Kind.UDP else socket.SOCK_STREAM)
    except OSError as error:
        raise MeshError(f"cannot be resolved: {error.strerror}", where=host) from error
    return str(found[0][4][0])


def ask(target: Target, state_dir: Path) -> tuple[Target, Behind]:
    """What the daemon knows. A service's name becomes an address; without it a daemon that is away is no error.

    Raises:
        DaemonUnreachableError, DaemonRefusedError: the name of a service was given, and nobody knows it.
    """
    try:
        state = call(state_dir, "/state")
    except (DaemonUnreachableError, DaemonRefusedError) as error:
        if target.service:
            raise
        return target, Behind(reason=f"no daemon to ask: {error.message}")
    found = [
        (service, frontend)
        for service in state["services"]
        for frontend in service["frontends"]
        if _is_meant(target, service, frontend["frontend"])
    ]
    if not found and target.service:
        remedy = "`mesh services` lists them; or give a port, host:port or a URL"
        raise DaemonRefusedError(f"no service {target.service!r} is published", remedy=remedy)
    if not found:
        return target, Behind(reason="the daemon serves no such port")
    service, frontend = found[0]
    address, port, protocol = _split(frontend["frontend"])
    if target.service or (address != "*" and target.host == "127.0.0.1"):
        host = "127.0.0.1" if address == "*" else address
        kind = Kind.UDP if protocol == "udp" else target.kind
        target = Target(kind, tls=target.tls, host=host, port=port, path=target.path)
    return target, _behind(state, service, frontend)


def _behind(state: Json, service: Json, frontend: Json) -> Behind:
    behind = Behind(service=service["name"], frontend=frontend["frontend"], engine=state["engine"])
    preface = PROXY_LOCAL if service["options"].get("proxy_protocol") == "v2" else b""
    for target in frontend["targets"]:
        name = target["name"] or target["backend"]
        behind.names[target["backend"]] = name
        behind.shares[name] = target["slots"] / (frontend["table_size"] or 1)
        if not target["weight"]:
            continue
        if target["local"] and target["address"]:
            behind.ends.append(End(str(target["address"]), int(target["port"]), name, preface))
        else:
            behind.elsewhere += 1
    if not behind.ends:
        behind.reason = "no backend on this node takes new connections"
    return behind


def _is_meant(target: Target, service: Json, frontend: str) -> bool:
    address, port, protocol = _split(frontend)
    if target.service:
        return bool(service["name"] == target.service or service["id"].startswith(target.service))
    same = port == target.port and (protocol == "udp") == (target.kind is Kind.UDP)
    return same and (target.host == "127.0.0.1" or address in ("*", target.host))


def _split(frontend: str) -> tuple[str, int, str]:
    """`*:80/tcp`, `[2001:db8::1]:80/udp` as address, port, protocol."""
    rest, _, protocol = frontend.rpartition("/")
    return *netaddr.split_host_port(rest), protocol


async def reach(host: str, port: int, patience: float, *, greet: bool) -> bool:
    """Connect once, so that an address where nobody listens is said in a word. `greet`: whether HTTP is spoken there.

    Raises:
        MeshError: nothing can be connected there.
    """
    where = netaddr.join_host_port(host, port)
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        message = "no connection in time" if isinstance(error, TimeoutError) else cause_of(error)
        raise MeshError(message, where=where, remedy="is anything published there? `mesh services` lists it") from error
    try:
        if not greet:
            return False
        async with asyncio.timeout(min(patience, 2.0)):
            writer.write(GREETING % where.encode())
            return (await reader.readexactly(5)) == b"HTTP/"
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()


def opened(state_dir: Path, behind: Behind) -> Counter[str]:
    """Connections given to each backend so far, by backend's name, as the daemon counts them."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
        for family in text_string_to_metric_families(asyncio.run(_metrics(state_dir / "mesh.sock"))):
            if family.name == OPENED:
                for sample in family.samples:
                    if sample.labels["frontend"] == behind.frontend:
                        id_ = sample.labels["backend"]
                        counts[behind.names.get(id_, id_)] += int(sample.value)
    return counts


async def _metrics(control: Path) -> str:
    connector = aiohttp.UnixConnector(str(control))
    async with aiohttp.ClientSession("http://mesh", connector=connector) as session, session.get("/metrics") as answer:
        return await answer.text()


def connected(ports: Iterable[int], behind: Behind) -> Counter[str]:
    """Where connections from these local ports really end, by backend's name, for those that end at one.

    The kernel engine connects this node's own sockets straight to a task, behind the process's back: getpeername(2)
    names the published port, /proc/net/tcp the task (proc(5)).
    """
    names = {(ipaddress.ip_address(end.host), end.port): end.name for end in behind.ends}
    wanted, counts = set(ports), Counter[str]()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                local, remote = line.split()[1:3]
                name = names.get(netaddr.of_proc(remote))
                if name and netaddr.of_proc(local)[1] in wanted:
                    counts[name] += 1
    return counts


def described(behind: Behind) -> str:
    """Who stands behind a port, in a few words."""
    shown = [f"{end.name} {address_port({'address': end.host, 'port': end.port})}" for end in behind.ends[:4]]
    more = [f"and {len(behind.ends) - 4} more"] if len(behind.ends) > 4 else []
    away = [f"{behind.elsewhere} on other nodes left out"] if behind.elsewhere else []
    return ", ".join([*shown, *more, *away])
