# SPDX-License-Identifier: Apache-2.0
"""The static provider: services and backends from a TOML file, re-read when it changes.

    [[services]]
    name = "web"
    [services.options]                # names and values as the labels of a swarm service, without "mesh."
    affinity = "client-ip"
    health = "http:/ready"
    health-interval = "500ms"         # mesh.health.interval; or, in quotes, "health.interval"
    [[services.ports]]
    published = 8000                  # where clients call
    target = 8080                     # where backends listen
    protocol = "tcp"                  # or "udp"; default tcp
    address = "192.0.2.1"             # default: every address of the host
    [[services.backends]]
    name = "a"                        # keep it: it decides which clients the backend gets
    address = "10.0.0.1"
    port = 8081                       # default: the port's target
    weight = 2                        # default 1; 0: no new flows
    draining = false
    node = "far"                      # default: this host reaches it; else it runs on that node

    [[nodes]]                         # where several hosts share one file; they find themselves by their addresses
    name = "far"
    address = "192.0.2.2"             # where the other nodes reach it
    engine = "kernel"                 # or "proxy"; default: the same as here

An error anywhere rejects the whole file: the last good inventory stays in use, and the error names file and line.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import structlog
from msgspec import Meta, Struct, ValidationError, convert

from mesh.config.keys import Config
from mesh.errors import ConfigError, ProviderError
from mesh.model import (
    ANY_ADDRESS,
    WEIGHT_MAX,
    Address,
    Backend,
    EngineKind,
    Frontend,
    Intent,
    Inventory,
    Node,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
)
from mesh.netaddr import is_mine
from mesh.providers.base import ProviderStatus, Publish
from mesh.providers.labels import KEYS, nearest, parse_options
from mesh.supervisor import Told

_POLL_SECONDS: Final = 0.25
_PROTOCOLS: Final = {"tcp": Protocol.TCP, "udp": Protocol.UDP}
_SIZE_LIMIT: Final = 64 * 1024 * 1024

_Port = Annotated[int, Meta(ge=1, le=65535)]
_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)]
_Path = tuple[str | int, ...]

log = structlog.get_logger()


class _Published(Struct, forbid_unknown_fields=True):
    published: _Port
    target: _Port
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = ""


class _Node(Struct, forbid_unknown_fields=True):
    name: _Name
    address: str
    engine: EngineKind = EngineKind.UNKNOWN


class _Backend(Struct, forbid_unknown_fields=True):
    name: _Name
    address: str
    node: str = ""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    weight: Annotated[int, Meta(ge=0, le=WEIGHT_MAX)] = 1
    draining: bool = False


class _Service(Struct, forbid_unknown_fields=True):
    name: _Name
    ports: list[_Published]
    backends: list[_Backend] = []
    options: dict[str, Any] = {}


class _File(Struct, forbid_unknown_fields=True):
    services: list[_Service] = []
    nodes: list[_Node] = []


_TABLES: Final[dict[str, type[Struct]]] = {
    "services": _Service,
    "ports": _Published,
    "backends": _Backend,
    "nodes": _Node,
}


class _WrongError(Exception):
    """Something in the file, at a path in it."""

    def __init__(self, path: _Path, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.path, self.message, self.remedy = path, message, remedy


def parse_static(text: str, name: str, is_here: Callable[[Address], bool] | None = None) -> Inventory:
    """The inventory that a file's text describes. Pure, but for `is_here`.

    Args:
        is_here: whether an address is this host's; by default the kernel is asked.

    Raises:
        ProviderError: it cannot be used; `where` is `name:line`.
    """
    try:
        return _inventory(convert(tomllib.loads(text), _File), is_here or is_mine)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        place = int(line[1]) if line else text.count("\n") + 1
        raise ProviderError(f"no TOML: {error}", where=f"{name}:{place}") from None
    except RecursionError:
        raise ProviderError("no TOML: nested too deep", where=name) from None
    except ValidationError as error:
        wrong = _explain(str(error))
    except _WrongError as error:
        wrong = error
    raise ProviderError(wrong.message, where=f"{name}:{_line_of(text, wrong.path)}", remedy=wrong.remedy) from None


def _explain(message: str) -> _WrongError:
    """What msgspec says, with its path taken apart and the nearest known key."""
    said, _, dotted = message.partition(" - at `$")
    path: _Path = tuple(int(i) if i else k for k, i in re.findall(r"\.?([A-Za-z_][\w-]*)|\[(\d+)\]", dotted))
    unknown = re.search(r"unknown field `(.*)`$", said)
    if not unknown:
        return _WrongError(path, said)
    table = next((_TABLES[k] for k in reversed(path) if isinstance(k, str) and k in _TABLES), _File)
    known = table.__struct_fields__
    near = nearest(unknown[1], known)
    remedy = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
    return _WrongError((*path, unknown[1]), f"unknown key {unknown[1]}", remedy)


def _line_of(text: str, path: _Path) -> int:
    """The line that defines what is at the path, or the nearest thing around it."""
    table: _Path = ()
    counts: dict[_Path, int] = {}
    best, best_length = 1, 0
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]", line)
        key = re.match(r"\s*([\w.\"'-]+)\s*=", line)
        if header:
            table = ()
            names = re.findall(r"[\w-]+", header[2])
            for position, word in enumerate(names, 1):
                table = (*table, word)
                if position == len(names) and header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:
                    table = (*table, counts[table])
            here = table
        elif key:
            here = (*table, key[1].strip("\"'"))
        else:
            continue
        common = min(len(here), len(path))
        if best_length < common and here[:common] == path[:common]:
            best, best_length = number, common
    return best


def _address(text: str, path: _Path) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise _WrongError(path, f"{text!r} is no address", "an IPv4 or IPv6 address, without port") from None


def _nodes(file: _File, is_here: Callable[[Address], bool]) -> tuple[dict[str, Node], str]:
    """The nodes by name, and the name of the one that is this host; empty if the file has no nodes."""
    nodes: dict[str, Node] = {}
    for number, entry in enumerate(file.nodes):
        path: _Path = ("nodes", number)
        if entry.name in nodes:
            raise _WrongError((*path, "name"), f"there is another node {entry.name}", "names are unique")
        address = _address(entry.address, (*path, "address"))
        nodes[entry.name] = Node(entry.name, entry.name, address=address, engine=entry.engine)
    here = _own(nodes.values(), is_here)
    if nodes and not here:
        raise _WrongError(("nodes", 0), "none of the nodes has an address of this host", "add this host to the nodes")
    return nodes, here


def _own(nodes: Iterable[Node], is_here: Callable[[Address], bool]) -> str:
    """The id of the node that is this host, the first by id; empty: none is."""
    return min((node.id for node in nodes if node.address is not None and is_here(node.address)), default="")


def _inventory(file: _File, is_here: Callable[[Address], bool]) -> Inventory:
    nodes, here = _nodes(file, is_here)
    services: dict[str, Service] = {}
    backends: dict[str, Backend] = {}
    frontends: dict[Frontend, str] = {}
    for number, entry in enumerate(file.services):
        path: _Path = ("services", number)
        if entry.name in services:
            raise _WrongError((*path, "name"), f"there is another service {entry.name}", "names are unique")
        ports = [_published(port, (*path, "ports", i)) for i, port in enumerate(entry.ports)]
        for i, port in enumerate(ports):
            if port.frontend in frontends:
                taken = f"{port.frontend} is already published by service {frontends[port.frontend]}"
                raise _WrongError((*path, "ports", i, "published"), taken)
            frontends[port.frontend] = entry.name
        for i, item in enumerate(entry.backends):
            if item.node and item.node not in nodes:
                raise _WrongError(
                    (*path, "backends", i, "node"), f"there is no node {item.node}", "add it to the nodes"
                )
            backend = _backend(item, entry.name, (*path, "backends", i), here)
            if backend.id in backends:
                raise _WrongError(
                    (*path, "backends", i, "name"), f"there is another backend {item.name}", "names are unique"
                )
            backends[backend.id] = backend
        services[entry.name] = Service(entry.name, entry.name, tuple(sorted(ports)), _options(entry.options, path))
    return Inventory(
        services=tuple(services[k] for k in sorted(services)),
        backends=tuple(backends[k] for k in sorted(backends)),
        nodes=tuple(nodes[k] for k in sorted(nodes)),
        source="static",
    )


def _published(port: _Published, path: _Path) -> PublishedPort:
    address = _address(port.address, (*path, "address")) if port.address else ANY_ADDRESS
    return PublishedPort(port.published, port.target, _PROTOCOLS[port.protocol], address)


def _backend(item: _Backend, service: str, path: _Path, here: str) -> Backend:
    local = item.node in ("", here)
    address = _address(item.address, (*path, "address"))
    if address.is_unspecified or address.is_multicast:
        raise _WrongError((*path, "address"), f"{address} cannot be connected to")
    return Backend(
        id=f"{service}/{item.name}",
        service=service,
        node=item.node or here,
        address=address if local else None,
        local=local,
        name=item.name,
        weight=item.weight,
        intent=Intent.DRAINING if item.draining else Intent.ACTIVE,
        port=item.port,
    )


def _options(raw: dict[str, Any], path: _Path) -> ServiceOptions:
    """Options as labels have them: `health-interval` and a table `health` are other ways to write `health.interval`."""
    names = {key.replace(".", "-"): key for key in KEYS}
    values: dict[str, str] = {}
    written: dict[str, str] = {}
    flat = dict(raw)
    if isinstance(health := raw.get("health"), dict):
        del flat["health"]
        flat |= {("health" if k == "check" else f"health.{k}"): v for k, v in health.items()}
    for key, value in flat.items():
        name = names.get(key, key)
        written[name] = key
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            values[name] = ",".join(value)
        elif isinstance(value, bool):
            values[name] = str(value).lower()
        elif isinstance(value, str | int):
            values[name] = str(value)
        else:
            raise _WrongError(
                (*path, "options", key), f"{key} is neither text, number, true, false nor a list of texts"
            )
    options, problems = parse_options(values, lambda name: name)
    for problem in problems:
        remedy = problem.remedy if problem.remedy.startswith(("did", "known")) else ""
        raise _WrongError((*path, "options", written[problem.where]), f"{problem.where}: {problem.message}", remedy)
    return options


class StaticProvider:
    """Source of the inventory from `static_file`; see mesh.providers.base.Provider for the contract.

    Raises:
        ConfigError: no file is configured.
    """

    def __init__(self, config: Config) -> None:
        if not config.static_file:
            raise ConfigError("no file of services is given", where="static_file", remedy="set static_file")
        self._path = Path(config.static_file)
        self._stamp: tuple[int, ...] | None = None  # of the file as last read
        self._published: Told[Inventory] = Told()
        self._own = ""  # id of the node that is this host
        self._last_good: float | None = None
        self._error = ""
        self._now = asyncio.Event()

    async def run(self, publish: Publish) -> None:
        """Read, publish and follow until cancelled."""
        seen: tuple[int, ...] | None = None  # of the file when looked at last
        while True:
            asked = self._now.is_set()
            self._now.clear()
            stamp = _stamp_of(self._path)
            # Something that is being written changes again before the next look: half a file may be valid TOML.
            if asked or seen is None or (stamp == seen and stamp != self._stamp):
                self._stamp = stamp
                await self._load(publish)
            elif not self._error and stamp == self._stamp:
                self._last_good = time.monotonic()
            seen = stamp
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._now.wait()

    async def _load(self, publish: Publish) -> None:
        try:
            inventory = await asyncio.to_thread(read_static, self._path)
            own = await asyncio.to_thread(_own, inventory.nodes, is_mine)
        except ProviderError as error:
            if str(error) != self._error:
                stays = "keeping the last known state" if self._last_good is not None else "nothing is served yet"
                log.error(f"invalid services file; {stays}", error=str(error))
            self._error = str(error)
            return
        self._error, self._own = "", own
        self._last_good = time.monotonic()
        if inventory != self._published.value:
            log.info("services read", file=str(self._path), services=len(inventory.services))
            self._published.tell(inventory, publish)

    def reload(self) -> None:
        """Read again now."""
        self._now.set()

    def status(self) -> ProviderStatus:
        """How it is doing."""
        return ProviderStatus(
            kind="static",
            connected=self._last_good is not None and not self._error,
            age_seconds=None if self._last_good is None else time.monotonic() - self._last_good,
            error=self._error,
            doorbell="poll",
            node_id=self._own,
        )


def _stamp_of(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_static(path: Path) -> Inventory:
    """The inventory of a static file.

    Raises:
        ProviderError: it cannot be read, or is wrong; the error names the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_SIZE_LIMIT + 1)
        if len(data) > _SIZE_LIMIT:
            raise ProviderError(f"longer than {_SIZE_LIMIT >> 20} MiB", where=str(path))
        text = data.decode()
    except OSError as error:
        raise ProviderError(f"{error.strerror}", where=str(path), remedy="see static_file") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ProviderError("not UTF-8", where=f"{path}:{line}") from None
    return parse_static(text, str(path))
