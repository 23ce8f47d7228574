# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: every key, its default, its meaning. Loaded by mesh.config.load."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from mesh._abi import TUNNEL_PORT
from mesh.errors import ConfigError
from mesh.model import Address, EngineKind, Problem
from mesh.netaddr import split_host_port, usable

DEFAULT_CONFIG_FILE: Final = Path("/etc/mesh/mesh.toml")
DEFAULT_STATE_DIR: Final = Path("/run/mesh")


def _key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    most: float | None = None,
    live: bool = False,
    was: tuple[str, ...] = (),
) -> Any:
    """A key: numbers are never negative, and at most `most`; a string with `choices` is one of them.

    Args:
        live: SIGHUP changes it in a running daemon; the others take effect when the daemon starts.
        was: former names, which are still accepted and reported in `Config.problems`.
    """
    return field(
        default=default, metadata={"help": meaning, "choices": choices, "most": most, "live": live, "was": was}
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All keys. A key `a_b` is `a_b` in the file, `MESH_A_B` in the environment and `--a-b` as a flag.

    Attributes:
        problems: what is accepted as it is, but should be changed, such as a former name of a key. No key itself.
    """

    provider: str = _key(
        "auto",
        "source of services; auto: static if static_file is set, else the swarm on a Docker host, else the demo",
        choices=("auto", "swarm", "static", "demo"),
    )
    engine: str = _key(
        "auto",
        "what forwards; auto: kernel if the preflight passes, else proxy",
        choices=("auto", EngineKind.KERNEL, EngineKind.PROXY),
    )
    static_file: str = _key("", "TOML file of the static provider")
    state_dir: str = _key(str(DEFAULT_STATE_DIR), "directory of the lock, the control socket, drains and good labels")
    docker_host: str = _key("unix:///var/run/docker.sock", "address of the Docker Engine API")
    docker_data_root: str = _key("/var/lib/docker", "the Engine's --data-root, which has the swarm's certificates")
    docker_exec_root: str = _key("/var/run/docker", "the Engine's --exec-root, which has the swarm's control socket")
    docker_poll_interval: float = _key(2.0, "seconds between reads of the swarm if nothing announces its changes")
    docker_resync_interval: float = _key(
        30.0, "seconds between full reads of the swarm while its changes are announced"
    )
    http_listen: str = _key("127.0.0.1:9550", "address of metrics, health and state (HTTP); empty: off")
    http_hosts: str = _key(
        "",
        "names and addresses by which HTTP may be called besides localhost, the host's name and its addresses, comma "
        "separated",
    )
    intercept: str = _key(
        "auto",
        "proxy engine: how it gets connections; auto: nft on a Docker host, else bind",
        choices=("auto", "nft", "bind"),
    )
    interfaces: str = _key(
        "", "kernel engine: interfaces that face clients, names or globs, comma separated; empty: all"
    )
    xdp: str = _key(
        "off",
        "kernel engine; on: network cards with native XDP drop packets from denied sources first",
        choices=("off", "on"),
    )
    no_backend: str = _key(
        "refuse",
        "kernel engine: what a frontend without backends does; pass: leave packets to the kernel",
        choices=("refuse", "pass"),
    )
    error_rate: int = _key(
        1000, "kernel engine: rate limit for generated ICMP errors, per CPU and second; 0: unlimited", most=65535
    )
    peer_proof: str = _key(
        "auto",
        "what nodes hand over without a proof; auto: accepted from nodes whose build gives none; require: refused",
        choices=("auto", "require"),
    )
    key_period: float = _key(86400.0, "seconds after which a manager makes a new key of the swarm")
    bpf_fs: str = _key("/sys/fs/bpf", "kernel engine: bpf file system for its pins; mounted if it is not")
    cgroup: str = _key("", "kernel engine: root of cgroup2, for the socket hooks; empty: where it is mounted")
    flow_cache: int = _key(
        262144, "kernel engine: maximum number of flows noted while slots are in transition", most=1 << 24
    )
    bpf_stats: int = _key(0, "kernel engine; 1: measure the programs' run count and time, at about 20 ns a run", most=1)
    max_replies: int = _key(
        524288,
        "kernel engine: maximum number of tracked TCP flows, and a fourth as many of UDP; the least used is evicted",
        most=1 << 26,
    )
    threads: int = _key(0, "proxy engine: forwarding threads; 0: one per core", most=1024)
    connect_timeout: float = _key(
        3.0, "proxy engine: seconds to wait for a backend before the flow goes to its next choice"
    )
    retries: int = _key(3, "proxy engine: further choices after the first", most=16)
    idle_timeout: float = _key(
        0.0, "proxy engine: seconds without data after which a TCP connection is closed; 0: never"
    )
    udp_idle_timeout: float = _key(60.0, "proxy engine: seconds without a datagram after which a UDP session ends")
    udp_max_sessions: int = _key(
        65536, "proxy engine: maximum number of UDP sessions; the least recently used one is evicted"
    )
    max_connections: int = _key(
        0, "proxy engine: maximum number of TCP connections; 0: what the descriptor limit allows"
    )
    drain_timeout: float = _key(30.0, "seconds to wait for open connections after SIGTERM", live=True)
    panic_threshold: float = _key(
        0.0, "share of healthy backends at or below which all backends are used", most=1, live=True
    )
    guard_max_removal: float = _key(
        0.5, "share of a service's backends whose simultaneous removal is held back", most=1, live=True
    )
    guard_hold: float = _key(5.0, "seconds for which such a removal is held back", live=True)
    transition_calm: float = _key(
        8100.0, "seconds without a flow of another owner after which a slot leaves its transition; 0: never", live=True
    )
    on_stop: str = _key(
        "open",
        "what becomes of mesh.allow and mesh.deny while no agent runs; closed: an nftables table keeps them in force; "
        "open: Docker lets everybody in once it has the ports",
        choices=("open", "closed"),
    )
    orphan_timeout: float = _key(
        900.0,
        "seconds without an agent after which its tables hand new connections back to Docker; at least 3; 0: never",
        most=1e9,
    )
    cluster_port: int = _key(
        9551, "TCP port of the relay, where agents connect to managers; the same on all nodes", most=65535
    )
    cluster_managers: str = _key(
        "", "managers as host[:port], comma separated; empty: those that the local Engine names"
    )
    cluster_ca: str = _key("", "PEM file of the root certificate, if not the swarm's under docker_data_root (autolock)")
    cluster_certificate: str = _key("", "PEM file of the node's certificate, if not the swarm's")
    cluster_key: str = _key("", "PEM file of the node's key, if not the swarm's")
    node_address: str = _key(
        "", "address at which other nodes reach this one; empty: the node's label mesh.address, else what Swarm says"
    )
    peer_port: int = _key(
        9552,
        "TCP and UDP port where other nodes hand over connections and datagrams; the same on all nodes",
        most=65535,
    )
    tunnel_port: int = _key(
        TUNNEL_PORT, "kernel engine: UDP port of the tunnel between nodes (Geneve); the same on all nodes", most=65535
    )
    return_path: str = _key(
        "tunnel",
        "kernel engine: how replies to clients of another node leave; direct: straight to the client, with the called "
        "address as their source",
        choices=("tunnel", "direct"),
    )
    floating_addresses: str = _key(
        "", "addresses that move between nodes, comma separated; served from their first packet", was=("vips",)
    )
    log_level: str = _key(
        "info", "least severe level that is logged", choices=("debug", "info", "warning", "error"), live=True
    )
    log_format: str = _key(
        "auto",
        "format of the log; auto: console on a terminal, else logfmt",
        choices=("auto", "console", "json", "logfmt"),
        live=True,
    )
    problems: tuple[Problem, ...] = ()

    @property
    def own_address(self) -> Address | None:
        """`node_address` as an address; None: not set.

        Raises:
            ConfigError: it is none that other nodes can call.
        """
        if not self.node_address:
            return None
        try:
            address = usable(ipaddress.ip_address(self.node_address))
        except ValueError:
            address = None
        if address is None:
            said = f"{self.node_address!r} is not an address that other nodes can call"
            raise ConfigError(said, where="node_address", remedy="an IPv4 or IPv6 address of this node, without a port")
        return address

    @property
    def floating(self) -> frozenset[Address]:
        """`floating_addresses` as addresses.

        Raises:
            ConfigError: an entry is no address.
        """
        try:
            parts = filter(None, (part.strip() for part in self.floating_addresses.split(",")))
            return frozenset(ipaddress.ip_address(part) for part in parts)
        except ValueError as error:
            remedy = "addresses without prefix length, by commas"
            raise ConfigError(str(error), where="floating_addresses", remedy=remedy) from error

    @property
    def managers(self) -> list[tuple[str, int]]:
        """`cluster_managers` as host and port.

        Raises:
            ConfigError: an entry is neither host nor host:port.
        """
        found = []
        for entry in filter(None, (part.strip() for part in self.cluster_managers.split(","))):
            try:
                host, port = split_host_port(entry, default=self.cluster_port)
            except ValueError:
                port = 0
            if not port:
                raise ConfigError(f"{entry!r} is not host or host:port", where="cluster_managers")
            found.append((host, port))
        return found


KEYS: Final[Mapping[str, Field[Any]]] = {key.name: key for key in fields(Config) if "help" in key.metadata}
"""All keys by name, with their defaults and metadata."""
FORMER: Final[Mapping[str, str]] = {was: name for name, key in KEYS.items() for was in key.metadata["was"]}
"""Former names of keys, and what they are called now."""
