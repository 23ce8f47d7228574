# SPDX-License-Identifier: Apache-2.0
"""Why a service answers nothing, in the words of `mesh explain` and `mesh backends`."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh.api.state import Facts, View
from mesh.config.keys import Config
from mesh.health.monitor import Monitor
from mesh.model import (
    Backend,
    EngineKind,
    Flow,
    Health,
    HealthView,
    Intent,
    Inventory,
    Locality,
    Node,
    Protocol,
    PublishedPort,
    Service,
    ServiceOptions,
)
from mesh.providers.demo import DemoProvider
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.loop import Reconciler
from tests.support.memory import MemoryDatapath
from tests.support.polling import until

ONE, TWO = Node("id-of-one", "one"), Node("id-of-two", "two", weight=0)
HOME = ipaddress.ip_address("127.0.0.1")


def service(**options: Any) -> Service:
    return Service("s", "web", (PublishedPort(80, 8080, Protocol.TCP),), ServiceOptions(table_size=1021, **options))


def backend(name: str, node: Node = ONE, **more: Any) -> Backend:
    address = ipaddress.ip_address(f"172.18.0.{int(name[-1])}")
    return Backend(name, "s", node.id, address, name=f"web.{name}", **more)


@asynccontextmanager
async def serving(
    inventory: Inventory,
    directory: Path,
    *,
    down: str = "",
    drained: frozenset[str] = frozenset(),
    refuse: bool = False,
) -> AsyncIterator[View]:
    """A view of an agent that has applied this."""
    datapath = MemoryDatapath()
    if refuse:
        datapath.refused = {port.frontend for each in inventory.services for port in each.ports}
    reconciler = Reconciler(datapath, Config(guard_hold=0))
    await reconciler.open()
    view = View(
        Facts(EngineKind.UNKNOWN, "", directory, 0.0), reconciler, DemoProvider(Config()), Monitor(print), _stop
    )
    reconciler.set_drained(Drained(drained))
    if down:
        reconciler.set_health(HealthView({down: Health.DOWN}, {down: "172.18.0.1:8080: connection refused"}))
    reconciler.publish(inventory)
    running = asyncio.create_task(reconciler.run())
    await until(lambda: reconciler.stepped and (refuse or reconciler.in_step), "applied", interval=0.001)
    yield view
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def _stop(release: bool) -> None: ...


def flow(port: int = 80, destination: str = "127.0.0.1") -> Flow:
    return Flow(HOME, 40000, ipaddress.ip_address(destination), port, Protocol.TCP)


def taking(view: View) -> dict[str, str]:
    (shown,) = view.state()["services"]
    return {target["name"]: target["taking"] for target in shown["frontends"][0]["targets"]}


async def test_who_gets_no_new_connections_and_why(tmp_path: Path) -> None:
    inventory = Inventory(
        (service(),),
        (
            backend("1"),
            backend("2", intent=Intent.DRAINING),
            backend("3"),
            backend("4", TWO),
            backend("5"),
        ),
        (ONE, TWO),
    )
    async with serving(inventory, tmp_path, down="1", drained=frozenset({"3"})) as view:
        assert taking(view) == {
            "web.1": "no: down",
            "web.2": "no: draining",
            "web.3": "no: drained",
            "web.4": "no: node weight 0",
            "web.5": "yes",
        }
        names = {t["name"]: t["node_name"] for t in view.state()["services"][0]["frontends"][0]["targets"]}
        assert (names["web.1"], names["web.4"]) == ("one", "two")
        reasons = (await view.explain(flow()))["reasons"]
        assert "web.1 takes no new connections: down (172.18.0.1:8080: connection refused)" in reasons
        assert view.state()["services"][0]["ports"] == ["*:80/tcp"]


async def test_a_change_of_what_is_drained_is_shown(tmp_path: Path) -> None:
    async with serving(Inventory((service(),), (backend("1"), backend("2")), (ONE,)), tmp_path) as view:
        assert taking(view)["web.1"] == "yes"
        await view.set_drained("backend", "1", True)
        await until(lambda: taking(view)["web.1"] != "yes", "drained", interval=0.001)
        assert taking(view) == {"web.1": "no: drained", "web.2": "yes"}


async def test_all_down_are_used_and_nothing_says_otherwise(tmp_path: Path) -> None:
    async with serving(Inventory((service(),), (backend("1"),), (ONE,)), tmp_path, down="1") as view:
        assert taking(view) == {"web.1": "yes, though down"}
        reasons = (await view.explain(flow()))["reasons"]
        assert "web.1 is used, though down (172.18.0.1:8080: connection refused)" in reasons
        assert not any("takes no new" in reason for reason in reasons)


async def test_backends_of_other_nodes_under_local_first(tmp_path: Path) -> None:
    away = Backend("2", "s", "id-of-two", None, name="web.2", local=False)
    nodes = (ONE, Node("id-of-two", "two", ipaddress.ip_address("192.0.2.2")))
    inventory = Inventory((service(locality=Locality.LOCAL_FIRST),), (backend("1"), away), nodes)
    async with serving(inventory, tmp_path) as view:
        assert taking(view)["web.2"].startswith("no: mesh.locality=local-first")


async def told(tmp_path: Path, inventory: Inventory, asked: Flow, **how: Any) -> str:
    async with serving(inventory, tmp_path, **how) as view:
        answer = await view.explain(asked)
        return " ".join([answer.get("error", ""), answer.get("remedy", ""), *answer.get("reasons", ())])


async def test_why_nothing_answers(tmp_path: Path) -> None:
    def inventory(*backends: Backend, **options: Any) -> Inventory:
        return Inventory((service(**options),), backends, (ONE,))

    async def says(text: str, *args: Any, **how: Any) -> None:
        assert text in await told(tmp_path, *args, **how)

    await says("web has no backend at all (in a swarm `docker service ps web`", inventory(), flow())
    await says("host mode", inventory(backend("1")), flow(81))
    await says("is left to Docker's own mesh by the label mesh.enable=false", inventory(enable=False), flow())
    await says("127.0.0.1 port 80/tcp of web is not served `mesh status`", inventory(), flow(), refuse=True)
    await says("198.51.100.9 is no address of this node", inventory(backend("1")), flow(destination="198.51.100.9"))
    deny = (ipaddress.ip_network("127.0.0.0/8"),)
    async with serving(inventory(backend("1"), backend("2"), deny=deny), tmp_path) as view:
        answer = await view.explain(flow())
        assert (answer["backend"], answer["next"]) == (None, [])
        assert "do not let this client in" in " ".join(answer["reasons"])
