# SPDX-License-Identifier: Apache-2.0
"""The swarm provider on a real swarm: what Docker announces becomes an inventory, and Docker away changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from mesh.config.keys import Config
from mesh.model import Affinity, Backend, Intent, Inventory, PublishedPort
from mesh.model import Protocol as Transport
from mesh.providers.swarm import SwarmProvider, detect
from tests.support.lab.dockerd import AT_ONCE, Node, Swarm
from tests.support.lab.netns import Lab
from tests.support.polling import PATIENCE, settled, until, wait_for

pytestmark = [pytest.mark.root, pytest.mark.swarm]


# Containers that do not hear the signal to stop, so that they run on for so long.
LINGER = ("--stop-signal=SIGWINCH", "--stop-grace-period=6s")


def config_of(node: Node, **changes: Any) -> Config:
    roots = {"docker_data_root": str(node.data_root), "docker_exec_root": str(node.exec_root)}
    return Config(docker_host=node.host, state_dir=str(node.directory), **roots, **changes)  # type: ignore[arg-type]


class Follower:
    """A provider that runs, and all that it published."""

    def __init__(self, config: Config) -> None:
        self.provider = SwarmProvider(config)
        self.inventories: list[Inventory] = []
        self._changed = asyncio.Event()

    def publish(self, inventory: Inventory) -> None:
        self.inventories.append(inventory)
        self._changed.set()

    @property
    def now(self) -> Inventory:
        return self.inventories[-1]

    def backends(self, name: str) -> list[Backend]:
        return [b for b in self.now.backends if b.name.startswith(f"{name}.")]

    def usable(self, name: str) -> list[Backend]:
        """Those that get new flows."""
        return [b for b in self.backends(name) if b.ready and b.intent is Intent.ACTIVE and b.address]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for an inventory for which the condition holds."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not (self.inventories and condition()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{what}: {self.provider.status()} {self.inventories[-1:]}") from None

    async def until_status(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a status; nothing announces one."""
        try:
            await until(condition, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.provider.status()}") from None

    async def until_quiet(self) -> int:
        """Wait until no read has begun for a second; the reads so far."""
        return await settled(lambda: self.provider._begun, 1.0, "number of reads")


@contextlib.asynccontextmanager
async def following(config: Config) -> AsyncIterator[Follower]:
    follower = Follower(config)
    task = asyncio.create_task(follower.provider.run(follower.publish))
    try:
        yield follower
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest_asyncio.fixture
async def follower(swarm1: Swarm) -> AsyncIterator[Follower]:
    # The re-read without a doorbell is out of reach: what is found is found because it was announced.
    async with following(config_of(swarm1.manager, docker_resync_interval=3600, docker_poll_interval=3600)) as made:
        await made.until_status(lambda: made.provider.status().doorbell == "watch", "doorbell")
        yield made


async def docker(swarm: Swarm, *arguments: str) -> str:
    return await asyncio.to_thread(swarm.docker, *arguments)


async def test_service_becomes_inventory(swarm1: Swarm, follower: Follower) -> None:
    service = await asyncio.to_thread(
        swarm1.create,
        "web",
        "--publish=mode=host,target=9",
        replicas=2,
        publish=["8000:8080", "5000:8082/udp"],
        labels={"mesh.affinity": "client-ip", "mesh.helth": "off", "other": "x"},
    )
    await follower.until(lambda: len(follower.usable("web")) == 2, "two backends")
    (found,) = follower.now.services
    assert found.id == service
    assert found.ports == (PublishedPort(5000, 8082, Transport.UDP), PublishedPort(8000, 8080, Transport.TCP))
    assert found.options.affinity is Affinity.CLIENT_IP
    (problem,) = follower.now.problems
    assert "service web, label mesh.helth" in str(problem)
    assert "mesh.health" in problem.remedy
    (node,) = follower.now.nodes
    assert (node.name, str(node.address), node.up) == ("n1", swarm1.manager.address, True)
    assert follower.provider.status().node_id == node.id
    attached = swarm1.manager.inspect("network", "docker_gwbridge")["Containers"]
    for backend in follower.usable("web"):
        assert f"{backend.address}/24" == attached[backend.container]["IPv4Address"]
        assert backend.node == node.id
        assert backend.local


async def test_scale_up_and_down(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", *LINGER, replicas=1, publish=["8000:8080"])
    await docker(swarm1, "service", "scale", "--detach", "web=4")
    await follower.until(lambda: len(follower.usable("web")) == 4, "four")
    await docker(swarm1, "service", "scale", "--detach", "web=1")
    await follower.until(lambda: len(follower.usable("web")) == 1, "one")
    # Announced as draining while their containers still ran, and only then gone.
    assert len(follower.backends("web")) == 4
    await follower.until(lambda: len(follower.backends("web")) == 1, "three gone")


async def test_killed_container_is_gone_at_once(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", AT_ONCE, replicas=2, publish=["8000:8080"])
    await follower.until(lambda: len(follower.usable("web")) == 2, "two")
    victim = follower.usable("web")[0]
    await docker(swarm1, "kill", victim.container)
    await follower.until(lambda: victim.id not in {b.id for b in follower.now.backends}, "victim gone")
    seen = len(follower.inventories)
    await follower.until(lambda: len(follower.usable("web")) == 2, "replaced")
    assert not any(b.id == victim.id for i in follower.inventories[seen:] for b in i.backends), "it came back"


async def test_unhealthy_container(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(
        swarm1.create, "web", AT_ONCE, replicas=2, publish=["8000:8080"], image="mesh-lab/server:health", wait=False
    )
    await follower.until(lambda: len(follower.usable("web")) == 2, "healthy")
    victim = follower.usable("web")[0]
    await asyncio.to_thread(swarm1.manager.namespace.run, "curl", "-sS", f"http://{victim.address}:8080/health/fail")
    await follower.until(lambda: victim.id not in {b.id for b in follower.usable("web")}, "victim out")
    await follower.until(lambda: len(follower.usable("web")) == 2, "replaced")


async def test_remove_recreate_and_change_port(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", publish=["8000:8080"])
    await follower.until(lambda: follower.usable("web"), "there")
    await docker(swarm1, "service", "rm", "web")
    await follower.until(lambda: not follower.now.services and not follower.now.backends, "gone")
    await asyncio.to_thread(swarm1.create, "web", publish=["8000:8080"], wait=False)
    await follower.until(lambda: follower.usable("web"), "there again")
    change = ["--publish-rm", "8080", "--publish-add", "8008:8080"]
    await docker(swarm1, "service", "update", "--detach", "--no-resolve-image", *change, "web")
    await follower.until(
        lambda: [p.published for s in follower.now.services for p in s.ports] == [8008], "the other port"
    )


async def test_node_weight_and_labels_change(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", publish=["8000:8080"])
    await docker(swarm1, "node", "update", "--label-add", "mesh.weight=7", "n1")
    await follower.until(lambda: follower.now.nodes[0].weight == 7, "weight")
    await docker(swarm1, "node", "update", "--label-rm", "mesh.weight", "n1")
    await follower.until(lambda: follower.now.nodes[0].weight == 1, "weight again")
    await docker(swarm1, "service", "update", "--detach", "--label-add", "mesh.enable=false", "web")
    await follower.until(lambda: not follower.now.services[0].options.enable, "disabled")


async def test_a_burst_costs_few_reads(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", publish=["8000:8080"])
    await follower.until(lambda: follower.usable("web"), "there")
    before = await follower.until_quiet()
    for _ in range(1000):
        follower.provider.reload()
    await follower.until_status(lambda: follower.provider._begun > before, "a read")
    # Far from a thousand; and more than one, for the swarm may have something of its own to announce meanwhile.
    assert await follower.until_quiet() - before <= 50


async def test_of_a_change_only_its_tasks_are_read(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", AT_ONCE, replicas=3, publish=["8000:8080"])
    await follower.until(lambda: len(follower.usable("web")) == 3, "three")
    dead, *others = follower.usable("web")
    whole, before = follower.provider._begun_whole, follower.provider._begun
    await asyncio.to_thread(swarm1.manager.docker, "kill", dead.container)

    def replaced() -> bool:
        usable = follower.usable("web")
        return len(usable) == 3 and dead not in usable

    await follower.until(replaced, "replaced")
    assert all(backend in follower.usable("web") for backend in others)
    assert follower.provider._begun > before
    assert follower.provider._begun_whole == whole
    # All that is known this way is what a provider finds that has just begun.
    known = follower.backends("web")
    async with following(config_of(swarm1.manager)) as fresh:
        await fresh.until(lambda: fresh.backends("web") == known, "the same")


async def test_without_watch_it_polls(swarm1: Swarm) -> None:
    config = replace(config_of(swarm1.manager), docker_exec_root="/nonexistent", docker_poll_interval=0.3)
    async with following(config) as follower:
        await follower.until_status(lambda: follower.provider.status().doorbell == "events", "events")
        await asyncio.to_thread(swarm1.create, "web", *LINGER, publish=["8000:8080"])
        await follower.until(lambda: follower.usable("web"), "there")
        await docker(swarm1, "service", "scale", "--detach", "web=0")
        await follower.until(lambda: not follower.usable("web"), "draining is found")
        assert follower.backends("web"), "before the container ended"


async def test_an_encrypted_key_means_polling(swarm1: Swarm) -> None:
    node = swarm1.manager
    key = node.data_root / "swarm" / "certificates" / "swarm-node.key"
    swarm1.docker("swarm", "update", "--autolock=true")
    try:
        await asyncio.to_thread(wait_for, lambda: b"ENCRYPTED" in key.read_bytes(), "encrypted key")
        async with following(config_of(node, docker_poll_interval=0.3)) as follower:
            await follower.until_status(lambda: follower.provider.status().doorbell == "events", "events")
            await asyncio.to_thread(swarm1.create, "web", publish=["8000:8080"])
            await follower.until(lambda: follower.usable("web"), "there")
            assert follower.provider.status().doorbell == "events"
    finally:
        swarm1.docker("swarm", "update", "--autolock=false")
        await asyncio.to_thread(wait_for, lambda: b"ENCRYPTED" not in key.read_bytes(), "plain key")


async def test_a_paused_container_is_not_ready(swarm1: Swarm, follower: Follower) -> None:
    await asyncio.to_thread(swarm1.create, "web", replicas=2, publish=["8000:8080"])
    await follower.until(lambda: len(follower.usable("web")) == 2, "two")
    victim = follower.usable("web")[0].container
    await docker(swarm1, "pause", victim)
    await follower.until(lambda: len(follower.usable("web")) == 1, "one")
    await docker(swarm1, "unpause", victim)
    await follower.until(lambda: len(follower.usable("web")) == 2, "two again")


async def calm(swarm: Swarm, follower: Follower) -> None:
    """Whatever the swarm does, we follow, until both have named the same two tasks for a while."""

    def named() -> set[str]:
        ids = {task["ID"] for task in swarm.tasks("web")}
        return ids if len(ids) == 2 and {b.id for b in follower.usable("web")} == ids else set()

    await settled(named, 1.8, "two tasks that both name", interval=0.15)


async def test_docker_stops_hangs_and_comes_back(lab: Lab) -> None:
    swarm = await asyncio.to_thread(Swarm, lab)
    node = swarm.manager
    await asyncio.to_thread(swarm.create, "web", replicas=2, publish=["8000:8080"])
    async with following(config_of(node)) as follower:
        status = follower.provider.status
        await follower.until(lambda: len(follower.usable("web")) == 2, "two")
        await calm(swarm, follower)
        good = follower.now

        node.pause()
        follower.provider.reload()
        await follower.until_status(lambda: not status().connected, "noticed that it hangs")
        assert "in time" in status().error
        assert (status().age_seconds or 0) > 0
        assert follower.now == good
        node.resume()
        await follower.until_status(lambda: status().connected, "back")

        await calm(swarm, follower)  # a manager that slept may have given its own node up, and its tasks
        good = follower.now
        await asyncio.to_thread(node.kill)
        await follower.until_status(lambda: not status().connected and status().doorbell == "poll", "away")
        assert follower.now == good
        await asyncio.to_thread(node.start)
        await follower.until_status(lambda: status().connected and status().doorbell == "watch", "back")
        await calm(swarm, follower)  # the swarm replaces the tasks of an Engine that was killed, once it is back


async def test_detect(swarm1: Swarm) -> None:
    assert await detect(config_of(swarm1.manager))
    assert not await detect(Config(docker_host="unix:///nonexistent"))


async def test_not_a_manager(lab: Lab) -> None:
    node = await asyncio.to_thread(Node, lab, lab.host("alone"))
    async with following(config_of(node)) as follower:
        await follower.until_status(lambda: "docker swarm init" in follower.provider.status().error, "said so")
        assert not follower.inventories
        assert not await detect(config_of(node))
        node.docker("swarm", "init", "--advertise-addr", node.address)
        await follower.until(lambda: follower.now.nodes, "found without a restart")
