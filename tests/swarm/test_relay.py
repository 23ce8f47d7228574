# SPDX-License-Identifier: Apache-2.0
"""The relay between agents, with the certificates of a real swarm."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from mesh.cluster import wire
from mesh.cluster.ask import Asker, Query
from mesh.cluster.credentials import CredentialsError, CredentialsWatch, Files, load
from mesh.cluster.relay_client import RelayProvider
from mesh.cluster.relay_server import Questions, RelayServer
from mesh.config.keys import Config
from mesh.errors import MeshError
from mesh.model import Backend, Health, HealthView, Inventory, Protocol, PublishedPort, Service
from mesh.model import Node as Member
from mesh.providers.base import EarlierBuildError
from tests.support.lab.dockerd import Node, Swarm
from tests.support.polling import until

pytestmark = [pytest.mark.root, pytest.mark.swarm]


MEMBERS: list[str] = []  # nodes of swarm3, which the relay lets in


@pytest.fixture(autouse=True)
def members(swarm3: Swarm) -> None:
    MEMBERS[:] = sorted(load(files_of(node)).identity.node for node in swarm3.nodes)


def files_of(node: Node) -> Files:
    return Files.of(Config(docker_data_root=str(node.data_root)))


@dataclass
class Manager:
    """A relay server in this process with a node's certificates, and what it was told."""

    server: RelayServer
    reports: dict[str, wire.Report]
    silent: list[tuple[str, bool]]


@contextlib.asynccontextmanager
async def manager(node: Node, questions: Questions | None = None) -> AsyncIterator[Manager]:
    reports: dict[str, wire.Report] = {}
    silent: list[tuple[str, bool]] = []
    server = RelayServer(
        CredentialsWatch(files_of(node)),
        0,
        on_report=reports.__setitem__,
        on_node=lambda name, up: silent.append((name, up)),
        questions=questions,
    )
    server.know(inventory())
    made = Manager(server, reports, silent)
    task = asyncio.create_task(made.server.run())
    await until(lambda: made.server.port != 0, "the relay listens")
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.asynccontextmanager
async def agent(
    node: Node, *managers: Manager, **options: object
) -> AsyncIterator[tuple[RelayProvider, list[Inventory]]]:
    async def addresses() -> list[tuple[str, int]]:
        return [("127.0.0.1", made.server.port) for made in managers]

    provider = RelayProvider(CredentialsWatch(files_of(node)), addresses, **options)  # type: ignore[arg-type]
    inventories: list[Inventory] = []
    task = asyncio.create_task(provider.run(inventories.append))
    yield provider, inventories
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_nodes_ask_each_other_and_by_way_of_a_manager(swarm3: Swarm) -> None:
    """A worker asks a worker; where it cannot call it, a manager does. A build before the question is named."""
    first, worker, other = swarm3.nodes
    her = load(files_of(other)).identity.node
    home, nowhere = ip_address("127.0.0.1"), ip_address("127.0.0.2")

    async def name(query: Query) -> dict[str, str]:
        if "wrong" in query:
            raise MeshError("it is wrong", where="name", remedy="put it right")
        return {"said": f"hello {query['you']}"}

    async def pass_on(node: str, question: str, query: Query) -> dict[str, str]:
        return {"said": f"{node} {question} {sorted(query.items())}"}

    managers: list[tuple[str, int]] = []

    async def addresses() -> list[tuple[str, int]]:
        return managers

    on_way = Questions({"name": name}, pass_on)
    async with manager(other, Questions({"name": name})) as asked, manager(first, on_way) as m:
        asker = Asker(CredentialsWatch(files_of(worker)), asked.server.port, addresses)
        assert await asker.ask(her, home, "name", {"you": "there"}, 10) == {"said": "hello there"}
        with pytest.raises(EarlierBuildError, match="does not know the question"):
            await asker.ask(her, home, "age", {}, 10)
        with pytest.raises(MeshError) as refused:
            await asker.ask(her, home, "name", {"wrong": "1"}, 10)
        assert (refused.value.message, refused.value.remedy) == ("name: it is wrong", "put it right")
        with pytest.raises(MeshError, match=r"certificate|ostname"):
            await asker.ask("another", home, "name", {"you": "there"}, 10)  # only the node itself answers for it
        with pytest.raises(MeshError, match=r"127\.0\.0\.2:.*refused"):
            await Asker(CredentialsWatch(files_of(worker)), 9, addresses).ask(her, nowhere, "name", {}, 10)
        managers.append(("127.0.0.1", m.server.port))
        said = await Asker(CredentialsWatch(files_of(worker)), 9, addresses).ask(her, nowhere, "name", {"you": "x"}, 10)
        assert said == {"said": f"{her} name [('you', 'x')]"}


def inventory(*nodes: str) -> Inventory:
    service = Service("s1", "web", (PublishedPort(80, 8080, Protocol.TCP),))
    backends = tuple(Backend(f"t-{node}", "s1", node, None, local=False) for node in sorted(nodes))
    return Inventory((service,), backends, tuple(Member(node, node, None) for node in MEMBERS), source="relay")


async def test_snapshot_deltas_reports_and_failover(swarm3: Swarm) -> None:
    first, worker, other = swarm3.nodes
    me, her = (load(files_of(node)).identity for node in (worker, other))
    assert (me.role, load(files_of(first)).identity.role) == ("swarm-worker", "swarm-manager")
    views: list[HealthView] = []
    async with manager(first) as one, manager(first) as two:
        for made in (one, two):
            made.server.publish(inventory(me.node, her.node), {})
        async with agent(worker, one, two, on_verdicts=views.append) as (provider, seen):
            await until(lambda: bool(seen), "the snapshot")
            assert seen[-1] == inventory(me.node, her.node)
            for made in (one, two):
                made.server.publish(inventory(me.node), {"t-x": wire.HealthReport("down", "refused")})
            await until(lambda: len(seen) == 2, "the delta")
            assert seen[-1] == inventory(me.node)
            assert views[-1].of("t-x") is Health.DOWN
            verdicts = {f"t-{me.node}": wire.HealthReport("up"), "t-foreign": wire.HealthReport("down")}
            for made in (one, two):
                made.server.publish(replace(inventory(me.node, her.node)), {})
            await provider.report(wire.Report({**verdicts, f"t-{her.node}": wire.HealthReport("down")}))
            for made in (one, two):
                await until(lambda m=made: me.node in m.reports, "the report")  # type: ignore[misc]
                await until(lambda m=made: bool(m.reports[me.node].verdicts), "its verdicts")  # type: ignore[misc]
                assert set(made.reports[me.node].verdicts) == {f"t-{me.node}"}  # nobody speaks for others
                assert made.server.refused["foreign_verdict"] >= 1
            assert provider.status().connected


async def test_a_report_may_come_before_the_manager_knows_its_backends(swarm3: Swarm) -> None:
    """Of two managers one hears of a change first; a node that it told of it reports to both."""
    first, worker, other = swarm3.nodes
    me, her = (load(files_of(node)).identity.node for node in (worker, other))
    async with manager(first) as made, agent(worker, made) as (provider, seen):
        made.server.publish(inventory(), {})
        await until(lambda: bool(seen), "the snapshot")
        await provider.report(wire.Report({f"t-{n}": wire.HealthReport("up") for n in (me, her)}))
        await until(lambda: me in made.reports, "the report")
        assert made.reports[me].verdicts == {}
        made.server.publish(inventory(her), {})
        assert made.reports[me].verdicts == {}
        made.server.publish(inventory(me, her), {})
        assert made.reports[me].verdicts == {f"t-{me}": wire.HealthReport("up")}


async def test_digests_are_told_by_what_has_changed(swarm3: Swarm) -> None:
    """The manager has them whole after every report, and after a new connection; each text once for all nodes."""
    first, worker, _ = swarm3.nodes
    node = load(files_of(worker)).identity.node
    steps = ({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, {"c": "4"}, {"c": "4"})
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(manager(first))
        async with agent(worker, made) as (provider, _):
            await until(lambda: bool(made.reports), "the link")
            for generation, digests in enumerate(steps, 1):
                await provider.report(wire.Report({}, digests, generation))
                await until(lambda g=generation: made.reports[node].generation == g, "the report")  # type: ignore[misc]
                assert made.reports[node].digests == digests
        async with agent(worker, made) as (provider, _):
            last = {"*:80/tcp": "445f4a004f964b7a"}
            await provider.report(wire.Report({}, last, 9))
            await until(lambda: made.reports[node].generation == 9, "the report after a new connection")
            assert made.reports[node].digests == last
            held = [text for pair in made.reports[node].digests.items() for text in pair]
            await provider.report(wire.Report({}, last, 10))
            await until(lambda: made.reports[node].generation == 10, "the next report")
            again = [text for pair in made.reports[node].digests.items() for text in pair]
            assert all(text is before for text, before in zip(again, held, strict=True))


async def test_a_lost_manager_is_replaced(swarm3: Swarm) -> None:
    first, worker, _ = swarm3.nodes
    async with manager(first) as stays:
        stays.server.publish(inventory("a"), {})
        async with contextlib.AsyncExitStack() as stack:
            goes = await stack.enter_async_context(manager(first))
            goes.server.publish(inventory("a"), {})
            async with agent(worker, goes, stays) as (provider, seen):
                await until(lambda: bool(seen), "the snapshot")
                await until(lambda: len(stays.server.nodes) == len(goes.server.nodes) == 1, "links to both")
                await stack.aclose()
                stays.server.publish(inventory("a", "b"), {})
                await until(lambda: seen[-1] == inventory("a", "b"), "the other manager's inventory")
                assert provider.status().connected
                assert not stays.silent  # a closed connection is no lost node


async def test_a_manager_that_tells_nobody_is_still_told(swarm3: Swarm) -> None:
    """Its Engine is away: those who listened go to another, reports come in on the same connection as ever."""
    first, worker, _ = swarm3.nodes
    node = load(files_of(worker)).identity.node
    async with manager(first) as away, agent(worker, away) as (provider, seen):
        away.server.publish(inventory(node), {})
        await until(lambda: bool(seen), "the snapshot")
        away.server.tell(False)
        await until(lambda: not provider.status().connected, "sent away")
        await until(lambda: node in away.server.nodes, "it calls again")
        await provider.report(wire.Report({f"t-{node}": wire.HealthReport("up")}, generation=7))
        await until(lambda: away.reports[node].generation == 7, "the report")
        away.server.know(inventory(node, "b"))
        away.server.publish(inventory(node, "b"), {})
        away.server.tell(True)
        await until(lambda: seen[-1] == inventory(node, "b"), "it tells again")
        assert not away.silent


async def test_only_this_swarm_is_served(swarm3: Swarm, swarm1: Swarm) -> None:
    ours, theirs = swarm3.manager, swarm1.manager
    async with manager(ours) as made, agent(theirs, made) as (provider, seen):
        await until(lambda: "certificate" in provider.status().error.lower(), "the refusal")
        assert not seen and not made.server.nodes


async def test_only_managers_serve(swarm3: Swarm) -> None:
    """A worker's certificate has no name `swarm-manager`: an agent does not take inventory from it."""
    _, worker, other = swarm3.nodes
    async with manager(worker) as impostor, agent(other, impostor) as (provider, seen):
        impostor.server.publish(inventory("a"), {})
        await until(lambda: "certificate" in provider.status().error.lower(), "the refusal")
        assert not seen


def test_an_encrypted_key_and_a_missing_file_are_named(swarm3: Swarm, tmp_path: Path) -> None:
    files = files_of(swarm3.manager)
    locked = tmp_path / "key"
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    with pytest.raises(CredentialsError, match=r"autolocked.*cluster_certificate"):
        load(replace(files, key=locked))
    with pytest.raises(CredentialsError, match=r"nothing-here.*docker_data_root"):
        load(replace(files, ca=tmp_path / "nothing-here"))
