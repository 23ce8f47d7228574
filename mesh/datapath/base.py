# SPDX-License-Identifier: Apache-2.0
"""The contract between the reconciler and an engine: Applied -> Plan -> Datapath.apply, and Stats back.

An engine is handed complete tables; it never chooses. All calls block and are made from one worker thread, except
`stats`, `signals`, `lookup` and `explain`, which may be called from any thread at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from mesh._maglev import SlotTable
from mesh.datapath.counters import Counters, Failure
from mesh.model import Address, Flow, Frontend, FrontendState, Target

OWNER_NONE: Final = 0
OWNER_PASS: Final = 1
OWNER_FIRST: Final = 2


class BackendKey(NamedTuple):
    """What an engine addresses: a backend's id and the port of it that one frontend uses.

    A tuple, as a plan hashes each several times.
    """

    backend: str
    port: int
    protocol: int


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """A backend as an engine holds it. `id` is this node's number for it (mesh_slot.current), never sent elsewhere."""

    id: int
    key: BackendKey
    target: Target


@dataclass(frozen=True, slots=True)
class FrontendEntry:
    """A frontend as an engine holds it: its state, the table, and the ids that its table or its flows may name."""

    state: FrontendState
    table: SlotTable
    backends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What an engine holds now. After a restart the kernel engine reads this back from its pinned maps."""

    generation: int = 0
    frontends: Mapping[Frontend, FrontendEntry] = field(default_factory=dict)
    backends: Mapping[BackendKey, BackendEntry] = field(default_factory=dict)
    nodes: tuple[Address, ...] | None = ()  # who may hand flows to this node; None: not known, put anew


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps from one Applied to the next, in the order in which an engine takes them: make before break."""

    generation: int
    put_backends: tuple[BackendEntry, ...] = ()
    put_frontends: tuple[FrontendEntry, ...] = ()
    drop_frontends: tuple[Frontend, ...] = ()
    drop_backends: tuple[BackendEntry, ...] = ()
    put_nodes: tuple[Address, ...] | None = None  # all of them, to be taken first; None: as they were
    result: Applied = field(default_factory=Applied)  # what Applied is once all steps are done

    @property
    def empty(self) -> bool:
        steps = self.put_backends or self.put_frontends or self.drop_frontends or self.drop_backends
        return not steps and self.put_nodes is None


@dataclass(frozen=True, slots=True)
class Stats:
    """All counters of an engine at one moment."""

    frontends: Mapping[Frontend, Counters] = field(default_factory=dict)
    backends: Mapping[tuple[Frontend, BackendKey], Counters] = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(default_factory=dict)  # by the names of abi.h; packets
    gauges: Mapping[str, float] = field(default_factory=dict)  # engine-wide, by metric name without the prefix "mesh_"
    totals: Mapping[str, int] = field(default_factory=dict)  # engine-wide counters, likewise, without "_total"


@dataclass(frozen=True, slots=True)
class Signal:
    """What traffic told about a backend: passive health. `ok` after a connection was established."""

    backend: str
    ok: bool
    cause: Failure | None
    count: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer to: where does this flow go, and why."""

    frontend: Frontend
    hash: int
    slot: int
    owner: int
    previous: int
    backend: BackendEntry | None  # None: OWNER_NONE or OWNER_PASS
    next: tuple[BackendEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an engine's running program says of the first packet of a flow."""

    verdict: str  # a name of abi.h, "not ours" where it serves no frontend there
    frontend: int
    hash: int
    slot: int
    owner: int


class Datapath(Protocol):
    """An engine. Implementations: proxy.ProxyDatapath, kernel.KernelDatapath.

    Each reaches the targets of other nodes (Target.via) too, whatever engine those have, and takes flows for this
    node's targets from them.
    """

    name: str

    def open(self) -> Applied:
        """Start, adopt what survives from an earlier process and say what it is (nothing: Applied()).

        Raises:
            DatapathError: it cannot run here; the message says why and what would help.
        """

    def apply(self, plan: Plan) -> Applied:
        """Carry out a plan, make before break, idempotent: after an error the same plan may be applied again.

        Returns what is held now: `plan.result`, or less where single frontends could not be served (a port that
        is taken), with the reason in `problems()`.

        Raises:
            DatapathError: nothing, or only a part, of the plan was done; what was applied before serves on.
        """

    def problems(self) -> Sequence[str]:
        """What is not served as asked, one sentence each, naming the frontend and the remedy."""

    def stats(self) -> Stats:
        """Read all counters; any thread, without stopping traffic."""

    def signals(self) -> Sequence[Signal]:
        """What traffic told about backends since the last call."""

    def lookup(self, flow: Flow) -> Choice | None:
        """Which backend a new connection of this flow would get, by the engine's own table; None: not our port."""

    def explain(self, flow: Flow) -> Explanation | None:
        """The same question to the program that runs, which is asked and changes nothing; any thread.

        None: this engine runs no program beside the tables of `lookup`.
        """

    def live_slots(self, seconds: float) -> Mapping[Frontend, frozenset[int]]:
        """Slots in which a flow of another owner than the current one was seen in the last `seconds`.

        They must stay in transition. Empty for an engine whose connections remember their backend by themselves.
        """

    def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """Descriptors of all listening sockets, to be sent to a process that takes over; they stay this engine's.

        Empty for an engine without any, which is the default.
        """
        return {}

    def stop_accepting(self) -> None:
        """Another process has the sockets of `listeners` now: close ours without touching what waits in them.

        The default does nothing, for an engine without any.
        """

    def drain(self, seconds: float) -> int:
        """Accept nothing new, let flows end for at most `seconds`. Returns how many were still open."""

    def close(self, *, release: bool) -> None:
        """Stop. `release`: hand the ports back to whoever served them before; else the data plane may live on."""
