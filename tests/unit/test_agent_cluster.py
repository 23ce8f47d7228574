# SPDX-License-Identifier: Apache-2.0
"""What a node tells the others of its own tasks."""

from __future__ import annotations

from typing import Any

from mesh.agent_cluster import ClusterProvider
from mesh.cluster.wire import Verdict
from mesh.config import Config
from mesh.model import Health, HealthView
from mesh.swarm.decode import decode
from tests.unit.test_swarm_decode import answers, event, task


def test_a_manager_tells_the_others_what_its_own_engine_knows() -> None:
    """They read from swarm that the task runs, seconds longer than its node knows better."""
    provider: Any = ClusterProvider(Config())
    provider._server = object()  # a manager
    provider._swarm._read = decode(answers(tasks=[task("t1"), task("t2")], running=["c-t1", "c-t2"]))
    provider.own_health(HealthView({"t1": Health.UP, "t2": Health.UP}))
    assert provider._own_verdicts() == {"t1": Verdict("up"), "t2": Verdict("up")}
    provider._swarm._overlay.hear(event("die"), 1)
    assert provider._own_verdicts() == {"t1": Verdict("down", "no container runs"), "t2": Verdict("up")}
