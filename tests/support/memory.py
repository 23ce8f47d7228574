# SPDX-License-Identifier: Apache-2.0
"""An engine that forwards nothing: it holds what it is given and answers look-ups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from mesh.datapath.base import Applied, Choice, Datapath, Plan, Signal, Stats
from mesh.datapath.counters import Counters
from mesh.datapath.lookup import lookup
from mesh.errors import DatapathError
from mesh.model import EngineKind, Flow, Frontend


class MemoryDatapath(Datapath):
    """Keeps every plan in `plans`. `before_apply` is called in `apply` and may block or raise, as an engine may."""

    name = EngineKind.UNKNOWN

    def __init__(self, survived: Applied | None = None) -> None:
        self.plans: list[Plan] = []
        self.before_apply: Callable[[Plan], None] = lambda plan: None
        self.refused: set[Frontend] = set()  # frontends that cannot be served, as if their port were taken
        self.feed: list[Signal] = []  # what `signals` returns next
        self.live: dict[Frontend, frozenset[int]] = {}  # what `live_slots` returns
        self.away: list[str] = []  # what `missing` returns
        self.closed: bool | None = None  # the `release` that `close` was called with
        self.threads: set[int] = set()  # which threads called `apply`
        self._applied = survived or Applied()

    def open(self) -> Applied:
        return self._applied

    def apply(self, plan: Plan) -> Applied:
        self.threads.add(threading.get_ident())
        self.before_apply(plan)
        self._check(plan)
        self.plans.append(plan)
        result = plan.result
        if self.refused:
            served = {f: e for f, e in result.frontends.items() if f not in self.refused}
            result = Applied(result.generation, served, result.backends, result.nodes)
        self._applied = result
        return result

    def _check(self, plan: Plan) -> None:
        """Refuse what a real engine could not do: a name that is not held when it is needed."""
        held = {entry.id for entry in self._applied.backends.values()} | {e.id for e in plan.put_backends}
        for entry in plan.put_frontends:
            missing = {owner for owner in entry.table.owners() if owner > 1} - held
            if missing or not set(entry.backends) <= held:
                raise DatapathError(f"{entry.state.frontend} names backends {sorted(missing)} that were not put")
        left = {f: e for f, e in self._applied.frontends.items() if f not in plan.drop_frontends}
        left |= {entry.state.frontend: entry for entry in plan.put_frontends}
        for dropped in plan.drop_backends:
            for frontend, entry in left.items():
                if dropped.id in entry.backends:
                    raise DatapathError(f"backend {dropped.id} is dropped, but {frontend} still names it")

    def problems(self) -> Sequence[str]:
        return [f"{frontend} is taken by another process (stop it)" for frontend in sorted(self.refused)]

    def missing(self) -> Sequence[str]:
        return self.away

    def stats(self) -> Stats:
        return Stats(frontends={frontend: Counters() for frontend in self._applied.frontends})

    def signals(self) -> Sequence[Signal]:
        feed, self.feed = self.feed, []
        return feed

    def lookup(self, flow: Flow) -> Choice | None:
        return lookup(self._applied, flow)

    def explain(self, flow: Flow) -> None:
        """None: see Datapath.explain."""

    def live_slots(self, seconds: float) -> Mapping[Frontend, frozenset[int]]:
        return self.live

    def stop_accepting(self) -> None:
        """It has no sockets."""

    def leave(self, *, release: bool) -> None:
        """Nobody tries it."""

    def drain(self, seconds: float) -> int:
        return 0

    def close(self, *, release: bool) -> None:
        self.closed = release
