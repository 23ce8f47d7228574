# SPDX-License-Identifier: Apache-2.0
"""The only writer of the datapath: a change wakes the loop, which composes, guards, plans and applies on a worker."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import structlog

from mesh.config.keys import Config
from mesh.datapath.base import Applied, Datapath, Plan
from mesh.errors import DatapathError
from mesh.model import DesiredState, Frontend, HealthView, Inventory, PathView
from mesh.reconcile.compose import ComposeCache, compose
from mesh.reconcile.eligibility import Drained
from mesh.reconcile.guard import FOREVER, Guarded, Held, guard
from mesh.reconcile.masking import MaskCache, mask, unmasked
from mesh.reconcile.plan import doubtful, plan, settle

COALESCE: Final = 0.01  # seconds from the first change to its apply; changes within them share one apply
BACKOFF: Final = (0.2, 30.0)  # seconds until a failed apply is retried: first and maximum; doubled after each failure
STUCK: Final = 30.0  # seconds; a step of 10,000 backends takes one or two
RESERVED_PLANS: Final = 16  # ids freed by the last so many plans are not reused

_Result = TypeVar("_Result")
log = structlog.get_logger("mesh.reconcile")


@dataclass(frozen=True, slots=True)
class Picture:
    """All inputs, what came out behind the guard and is served by all nodes alike (`agreed`), and what this node serves
    of that (`desired`)."""

    inventory: Inventory = field(default_factory=Inventory)
    health: HealthView = field(default_factory=HealthView)
    drained: Drained = field(default_factory=Drained)
    paths: PathView = field(default_factory=PathView)
    agreed: DesiredState = field(default_factory=DesiredState)
    desired: DesiredState = field(default_factory=DesiredState)


@dataclass(slots=True)
class Counts:
    """How applying goes; the `apply` key of AgentView.state."""

    count: int = 0
    failed: int = 0
    last_seconds: float = 0.0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class _Task:
    """What one step starts from: nothing of it changes while the worker has it."""

    picture: Picture  # `agreed` and `desired` are those of the step before
    config: Config
    held: Mapping[Held, float]
    applied: Applied
    reserved: frozenset[int]
    settling: Sequence[Frontend]
    now: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    guarded: Guarded
    desired: DesiredState
    plan: Plan
    applied: Applied
    seconds: float
    error: str = ""
    complete: bool = True  # all of the plan is held now
    problems: tuple[str, ...] = ()


OnChange = Callable[[Picture, Picture], None]
OnApplied = Callable[[Applied], str]


class Reconciler:
    """Brings an engine to what inventory, health and the operator say, and keeps it there.

    All methods are called on the event loop. Nothing is applied before the first inventory, so nothing that an engine
    adopted is removed because nothing is known yet.

    Args:
        datapath: opened by `open`, and used from one worker thread only.
        on_applied: called on the worker thread with what the engine holds, after each apply; says what is wrong.
        on_close: called on the worker thread before the engine is closed.
        on_change: called on the event loop with the picture before and after, whenever what should be served, or why,
            has changed; must not block.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        datapath: Datapath,
        config: Config,
        *,
        on_applied: OnApplied = lambda applied: "",
        on_close: Callable[[], None] = lambda: None,
        on_change: OnChange = lambda before, after: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.datapath = datapath
        self.applied = Applied()
        self.picture = Picture()
        self.counts = Counts()
        self.problems: tuple[str, ...] = ()  # the engine's
        self.stepped = False  # the first inventory was carried out, as far as it could be
        self.guard_holds = 0  # how often the guard began to hold something back
        self._config = config
        self._inventory: Inventory | None = None
        self._health = HealthView()
        self._drained = Drained()
        self._paths = PathView()
        self._on_applied = on_applied
        self._on_close = on_close
        self._on_change = on_change
        self._clock = clock
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mesh-apply")
        self._composed, self._masked = ComposeCache(), MaskCache()  # the worker's
        self._dirty = asyncio.Event()
        self._held: Mapping[Held, float] = {}
        self._freed: deque[frozenset[int]] = deque(maxlen=RESERVED_PLANS)
        self._changed: dict[Frontend, float] = {}  # when a table last changed
        self._retry_at = FOREVER
        self._failures = 0
        self._told = self.picture  # what `on_change` was last called with
        self._stepping = FOREVER  # since when a step is under way
        self._settled = asyncio.Event()

    @property
    def known(self) -> bool:
        """Whether there was an inventory yet."""
        return self._inventory is not None

    @property
    def in_step(self) -> bool:
        """Whether all that is known is applied."""
        return self.known and not self._dirty.is_set() and self._settled.is_set()

    def stuck(self) -> float:
        """Seconds for which a step has been under way, if that is far longer than any takes; else 0."""
        lasts = self._clock() - self._stepping
        return lasts if lasts > STUCK else 0.0

    @property
    def held(self) -> frozenset[Held]:
        """What the guard holds back now: service and backend id, or the service's id and "" for all of it."""
        return frozenset(self._held)

    @property
    def inventory(self) -> Inventory:
        """The last that was published."""
        return self._inventory or Inventory()

    def publish(self, inventory: Inventory) -> None:
        """Take a provider's inventory."""
        self._inventory = inventory
        self._mark()

    def set_health(self, health: HealthView) -> None:
        self._health = health
        self._mark()

    def set_drained(self, drained: Drained) -> None:
        self._drained = drained
        self._mark()

    def set_paths(self, paths: PathView) -> None:
        """Take what is known of the paths to other nodes."""
        self._paths = paths
        self._mark()

    def set_config(self, config: Config) -> None:
        self._config = config
        self._mark()

    def _mark(self) -> None:
        self._dirty.set()

    async def on_worker(self, function: Callable[..., _Result], *args: object) -> _Result:
        """Call a function of the engine on its thread, and wait for it even if the caller is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._worker, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    async def open(self) -> Applied:
        """Open the engine; what it adopted from an earlier process is where the first plan starts from.

        Raises:
            DatapathError: it cannot run here.
        """
        self.applied = await self.on_worker(self.datapath.open)
        return self._adopt()

    async def rejoin(self) -> None:
        """Keep tables that were orphaned while this process stood still; `run` must not run meanwhile."""
        self.applied = await self.on_worker(self.datapath.rejoin)
        self._adopt()

    def _adopt(self) -> Applied:
        """Start from what the engine holds."""
        states = {frontend: entry.state for frontend, entry in self.applied.frontends.items()}
        held = DesiredState(self.applied.generation, states)
        self.picture = self._told = replace(self.picture, agreed=unmasked(held), desired=held)
        self._changed = dict.fromkeys(states, self._clock())
        return self.applied

    async def run(self) -> None:
        """Follow changes until cancelled. Errors do not leave the loop: they are counted in `counts`, and retried."""
        while True:
            try:
                await self._wait()
                await asyncio.sleep(COALESCE)
                self._dirty.clear()
                if self._inventory is not None:
                    await self._round(self._inventory)
            except Exception as error:  # whichever step it was: nothing counts as applied until it has succeeded
                log.exception("internal error; keeping the last applied state")
                self._fail(error)

    async def _round(self, inventory: Inventory) -> None:
        now = self._clock()
        known, inputs = self.picture, (inventory, self._health, self._drained, self._paths)
        picture = Picture(*inputs, agreed=known.agreed, desired=known.desired)
        self._settled.clear()
        reserved = frozenset().union(*self._freed)
        task = _Task(picture, self._config, self._held, self.applied, reserved, self._due(now), now)
        self._stepping = now
        try:
            outcome = await self.on_worker(self._step, task)
        finally:
            self._stepping = FOREVER
        self._take(picture, outcome)
        self._changed.update(dict.fromkeys(task.settling, self._clock()))  # what stays is due after another calm

    def _fail(self, error: Exception) -> None:
        """A step around an apply has failed. What the engine holds is known: an apply that fails is `_step`'s."""
        self._settled.clear()
        self.counts.failed += 1
        self.counts.last_error = f"{type(error).__name__}: {error}"
        self._retry()

    def _retry(self) -> None:
        first, most = BACKOFF
        self._retry_at = self._clock() + min(first * 2**self._failures, most)
        self._failures = min(self._failures + 1, 16)

    async def _wait(self) -> None:
        """Wait for a change, or until a retry, a settling table or a held removal is due."""
        until = min(self._retry_at, self._next_settling(), min(self._held.values(), default=FOREVER))
        if until < FOREVER:
            try:
                async with asyncio.timeout(max(until - self._clock(), 0.0)):
                    await self._dirty.wait()
            except TimeoutError:
                return
        else:
            await self._dirty.wait()

    def _step(self, task: _Task) -> _Outcome:
        """Compose, guard, mask, plan and apply. On the worker thread; touches nothing of the loop but the caches."""
        start = time.perf_counter()
        picture, applied = task.picture, task.applied
        composed = compose(picture.inventory, picture.health, picture.drained, task.config, self._composed)
        guarded = guard(picture.agreed, composed, task.held, health=picture.health, now=task.now, config=task.config)
        previous, nodes = picture.desired, {node.id: node for node in picture.inventory.nodes}
        masked = mask(guarded.desired, picture.paths, nodes, self.datapath.name, self._masked)
        same = (masked.frontends, masked.nodes) == (previous.frontends, previous.nodes)
        desired = replace(masked, generation=previous.generation + (not same))
        step, error, complete = Plan(desired.generation, result=applied), "", True
        try:
            step = plan(applied, desired, task.reserved)
            if step.empty:
                applied = step.result  # equal, but of this generation, and known by identity from now on
                if task.settling:
                    step = settle(applied, task.settling, self.datapath.live_slots(task.config.transition_calm))
            if not step.empty:
                applied = self.datapath.apply(step)
                complete = applied.frontends.keys() == step.result.frontends.keys()
                complete = complete and not any(entry.doubtful for entry in applied.frontends.values())
        except Exception as failure:
            error = str(failure) if isinstance(failure, DatapathError) else f"{type(failure).__name__}: {failure}"
            applied = doubtful(applied, step)
        took = time.perf_counter() - start
        problems, known = self._engine_problems(applied)
        return _Outcome(guarded, desired, step, applied, took, error, complete and known and not error, problems)

    def _engine_problems(self, applied: Applied) -> tuple[tuple[str, ...], bool]:
        """What is wrong with what was applied, and False where a retry may mend that. Never raises: whatever is wrong,
        the engine holds it."""
        try:
            found = tuple(self.datapath.problems())
            said = self._on_applied(applied)
        except Exception as error:
            log.exception("internal error after an apply")
            return (f"the engine cannot say what is wrong: {type(error).__name__}: {error}",), False
        return ((*found, said), False) if said else (found, True)

    def _take(self, picture: Picture, outcome: _Outcome) -> None:
        self.picture = replace(picture, agreed=outcome.guarded.desired, desired=outcome.desired)
        self.guard_holds += len(outcome.guarded.held.keys() - self._held.keys())
        self._held = outcome.guarded.held
        self.applied = outcome.applied
        for message in outcome.guarded.messages:
            log.warning("guard holds back a removal or lets it go", message=message)
        now = self._clock()
        if not outcome.plan.empty or outcome.error or self.counts.last_error:
            self._count(outcome)
        for entry in outcome.plan.put_frontends:
            self._changed[entry.state.frontend] = now
        for frontend in outcome.plan.drop_frontends:
            self._changed.pop(frontend, None)
        self._freed.append(frozenset(entry.id for entry in outcome.plan.drop_backends))
        for problem in outcome.problems:
            if problem not in self.problems:
                log.error("configuration not fully applied", problem=problem)
        self.problems = outcome.problems
        told = self._told
        if self.picture != told:
            self._on_change(told, self.picture)
        self._told = self.picture
        if outcome.complete:
            self._failures, self._retry_at = 0, FOREVER
        else:
            self._retry()
        self.stepped = True
        self._settled.set()

    def _count(self, outcome: _Outcome) -> None:
        self.counts.count += 1
        self.counts.last_seconds = outcome.seconds
        if outcome.error and outcome.error != self.counts.last_error:
            log.error("apply failed; keeping the last applied state", error=outcome.error)
        elif self.counts.last_error and not outcome.error:
            log.info("apply succeeded again", failed=self.counts.failed)
        self.counts.failed += bool(outcome.error)
        self.counts.last_error = outcome.error

    def _settles_at(self, frontend: Frontend) -> float:
        return self._changed.get(frontend, 0.0) + self._config.transition_calm

    def _next_settling(self) -> float:
        if not self._config.transition_calm:
            return FOREVER
        tracked = (f for f, entry in self.applied.frontends.items() if entry.table.tracked)
        return min((self._settles_at(f) for f in tracked), default=FOREVER)

    def _due(self, now: float) -> list[Frontend]:
        if not self._config.transition_calm:
            return []
        return [f for f, e in self.applied.frontends.items() if e.table.tracked and self._settles_at(f) <= now]

    async def close(self, *, release: bool) -> None:
        """Close the engine, after `run` was cancelled."""
        await self.on_worker(self._on_close)
        await self.on_worker(lambda: self.datapath.close(release=release))
        self._worker.shutdown(wait=False)
