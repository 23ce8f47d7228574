# SPDX-License-Identifier: Apache-2.0
"""Give one service so many denied addresses that `mesh_acl` is full: no service's change is applied any more, and
taking the label back does not help (issue 12, item 6).
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from mesh.config.keys import Config
from mesh.model import HealthView, Severity
from mesh.providers.labels import service_options
from mesh.reconcile.compose import compose
from mesh.reconcile.eligibility import Drained
from mesh.rules import NOBODY
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, TARGET, Plane
from tests.support.lab.netns import Lab
from tests.support.parts import backend, of

GOOD, BAD = "192.0.2.7", "10.0.0.2"


def scattered(count: int) -> list[str]:
    """Addresses that cannot be merged."""
    return [f"10.{n >> 15}.{n >> 7 & 255}.{(n & 127) << 1}/32" for n in range(count)]


def test_a_service_beyond_its_budget_lets_nobody_in_and_is_named() -> None:
    began = time.perf_counter()
    options, problems, _ = service_options("web", {"mesh.deny": ",".join(scattered(70_000))})
    assert not problems and len(options.deny) == 70_000
    desired = compose(of(backend("a"), deny=options.deny), HealthView(), Drained(), Config())
    (state,) = desired.frontends.values()
    assert state.options.deny == NOBODY
    (problem,) = desired.problems
    assert problem.severity is Severity.CRITICAL and "70000 prefixes" in str(problem) and "web" in problem.where
    assert time.perf_counter() - began < 30


def service(number: int, deny: list[str], **more: Any) -> dict[str, Any]:
    return {
        "name": f"s{number}",
        "published": PORT + number,
        "backends": {"b": ["172.31.0.11", TARGET, 1]},
        "options": {"table_size": 1021, "deny": deny},
        **more,
    }


@pytest.mark.root
@pytest.mark.bpf
def test_full_rules_close_one_service_and_stop_no_other() -> None:
    """With no budget in front of it: the engine itself fails closed, and frees what it could not finish."""
    with Lab() as lab:
        plane = Plane(lab, backends=0)
        engine: Driver = plane.driver()
        engine.open()
        calls = [[source, plane.node.address, PORT + n, "tcp"] for n in range(3) for source in (GOOD, BAD)]

        def verdicts() -> list[bool]:
            """Whether it is denied: for each service the good client, then the bad one."""
            return [verdict == "DENIED" for verdict in engine.enforced(calls=calls)["verdicts"]]

        many = scattered(70_000)
        engine.serve(services=[service(0, []), service(1, [f"{BAD}/32"])])
        assert verdicts() == [False, False, False, True, False, False]
        engine.serve(services=[service(0, many), service(1, [f"{BAD}/32"]), service(2, [f"{BAD}/32"])])
        assert verdicts() == [True, True, False, True, False, True]
        (problem,) = engine.problems()
        assert "s0" in problem and "lets nobody in" in problem and "no room for" in problem
        engine.serve(services=[service(0, [f"{BAD}/32"]), service(1, [f"{BAD}/32"])])  # taken back: at once
        assert engine.problems() == []
        assert verdicts() == [False, True, False, True, False, False]
        assert engine.rule_entries() == 1  # both have one set
        engine.serve(services=[service(0, many[:3_000]), service(1, many[:3_000])])
        assert engine.rule_entries() == 3_000
        engine.kill()
        again: Driver = plane.driver()
        again.open()
        assert again.rule_entries() == 3_000
        again.serve(services=[])
        assert again.rule_entries() == 0
        again.close(release=True)
        again.end()
