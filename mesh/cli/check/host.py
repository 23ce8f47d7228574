# SPDX-License-Identifier: Apache-2.0
"""`mesh check`: the host, that is engine, limits, nftables, state directory, ports."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mesh.cli.check.finding import Finding, Level
from mesh.cli.client import call
from mesh.config.keys import Config
from mesh.datapath.kernel.preflight import preflight
from mesh.errors import MeshError, ProviderError
from mesh.model import EngineKind
from mesh.netaddr import split_host_port
from mesh.providers.static import read_static

FILES_WANTED: Final = 65536
TUNNEL_ROOM: Final = 64  # bytes of outer headers between two nodes: IPv4, UDP, Geneve with one option and a proof
LEAST_MTU: Final = 1216  # what a path with an MTU of 1280 leaves


def check_host(config: Config) -> Iterator[Finding]:
    """Everything that needs no Docker."""
    yield _engine(config)
    yield _files()
    yield _nft(config)
    running, finding = _state_dir(Path(config.state_dir))
    yield finding
    if config.engine != EngineKind.PROXY and config.provider in ("auto", "swarm"):
        yield _tunnel_port(config.tunnel_port)
        yield _tunnel_mtu()
    if config.http_listen:
        yield _http(config.http_listen, running)
    if config.provider == "static":
        yield _static_file(config.static_file)


def _engine(config: Config) -> Finding:
    """Which engine would be taken. The proxy engine runs everywhere, so only who insists on the other one can fail."""
    release = platform.release()
    if config.engine == EngineKind.PROXY:
        return Finding("engine", Level.OK, "proxy, as configured")
    obstacle = preflight(config)
    if obstacle is None:
        return Finding("engine", Level.OK, f"kernel, on {release}")
    if config.engine == EngineKind.KERNEL:
        return Finding("engine", Level.FAIL, f"not kernel: {obstacle}", "remove it, or set engine = auto")
    remedy = "remove that obstacle for the kernel engine, or set engine = proxy"
    return Finding("engine", Level.OK if config.provider == "demo" else Level.WARN, f"proxy: {obstacle}", remedy)


def _files() -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        return Finding("open files", Level.OK, shown)
    remedy = "the proxy engine needs two or more descriptors per connection; raise LimitNOFILE or `ulimit -Hn`"
    return Finding("open files", Level.WARN, shown, remedy)


def _nft(config: Config) -> Finding:
    """Only the proxy engine on a Docker host needs it."""
    if config.intercept == "bind" or config.engine == EngineKind.KERNEL:
        return Finding("nftables", Level.OK, "not needed with this configuration")
    bad = Level.FAIL if config.intercept == "nft" else Level.WARN
    command = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if command is None:
        return Finding("nftables", bad, "no command nft", "install the package nftables")
    done = subprocess.run([command, "list", "tables"], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["?"])[0]
        return Finding("nftables", bad, error, "run as root, on a kernel with nf_tables")
    return Finding("nftables", Level.OK, "usable")


def _tunnel_port(port: int) -> Finding:
    """The programs take every datagram for it, so a process that listens there hears nothing."""
    what = "tunnel port"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("", port))
    except OSError as error:
        remedy = f"`ss -lnup 'sport = {port}'` names it; set tunnel_port to another one on all nodes"
        return Finding(what, Level.WARN, f"UDP {port}: {error.strerror}; its owner receives nothing", remedy)
    return Finding(what, Level.OK, f"UDP {port} is free; rules of this host do not apply to it, those in between do")


def _tunnel_mtu() -> Finding:
    """By the interfaces that have a default route: other nodes are usually reached by one of them."""
    what = "tunnel MTU"
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            name, destination, *_ = line.split()
            if destination == "00000000":
                found[name] = int(Path(f"/sys/class/net/{name}/mtu").read_text())
    if not found:
        return Finding(what, Level.OK, "no default route: the MTU of the path to each node applies")
    name, mtu = min(found.items(), key=lambda item: item[1])
    shown = f"{mtu} on {name}, so {mtu - TUNNEL_ROOM} for packets to tasks of other nodes"
    if mtu - TUNNEL_ROOM < LEAST_MTU:
        return Finding(what, Level.WARN, shown, f"raise it to {LEAST_MTU + TUNNEL_ROOM} or more")
    return Finding(what, Level.OK, shown)


def _state_dir(path: Path) -> tuple[bool, Finding]:
    """Whether a daemon answers there already, and what is to be said about the directory."""
    what = "state directory"
    try:
        pid = call(path, "/state")["pid"]
    except MeshError:
        pass
    else:
        remedy = "`mesh run --take-over` replaces it without refusing a connection"
        return True, Finding(what, Level.WARN, f"{path}: a daemon runs there, pid {pid}", remedy)
    nearest = next((p for p in (path, *path.parents) if p.exists()), path)
    if not nearest.is_dir():
        return False, Finding(what, Level.FAIL, f"{nearest} is not a directory", "set state_dir to another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return False, Finding(what, Level.FAIL, f"{nearest} cannot be written", "run as root, or set state_dir")
    return False, Finding(what, Level.OK, f"{path}" + ("" if nearest == path else ", will be created"))


def _http(listen: str, running: bool) -> Finding:
    what = "HTTP port"
    try:
        address = split_host_port(listen)
    except ValueError:
        return Finding(what, Level.FAIL, f"{listen!r} is not HOST:PORT", "set http_listen, for example 127.0.0.1:9550")
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
    except OSError as error:
        if running:
            return Finding(what, Level.OK, f"{listen}, held by the running daemon")
        return Finding(what, Level.FAIL, f"{listen}: {error.strerror}", "set http_listen to a free one, or to nothing")
    return Finding(what, Level.OK, f"{listen} is free")


def _static_file(path: str) -> Finding:
    what = "static file"
    if not path:
        return Finding(what, Level.FAIL, "none given", "set static_file to a readable TOML file")
    try:
        inventory = read_static(Path(path))
    except ProviderError as error:
        return Finding(what, Level.FAIL, str(MeshError(error.message, where=error.where)), error.remedy or "correct it")
    counts = f"{len(inventory.services)} services, {len(inventory.backends)} backends"
    return Finding(what, Level.OK, f"{path}: {counts}")
