# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: every key, its default, its meaning. Loaded by mesh.config_load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEFAULT_CONFIG_FILE: Final = Path("/etc/mesh/mesh.toml")
DEFAULT_STATE_DIR: Final = Path("/run/mesh")


@dataclass(frozen=True, slots=True)
class Config:
    """All keys. A key `a_b` is `a_b` in the file, `MESH_A_B` in the environment and `--a-b` as a flag."""

    provider: str = "auto"  # auto: swarm if there is one, else demo | swarm | static | demo
    engine: str = "auto"  # auto: kernel where the preflight passes, else proxy | kernel | proxy
    static_file: str = ""  # the static provider's TOML file
    state_dir: str = str(DEFAULT_STATE_DIR)  # lock, control socket, pid
    docker_host: str = "unix:///var/run/docker.sock"
    docker_data_root: str = "/var/lib/docker"
    docker_exec_root: str = "/var/run/docker"
    docker_poll_interval: float = 2.0  # seconds between re-reads where no doorbell rings
    docker_resync_interval: float = 30.0  # seconds between re-reads although the doorbell works
    http_listen: str = "127.0.0.1:9550"  # metrics, health and state; empty: off
    intercept: str = "auto"  # how the proxy engine gets connections: auto: nft on a Docker host, else bind | nft | bind
    threads: int = 0  # forwarding threads of the proxy engine; 0: one per core
    connect_timeout: float = 3.0  # seconds until the proxy engine tries a flow's next choice
    retries: int = 3  # further choices after the first
    idle_timeout: float = 0.0  # seconds without a byte until a TCP connection is cut; 0: never
    udp_idle_timeout: float = 60.0  # seconds without a datagram until a UDP session ends
    udp_max_sessions: int = 65536
    max_connections: int = 0  # 0: what the descriptor limit allows
    drain_timeout: float = 30.0  # seconds that SIGTERM waits for connections
    panic_threshold: float = 0.0  # share of healthy backends at or below which all are used again
    guard_max_removal: float = 0.5  # share of backends whose loss at once is held back first
    guard_hold: float = 5.0  # seconds for which it is held back
    transition_calm: float = 8100.0  # seconds of calm after which a slot leaves its transition; 0: never
    cluster_port: int = 9551  # agents of other nodes connect here (managers); the same on all nodes
    cluster_managers: str = ""  # host[:port], comma separated; empty: those that the local Engine names
    cluster_ca: str = ""  # PEM files instead of swarm's own under docker_data_root (autolock)
    cluster_certificate: str = ""
    cluster_key: str = ""
    log_level: str = "info"
    log_format: str = "auto"  # auto: console on a terminal, else logfmt | console | json | logfmt
