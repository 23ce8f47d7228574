# SPDX-License-Identifier: Apache-2.0
"""The contract between the reconciler and an engine: Applied -> Plan -> Datapath.apply, and Stats back.

An engine gets complete tables and never chooses between backends itself. All calls block and come from one worker
thread, except `stats`, `signals`, `lookup`, `explain`, `missing` and `heartbeat`, which any thread may call at any
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mesh._maglev import SlotTable
from mesh.datapath.counters import Counters, Failure
from mesh.datapath.proof import Proof
from mesh.model import Address, EngineKind, Flow, Frontend, FrontendState, Path, Target


class BackendKey(NamedTuple):
    """What an engine addresses: a backend's id, the port of it that one frontend uses, and the path there.

    `path` is "peer" where flows are handed over at the other node's peer port, else empty: a backend to which the path
    changes is another one to the engine, so that established flows stay on the path they have.

    A tuple, because a plan hashes each key several times.
    """

    backend: str
    port: int
    protocol: int
    path: str = ""

    @property
    def base(self) -> BackendKey:
        """The same backend's, whatever the path: what counters and look-ups show."""
        return self._replace(path="") if self.path else self

    def on_other_paths(self) -> Iterator[BackendKey]:
        """Keys of the same backend and port."""
        return (self._replace(path=path) for path in ("", Path.PEER.value) if path != self.path)


def key_of(state: FrontendState, target: Target) -> BackendKey:
    """The key under which an engine holds a frontend's target."""
    path = Path.PEER.value if target.path is Path.PEER else ""
    return BackendKey(target.backend, target.port, int(state.frontend.protocol), path)


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """A backend as an engine holds it. `id` is this node's own number for it (mesh_slot.current), never sent out.

    `doubtful`: it may hold something else, or a part; the next plan puts it anew.
    """

    id: int
    key: BackendKey
    target: Target
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class FrontendEntry:
    """A frontend as an engine holds it: its state, the table, and the ids that its table or its flows may name.

    `doubtful`: its rules, its options or the weights in its table may be others; the next plan puts it anew.
    """

    state: FrontendState
    table: SlotTable
    backends: tuple[int, ...]
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class Applied:
    """What an engine holds now. After a restart the kernel engine reads this back from its pinned maps."""

    generation: int = 0
    frontends: Mapping[Frontend, FrontendEntry] = field(default_factory=dict)
    backends: Mapping[BackendKey, BackendEntry] = field(default_factory=dict)
    nodes: tuple[Address, ...] | None = ()  # nodes that may hand flows to this one; None: unknown, to be put anew


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps from one Applied to the next. An engine takes them in this order: make before break."""

    generation: int
    put_backends: tuple[BackendEntry, ...] = ()
    put_frontends: tuple[FrontendEntry, ...] = ()
    drop_frontends: tuple[Frontend, ...] = ()
    drop_backends: tuple[BackendEntry, ...] = ()
    put_nodes: tuple[Address, ...] | None = None  # all nodes, put before all else; None: unchanged
    result: Applied = field(default_factory=Applied)  # what Applied is once all steps are done

    @property
    def empty(self) -> bool:
        steps = self.put_backends or self.put_frontends or self.drop_frontends or self.drop_backends
        return not steps and self.put_nodes is None

    def moved(self, applied: Applied) -> tuple[BackendEntry, ...]:
        """Backends of `applied`, which this starts from, that are reached at another address from now on."""
        held = ((applied.backends.get(entry.key), entry) for entry in self.put_backends)
        return tuple(was for was, entry in held if was is not None and was.target.address != entry.target.address)


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
    """Passive health: what traffic showed of a port of a backend. `ok`: a connection was established."""

    backend: str
    ok: bool
    cause: Failure | None
    count: int
    port: int = 0  # 0: not known which


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a flow goes, and why."""

    frontend: Frontend
    hash: int
    slot: int
    owner: int
    previous: int
    backend: BackendEntry | None  # None: OWNER_NONE, or OWNER_PASS and no fallback proxy behind it
    next: tuple[BackendEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an engine's loaded program does with the first packet of a flow."""

    verdict: str  # a name of abi.h; "not ours": the packet is for no frontend
    frontend: int
    hash: int
    slot: int
    owner: int


class Caller(NamedTuple):
    """A client's end of a TCP connection, and the published port that it called."""

    address: Address
    port: int
    called: int


class Accepted(NamedTuple):
    """How a connection stands that a proxy has accepted."""

    tried: tuple[str, ...]  # backends that it was given to, by id, in this order; last "": whoever else has the port
    is_taken: bool  # by the last of them


class Datapath(Protocol):
    """An engine. Implementations: proxy.ProxyDatapath, kernel.KernelDatapath.

    An engine also reaches targets on other nodes (Target.via), whatever engine those run, and accepts flows from them
    for the targets of this node.
    """

    name: EngineKind

    def open(self) -> Applied:
        """Start, restore what survives of an earlier process, and return it (nothing: Applied()).

        Raises:
            DatapathError: the engine cannot run here; the message says why and what would help.
        """

    def apply(self, plan: Plan) -> Applied:
        """Carry out a plan, make before break. Idempotent: after an error the same plan may be applied again.

        Returns what is held now: `plan.result`, or less where single frontends cannot be served (a port that another
        process has), or the same with `doubtful` ones (no room for their rules); `problems()` then gives the reason. A
        frontend whose rules are not in force lets nobody in.

        Raises:
            DatapathError: the plan was carried out in part or not at all; what was applied before stays in service.
        """

    def problems(self) -> Sequence[str]:
        """What is not served as desired: one sentence each, with the frontend and the remedy."""

    def missing(self) -> Sequence[str]:
        """What somebody else has removed of ours from the kernel, one sentence each, until it is put back; any thread.

        The node is not ready meanwhile. The default is nothing, for an engine that has nothing there.
        """
        return ()

    def stats(self) -> Stats:
        """Read all counters without stopping traffic; any thread."""

    def signals(self) -> Sequence[Signal]:
        """What traffic showed of backends since the last call."""

    def lookup(self, flow: Flow) -> Choice | None:
        """Which backend a new connection of this flow would get by the engine's tables; None: no frontend matches."""

    def explain(self, flow: Flow) -> Explanation | None:
        """Ask the loaded program the same question, which changes nothing; any thread.

        None: this engine has nothing but the tables of `lookup`.
        """

    def accepted(self, callers: Sequence[Caller]) -> Sequence[Accepted | None]:
        """How the connections of these callers stand that are open at a proxy of this engine; in the same order.

        None: no proxy has it. The default is an engine without one.
        """
        return [None] * len(callers)

    def live_slots(self, seconds: float) -> Mapping[Frontend, frozenset[int]]:
        """Slots in which a flow of an owner other than the current one was seen in the last `seconds`.

        They must stay in transition. Empty for an engine whose connections remember their backend themselves.
        """

    def prove(self, proof: Proof) -> None:
        """Prove to other nodes by these keys from now on, and demand as much of them.

        The default does nothing, for an engine that hands over nothing.
        """
        return

    def heartbeat(self) -> bool:
        """Say that somebody keeps the tables: what has not heard this for orphan_timeout hands the ports back.

        Called every second on the event loop, so that a wedged agent hands back too; must not block. The default does
        nothing, for an engine that ends with its process.

        Returns:
            False: the tables are orphaned, and stay so until `rejoin`.
        """
        return True

    def hung(self) -> Sequence[str]:
        """Threads that forward and have stood still for some seconds, one sentence each; since the call before.

        Called every second after `heartbeat`, on the event loop; must not block. Empty for an engine without any,
        which is the default.
        """
        return ()

    def rejoin(self) -> Applied:
        """Keep orphaned tables again, without a flow that whoever has the ports meanwhile has got being cut.

        Returns:
            What is held now.
        """
        return Applied()

    def listeners(self) -> Mapping[Frontend, Sequence[int]]:
        """Descriptors of all listening sockets, to be sent to a process that takes over; they stay this engine's.

        Empty for an engine without any, which is the default.
        """
        return {}

    def stop_accepting(self) -> None:
        """Another process has the sockets of `listeners` now: close ours without touching what waits in them.

        The default does nothing, for an engine without any.
        """

    def leave(self, *, release: bool) -> None:
        """Answer no more trials of other nodes' paths to this one, and serve on: flows that they start go elsewhere.

        The default does nothing, for an engine that nobody tries.

        Args:
            release: `close` will be called so. What else would outlive this process goes on answering.
        """

    def drain(self, seconds: float) -> int:
        """Accept nothing new and wait at most `seconds` for flows to end. Returns how many are still open."""

    def close(self, *, release: bool) -> None:
        """Stop. `release`: hand the ports back to whoever served them before; else the data plane may go on."""
