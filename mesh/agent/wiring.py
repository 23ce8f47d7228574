# SPDX-License-Identifier: Apache-2.0
"""Which parts a configuration means on this host, and how they are put together: the only place that builds any."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.agent.held import HeldBackends
from mesh.api.connectivity import QUESTION as CALLS
from mesh.api.connectivity import Connectivity
from mesh.api.drained import DRAINED_FILE, DrainedState, connections_left
from mesh.api.fares import QUESTION as TRAFFIC
from mesh.api.probing import QUESTION as PROBE
from mesh.api.probing import Probing
from mesh.api.server import Servers
from mesh.api.services import Services
from mesh.api.standing import QUESTION as STANDING
from mesh.api.standing import Standing
from mesh.api.state import Facts, View
from mesh.cluster.ask import Answer
from mesh.cluster.provider import ClusterProvider, DrainHooks, Tables
from mesh.config.keys import Config
from mesh.datapath.base import Applied, Datapath
from mesh.datapath.losses import Losses
from mesh.datapath.paths.monitor import PathMonitor
from mesh.datapath.proof import Proof
from mesh.datapath.stop_rules import StopRules
from mesh.errors import ConfigError, DatapathError, MeshError
from mesh.health.monitor import Monitor
from mesh.model import EngineKind, Frontend, HealthView
from mesh.providers.base import ClusterView, Provider
from mesh.reconcile.loop import OnChange, Reconciler

if TYPE_CHECKING:
    from mesh.datapath.kernel.cleanup import Cleanup

Listeners = Mapping[Frontend, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that was chosen, not yet made. `reason` is why, where the choice was ours."""

    name: EngineKind
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """A provider, and where this node's probes are told: to the cluster's, where it serves one, else to the loop."""

    provider: Provider
    cluster: ClusterView | None
    own_health: Callable[[HealthView], None]
    proof: Callable[[], Proof] | None = None  # what the engine proves by, where nodes prove


MakeSource = Callable[[EngineKind, Reconciler, Tables, DrainHooks, Mapping[str, Answer]], Source]
"""Makes the provider that was chosen, of this node's engine, the loop, what tells digests of tables, what takes the
drains that all nodes share, and what other nodes may ask this one."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine that runs, and the loop over it. `applied` is what it has restored."""

    engine: Engine
    datapath: Datapath
    reconciler: Reconciler
    applied: Applied


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the parts are given of the daemon.

    Attributes:
        stop: stops the daemon; `release` hands the ports back.
        stopping: whether it is about to end.
        problems: what is wrong with the daemon itself, one sentence each.
    """

    stop: Callable[[bool], Awaitable[None]]
    stopping: Callable[[], bool]
    problems: Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Parts:
    """All that the daemon is made of, wired and not yet running but for the engine."""

    engine: Engine
    datapath: Datapath
    reconciler: Reconciler
    monitor: Monitor
    held: HeldBackends
    provider: Provider
    paths: PathMonitor
    view: View
    servers: Servers


async def choose_provider(config: Config) -> tuple[Config, MakeSource]:
    """The configuration with the provider's name in place of `auto`, and what makes that provider.

    `auto` is static where a static file is set; swarm where the Engine is a node of one, and on every host that is
    meant to run an Engine (mesh.providers.swarm.presence), where it waits for it; else demo.

    Raises:
        ConfigError: the provider cannot be used as configured.
    """
    kind = config.provider
    if kind == "auto":
        kind = "static" if config.static_file else "swarm" if await _has_docker(config) else "demo"
    config = replace(config, provider=kind)
    if kind == "swarm":
        return config, _cluster_source(config)
    if kind == "static":
        if not config.static_file:
            raise ConfigError("provider = static needs a file", where="static_file", remedy="set --static-file")
        return config, _single_source(importlib.import_module("mesh.providers.static").StaticProvider(config))
    return config, _single_source(importlib.import_module("mesh.providers.demo").DemoProvider(config))


async def _has_docker(config: Config) -> bool:
    """Whether the swarm is served here, now or as soon as there is one."""
    swarm: Any = importlib.import_module("mesh.providers.swarm")
    return bool(await swarm.detect(config) or swarm.docker_trace(config))


def _single_source(provider: Provider) -> MakeSource:
    return lambda engine, reconciler, tables, drains, answers: Source(provider, None, reconciler.set_health)


def _cluster_source(config: Config) -> MakeSource:
    module: Any = importlib.import_module("mesh.providers.swarm")
    local, swarm = module.LocalNode(config), module.SwarmProvider(config)

    def make(
        engine: EngineKind,
        reconciler: Reconciler,
        tables: Tables,
        drains: DrainHooks,
        answers: Mapping[str, Answer],
    ) -> Source:
        async def prove(proof: Proof) -> None:
            await reconciler.on_worker(reconciler.datapath.prove, proof)

        provider = ClusterProvider(
            config,
            local,
            swarm,
            engine=engine,
            tables=tables,
            on_health=reconciler.set_health,
            drains=drains,
            answers=answers,
            prove=prove,
        )
        return Source(provider, provider, provider.own_health, lambda: provider.proof)

    return make


async def choose_engine(config: Config) -> Engine:
    """The engine that `config.engine` means here; `config.provider` is resolved.

    Raises:
        DatapathError: the kernel engine is demanded and cannot run here.
    """
    if config.engine == EngineKind.PROXY:
        return Engine(EngineKind.PROXY, "as configured")
    obstacle = await asyncio.to_thread(_kernel_obstacle, config)
    if obstacle is None:
        why = "as configured" if config.engine == EngineKind.KERNEL else "the preflight passed"
        return Engine(EngineKind.KERNEL, why)
    if config.engine == EngineKind.KERNEL:
        raise DatapathError(f"the kernel engine cannot run here: {obstacle}", where="engine = kernel")
    return Engine(EngineKind.PROXY, f"the kernel engine cannot run here: {obstacle}")


def _kernel_obstacle(config: Config) -> str | None:
    try:
        preflight: Any = importlib.import_module("mesh.datapath.kernel.preflight")
        importlib.import_module("mesh.datapath.kernel.engine")
    except ImportError as error:
        return f"this build has none ({error})"
    obstacle: str | None = preflight.preflight(config)
    return obstacle


async def open_engine(chosen: Engine, config: Config, inherited: Listeners | None, on_change: OnChange) -> Opened:
    """Open the engine; where the choice was ours and the kernel engine fails after all, the proxy engine.

    Args:
        inherited: listening sockets of a process that is taken over from, as far as this engine has a use for them.
        on_change: see Reconciler.

    Raises:
        DatapathError: it cannot run here.
    """
    losses = Losses()
    datapath = _make_engine(chosen, config, inherited, losses)
    stop_rules = StopRules(config, losses)
    reconciler = Reconciler(
        datapath,
        config,
        on_applied=lambda applied: stop_rules.apply(applied.frontends),
        on_close=stop_rules.close,
        on_change=on_change,
    )
    try:
        return Opened(chosen, datapath, reconciler, await reconciler.open())
    except DatapathError as error:
        if chosen.name == EngineKind.PROXY or config.engine != "auto":
            raise
        await reconciler.close(release=False)
        proxy = Engine(EngineKind.PROXY, f"the kernel engine cannot run here: {error}")
        return await open_engine(proxy, config, None, on_change)


def _make_engine(engine: Engine, config: Config, inherited: Listeners | None, losses: Losses) -> Datapath:
    make: Callable[..., Datapath]
    if engine.name == EngineKind.KERNEL:
        make = importlib.import_module("mesh.datapath.kernel.engine").KernelDatapath
    else:
        make = importlib.import_module("mesh.datapath.proxy.engine").ProxyDatapath
    return make(config, inherited=inherited, docker_host=is_docker_host(config), losses=losses)


def is_docker_host(config: Config) -> bool:
    """Whether dockerd runs here: its socket is there, or its swarm is what is served."""
    path = config.docker_host.removeprefix("unix://")
    return config.provider == "swarm" or (path != config.docker_host and Path(path).is_socket())


def make_cleanup(config: Config) -> Cleanup | None:
    """What looks after programs of earlier and other daemons; None where this build has no kernel engine."""
    try:
        module: Any = importlib.import_module("mesh.datapath.kernel.cleanup")
    except ImportError:
        return None
    cleanup: Cleanup = module.Cleanup(config)
    return cleanup


def assemble(config: Config, opened: Opened, make_source: MakeSource, hooks: Hooks) -> Parts:
    """Put everything around an engine that is open."""
    reconciler, name = opened.reconciler, opened.engine.name
    services = Services(name)

    async def tables() -> tuple[int, dict[str, str]]:
        picture, applied = reconciler.picture, reconciler.applied
        return applied.generation, await asyncio.to_thread(services.digests, picture, applied)

    async def held() -> dict[str, int]:
        now, applied = reconciler.picture.drained, reconciler.applied
        return await asyncio.to_thread(connections_left, now, applied, reconciler.datapath.stats)

    state_dir = Path(config.state_dir)
    drained = DrainedState(state_dir / DRAINED_FILE, reconciler.set_drained)
    hooks_of_drains = DrainHooks(drained.set_shared, lambda: reconciler.picture.drained.shared, held)

    async def ask(node: str, question: str, query: Mapping[str, str], seconds: float) -> Mapping[str, Any]:
        if source.cluster is None:
            raise MeshError("this daemon serves one node only")
        return await source.cluster.ask(node, question, query, seconds)

    async def fares(query: Mapping[str, str]) -> Mapping[str, Any]:
        return await view.fares.answer(query)

    standing = Standing(reconciler, ask)
    connectivity = Connectivity(reconciler, standing)
    answers = {
        PROBE: Probing(reconciler, name).answer,
        CALLS: connectivity.answer,
        STANDING: standing.answer,
        TRAFFIC: fares,
    }
    source = make_source(name, reconciler, tables, hooks_of_drains, answers)
    provider = source.provider
    monitor = Monitor(source.own_health)
    paths = PathMonitor(
        config,
        name,
        lambda: (provider.status().node_id, reconciler.inventory.nodes),
        on_change=reconciler.set_paths,
        proof=source.proof,
    )
    view = View(
        Facts(name, opened.engine.reason, state_dir, time.time()),
        reconciler,
        provider,
        monitor,
        hooks.stop,
        services=services,
        drained=drained,
        cluster=source.cluster,
        paths=paths,
        connectivity=connectivity,
        problems=hooks.problems,
        stopping=hooks.stopping,
    )
    return Parts(
        engine=opened.engine,
        datapath=opened.datapath,
        reconciler=reconciler,
        monitor=monitor,
        held=HeldBackends(reconciler, monitor),
        provider=provider,
        paths=paths,
        view=view,
        servers=Servers(view, config.http_listen, state_dir, [each for each in config.http_hosts.split(",") if each]),
    )
