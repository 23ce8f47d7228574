# SPDX-License-Identifier: Apache-2.0
"""Which provider and which engine a configuration means on this host, and why."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesh.cluster.provider import ClusterProvider
from mesh.config.keys import Config
from mesh.datapath.base import Datapath
from mesh.errors import ConfigError, DatapathError
from mesh.model import Frontend
from mesh.providers.base import Provider


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that was chosen, not yet made. `reason` is why, where the choice was ours."""

    name: str
    reason: str


async def choose_provider(config: Config) -> tuple[Config, Provider]:
    """The provider, and the configuration with its name in place of `auto`.

    Raises:
        ConfigError: the provider cannot be used as configured.
    """
    kind = config.provider
    swarm: Any = importlib.import_module("mesh.providers.swarm")
    if kind == "auto":
        kind = "static" if config.static_file else "swarm" if await swarm.detect(config) else "demo"
    config = replace(config, provider=kind)
    if kind == "swarm":
        return config, ClusterProvider(config)
    if kind == "static":
        if not config.static_file:
            raise ConfigError("provider = static needs a file", where="static_file", remedy="set --static-file")
        return config, importlib.import_module("mesh.providers.static").StaticProvider(config)
    return config, importlib.import_module("mesh.providers.demo").DemoProvider(config)


async def choose_engine(config: Config) -> Engine:
    """The engine that `config.engine` means here; `config.provider` is resolved.

    Raises:
        DatapathError: the kernel engine is demanded and cannot run here.
    """
    if config.engine == "proxy":
        return Engine("proxy", "as configured")
    obstacle = await asyncio.to_thread(_kernel_obstacle, config)
    if obstacle is None:
        return Engine("kernel", "as configured" if config.engine == "kernel" else "the preflight passed")
    if config.engine == "kernel":
        raise DatapathError(f"the kernel engine cannot run here: {obstacle}", where="engine = kernel")
    return Engine("proxy", f"the kernel engine cannot run here: {obstacle}")


def _kernel_obstacle(config: Config) -> str | None:
    try:
        preflight: Any = importlib.import_module("mesh.datapath.kernel.preflight")
        importlib.import_module("mesh.datapath.kernel.engine")
    except ImportError as error:
        return f"this build has none ({error})"
    obstacle: str | None = preflight.preflight(config)
    return obstacle


def make_engine(engine: Engine, config: Config, inherited: Mapping[Frontend, Sequence[int]] | None) -> Datapath:
    """The engine itself, not yet open.

    Args:
        inherited: listening sockets of a process that is taken over from, as far as this engine has a use for them.
    """
    make: Callable[..., Datapath]
    if engine.name == "kernel":
        make = importlib.import_module("mesh.datapath.kernel.engine").KernelDatapath
        return make(config, inherited=inherited, docker_host=is_docker_host(config))
    make = importlib.import_module("mesh.datapath.proxy.engine").ProxyDatapath
    return make(config, inherited=inherited, docker_host=is_docker_host(config))


def is_docker_host(config: Config) -> bool:
    """Whether dockerd runs here: its socket is there, or its swarm is what is served."""
    path = config.docker_host.removeprefix("unix://")
    return config.provider == "swarm" or (path != config.docker_host and Path(path).is_socket())
