# SPDX-License-Identifier: Apache-2.0
"""Have any step of the control plane raise: nothing is applied any more, and /readyz and `mesh status` say that all is
well (issue 12, item 3). The case that was seen: a static file with an IPv4 `address` beside a port on all addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.api.state import Facts, View
from mesh.config.keys import Config
from mesh.health.monitor import Monitor
from mesh.model import EngineKind
from mesh.providers.demo import DemoProvider
from mesh.providers.static import parse_static
from mesh.reconcile import loop as loops
from mesh.reconcile.loop import Reconciler
from mesh.supervisor import FAULTS
from tests.support.memory import MemoryDatapath
from tests.support.parts import backend, of
from tests.support.polling import until

FILE = """
[[services]]
name = "web"
[[services.ports]]
published = 8000
target = 80
[[services.ports]]
published = 8000
target = 80
address = "192.0.2.1"
[[services.ports]]
published = 8000
target = 80
address = "2001:db8::1"
[[services.backends]]
name = "a"
address = "10.0.0.1"
"""


async def _stop(release: bool) -> None: ...


@contextlib.asynccontextmanager
async def control(tmp_path: Path, **hooks: Any) -> AsyncIterator[tuple[Reconciler, View, MemoryDatapath]]:
    FAULTS.clear()
    engine = MemoryDatapath()
    reconciler = Reconciler(engine, Config(), **hooks)
    await reconciler.open()
    view = View(Facts(EngineKind.UNKNOWN, "", tmp_path, 0.0), reconciler, DemoProvider(Config()), Monitor(print), _stop)
    running = asyncio.create_task(reconciler.run())
    try:
        yield reconciler, view, engine
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await reconciler.close(release=False)
        FAULTS.clear()


async def test_addresses_of_both_versions_in_one_file(tmp_path: Path) -> None:
    async with control(tmp_path) as (reconciler, view, _):
        reconciler.publish(parse_static(FILE, "services.toml"))
        await until(lambda: view.ready()[0], "applied")
        assert [str(f) for f in reconciler.applied.frontends] == [
            "192.0.2.1:8000/tcp",
            "*:8000/tcp",
            "[2001:db8::1]:8000/tcp",
        ]


STEPS = ("compose", "guard", "mask", "plan")


@pytest.mark.parametrize("step", [*STEPS, "apply", "problems", "on_change", "due"])
async def test_no_step_fails_in_silence(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "BACKOFF", (0.01, 0.02))
    broken, tries = [True], [0]

    def breaking(call: Callable[..., Any]) -> Callable[..., Any]:
        def either(*arguments: Any, **options: Any) -> Any:
            if broken[0]:
                tries[0] += 1
                raise ZeroDivisionError(step)
            return call(*arguments, **options)

        return either

    seen: list[object] = []
    hooks = {"on_change": breaking(lambda *pair: seen.append(pair))} if step == "on_change" else {}
    async with control(tmp_path, **hooks) as (reconciler, view, engine):
        if step in STEPS:
            monkeypatch.setattr(loops, step, breaking(getattr(loops, step)))
        elif step in ("apply", "problems"):
            monkeypatch.setattr(engine, step, breaking(getattr(engine, step)))
        elif step == "due":
            monkeypatch.setattr(reconciler, "_due", breaking(reconciler._due))
        reconciler.publish(of(backend("a")))
        await until(lambda: tries[0] > 2, "tried again without any event")
        if step == "problems":  # what it has applied, it has applied
            await until(lambda: "ZeroDivisionError" in "".join(reconciler.problems), "named")
        else:
            ready, reasons = view.ready()
            assert not ready and f"ZeroDivisionError: {step}" in " ".join(reasons), reasons
            assert step in view.state()["apply"]["last_error"]  # what `mesh status` prints as an error
        broken[0] = False
        await until(lambda: view.ready()[0] and reconciler.in_step, "well again")
        await until(lambda: not reconciler.problems, "no problem")
        assert len(reconciler.applied.frontends) == 1
        assert step != "on_change" or len(seen) == 1


async def test_a_part_that_keeps_failing_is_not_ready(tmp_path: Path) -> None:
    async with control(tmp_path) as (reconciler, view, _):
        reconciler.publish(of(backend("a")))
        await until(lambda: view.ready()[0], "applied")
        FAULTS.failed("provider", RuntimeError("oh"))
        assert view.ready()[0]
        FAULTS.failed("provider", RuntimeError("oh"))
        assert "part provider of the daemon keeps failing: RuntimeError: oh" in view.ready()[1]
