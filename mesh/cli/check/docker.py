# SPDX-License-Identifier: Apache-2.0
"""`mesh check`: Docker and the swarm, through the Engine's socket. Reads only."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from mesh.cli.check.finding import Finding, Level
from mesh.cli.check.paths import Other, check_paths
from mesh.cli.client import call
from mesh.config.keys import Config
from mesh.datapath.kernel.preflight import preflight
from mesh.errors import MeshError, plain
from mesh.model import Address, EngineKind
from mesh.netaddr import of_proc, split_host_port

_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)
_DOCKER: Final = ("dockerd", "docker-proxy")
_LISTEN: Final = "0A"  # TCP_LISTEN in /proc/net/tcp


def check_docker(config: Config) -> Iterator[Finding]:
    """Whether the Engine answers, whether this node is of a swarm, and who holds its published ports."""
    if config.provider in ("static", "demo"):
        yield Finding("Docker", Level.OK, f"not needed with provider = {config.provider}")
        return
    # auto serves the demo where there is no Docker; swarm has nothing to serve then.
    missing = Level.FAIL if config.provider == "swarm" else Level.WARN
    try:
        version, info, services, nodes = asyncio.run(_ask(config.docker_host))
    except PermissionError:
        yield Finding("Docker", missing, f"no permission for {config.docker_host}", "run as root or in group docker")
        return
    except (OSError, ValueError, TimeoutError, aiohttp.ClientError) as error:
        found = f"{config.docker_host}: {plain(error)}"
        yield Finding("Docker", missing, found, "start Docker, or set docker_host to its socket")
        return
    yield Finding("Docker", Level.OK, f"Engine {version.get('Version')}, API {version.get('ApiVersion')}")
    swarm = info.get("Swarm") or {}
    if swarm.get("LocalNodeState") != "active":
        yield Finding("swarm", missing, f"this node is {swarm.get('LocalNodeState') or 'of none'}", "docker swarm init")
        return
    if not swarm.get("ControlAvailable"):
        managers = sorted(m.get("Addr", "") for m in swarm.get("RemoteManagers") or ())
        if not managers:
            yield Finding("swarm", missing, "this node is a worker that knows no manager", "docker swarm join")
            return
        yield Finding("swarm", Level.OK, f"worker {swarm.get('NodeID')}, told by {', '.join(managers)}")
        found = "of a worker, Docker lists the managers only; `mesh check` on a manager tries the paths to all nodes"
        yield Finding("paths", Level.OK, found)
        yield from check_paths(config, _address(swarm.get("NodeAddr", "")), others(swarm, nodes))
        return
    yield Finding("swarm", Level.OK, f"manager {swarm.get('NodeID')}")
    yield from _ports(services, config)
    yield from _tunnel(services, config, int(swarm.get("Nodes") or 1))
    yield from check_paths(config, _address(swarm.get("NodeAddr", "")), others(swarm, nodes))


def others(swarm: Mapping[str, Any], nodes: list[dict[str, Any]]) -> list[Other]:
    """The swarm's other nodes: all by `nodes` (GET /nodes), or on a worker, which cannot list any, the managers."""
    own, found = swarm.get("NodeID"), []
    for node in nodes:
        status, manager = node.get("Status") or {}, node.get("ManagerStatus") or {}
        # A manager that was initialised without an address reports 0.0.0.0 as its own.
        address = _address(status.get("Addr", "")) or _address(manager.get("Addr", ""))
        name = (node.get("Description") or {}).get("Hostname") or node.get("ID", "")
        if node.get("ID") != own:
            found.append(Other(name, address, status.get("State") != "down"))
    if not nodes:
        places = ((m.get("NodeID"), m.get("Addr", "")) for m in swarm.get("RemoteManagers") or ())
        found = [Other(f"manager {place}", _address(place)) for node, place in places if node != own]
    return found


def _address(text: str) -> Address | None:
    """An address with or without port; None where there is none, or one that means no node in particular."""
    try:
        address = ipaddress.ip_address(split_host_port(text, default=0)[0])
    except ValueError:
        return None
    return None if address.is_unspecified or address.is_loopback else address


async def _ask(host: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """/version, /info and, from a manager, /services and /nodes (else empty lists)."""
    connector = aiohttp.UnixConnector(host.removeprefix("unix://")) if host.startswith("unix://") else None
    base = "http://docker" if connector else host.replace("tcp://", "http://", 1)
    async with aiohttp.ClientSession(base, connector=connector, timeout=_TIMEOUT) as session:

        async def get(path: str) -> Any:
            async with session.get(path) as response:
                return msgspec.json.decode(await response.read()) if response.status == 200 else None

        try:
            version, info = await get("/version"), await get("/info")
        except aiohttp.ClientConnectorError as error:
            raise error.os_error from error
        if not isinstance(version, dict) or not isinstance(info, dict):
            raise ValueError("what answers there is not a Docker Engine")
        services, nodes = await get("/services"), await get("/nodes")
        listed = [answer if isinstance(answer, list) else [] for answer in (services, nodes)]
        return version, info, listed[0], listed[1]


def _ports(services: list[dict[str, Any]], config: Config) -> Iterator[Finding]:
    """Published ports, and which of them somebody listens on: old Engines do, and then only nft can take them over."""
    published = {
        int(port["PublishedPort"])
        for service in services
        for port in service.get("Endpoint", {}).get("Ports") or []
        if port.get("PublishMode") == "ingress" and port.get("Protocol") == "tcp"
    }
    listeners = listening()
    held = sorted(published & listeners.keys())
    yield from _strangers({port: listeners[port] for port in held}, config)
    if held and config.intercept == "bind":
        found = f"{len(held)} of {len(published)} published TCP ports are held by a process: {held[:5]}"
        yield Finding("published ports", Level.WARN, found, "set intercept = auto, which takes them over by nftables")
    else:
        found = f"{len(published)} published TCP ports" + (f", {len(held)} also held by a process" if held else "")
        yield Finding("published ports", Level.OK, found)


def _tunnel(services: list[dict[str, Any]], config: Config, nodes: int) -> Iterator[Finding]:
    """Who publishes the UDP port that the kernel engine takes for the tunnel, where there are other nodes."""
    if config.engine == EngineKind.PROXY or preflight(config) is not None:
        return
    for service in services:
        for port in service.get("Endpoint", {}).get("Ports") or []:
            if (port.get("Protocol"), port.get("PublishedPort")) == ("udp", config.tunnel_port):
                name = service.get("Spec", {}).get("Name") or service.get("ID")
                when = "is not served" if nodes > 1 else "will not be served once there is another node"
                found = f"UDP {config.tunnel_port} of service {name} {when}: it is the port of the tunnel between nodes"
                remedy = "publish another port, or set tunnel_port to another one on all nodes"
                yield Finding("published ports", Level.FAIL if nodes > 1 else Level.WARN, found, remedy)


def _strangers(held: Mapping[int, set[str]], config: Config) -> Iterator[Finding]:
    """Processes that are neither Docker nor mesh and that a published port keeps from hearing anything."""
    holders = _holders({inode: port for port, inodes in held.items() for inode in inodes})
    own = _daemon(config) if holders else None
    for port, pid, name in sorted(holders):
        if name in _DOCKER or pid == own:
            continue
        found = f"TCP {port} is also held by {name} (pid {pid}): clients reach the service, not that process"
        if config.intercept == "bind" and config.engine != EngineKind.KERNEL:
            found = f"TCP {port} is held by {name} (pid {pid}): the proxy engine cannot serve it with intercept = bind"
        yield Finding("published ports", Level.WARN, found, "publish another port, or have that process use one")


def _daemon(config: Config) -> int | None:
    try:
        return int(call(Path(config.state_dir), "/state")["pid"])
    except MeshError:
        return None


def _holders(wanted: Mapping[str, int]) -> set[tuple[int, int, str]]:
    """Port, process id and name of those that hold these sockets (port by inode), as far as this user may see."""
    found = set()
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    kind, _, inode = str(descriptor.readlink()).partition(":")
                    port = wanted.get(inode.strip("[]")) if kind == "socket" else None
                    if port is not None:
                        found.add((port, int(process.name), (process / "comm").read_text().strip()))
    return found


def listening() -> dict[int, set[str]]:
    """TCP ports on which any process of this network namespace listens, with the sockets' inodes (proc(5))."""
    ports: dict[int, set[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    ports.setdefault(of_proc(fields[1])[1], set()).add(fields[9])
    return ports
