# SPDX-License-Identifier: Apache-2.0
"""Tries the paths to all other nodes, all the time: a path carries traffic once it has been shown to work, and while it
does. Of what a firewall swallows nobody else tells."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from mesh.config.keys import Config
from mesh.datapath.paths import peer_probe, tunnel_probe
from mesh.datapath.paths.datagrams import Questions
from mesh.datapath.paths.peer_probe import NOBODY, ask_stream
from mesh.datapath.proof import NONE, Proof
from mesh.model import Address, EngineKind, Node, Path, PathState, PathView, Problem
from mesh.supervisor import recorded

EVERY: Final = 0.4  # seconds between two trials of a path that is up, where there are few nodes
AGAIN: Final = 1.0  # likewise of one that is down; the other half of the proof of one that comes back takes EVERY
SHARE: Final = {Path.TUNNEL: 0.02, Path.PEER_UDP: 0.02, Path.PEER: 0.06}  # and so many seconds for each node
WAIT: Final = 0.35  # seconds for the answer to a datagram
TRIES: Final = 4  # datagrams in a trial: a path is down when none of them is answered
STREAM_WAIT: Final = 1.2  # seconds for a connection; the kernel sends its first packet again after one
HUNG: Final = 5.0  # seconds for the answer of a process whose kernel took the connection: it may be busy
BACK: Final = 2  # good trials in a row that a path needs to come back
FLAPS: Final = 16  # at most, for one that keeps failing
FLAP_SECONDS: Final = 60.0  # a path that was up for less was flapping
LATE: Final = 0.3  # seconds over a trial's time after which it is this process that did not get to run
AT_ONCE: Final = 64  # trials under way
NOTICE: Final = 0.5  # seconds from a trial without an answer until flows go elsewhere

MEANS: Final = {
    Path.TUNNEL: "connections go by the peer port instead",
    Path.PEER: "only callers on this node itself do not reach its tasks; they get others, or Docker's own mesh",
    Path.PEER_UDP: "its tasks get no datagrams from here",
}

Nodes = Callable[[], tuple[str, Sequence[Node]]]

log = structlog.get_logger("mesh")


@dataclass(slots=True)
class Trial:
    """What is known of one path to one node."""

    state: PathState = PathState.UNPROVEN
    obstacle: str = ""  # why it is down
    good: int = 0  # trials in a row
    needs: int = BACK  # good trials until it is up again
    since: float = 0.0  # when it came up, monotonic
    due: float = 0.0  # monotonic
    busy: bool = False

    @property
    def why(self) -> str:
        """Why it is down."""
        return self.obstacle or f"it answers again, {self.good} of the {self.needs} times in a row that it has to"

    def take(self, obstacle: str, now: float) -> bool:
        """Take a trial's outcome. Returns whether the state has changed."""
        before = self.state
        self.obstacle = obstacle
        self.good = 0 if obstacle else self.good + 1
        if obstacle:
            if before is PathState.UP:
                flapping = now - self.since < FLAP_SECONDS
                self.needs = min(self.needs * 2, FLAPS) if flapping else BACK
            self.state = PathState.DOWN
        elif before is PathState.UNPROVEN or (before is PathState.DOWN and self.good >= self.needs):
            self.state, self.since = PathState.UP, now
        return self.state is not before


class PathMonitor:
    """The paths from this node to all others: the tunnel between kernel engines, and the peer port.

    Args:
        engine: how this node forwards.
        nodes: this node's id, and all nodes.
        on_change: called on the event loop with what is known now, when a path has come up or gone down.
        pause: factor of all waits between trials.
        proof: what this node proves by, where nodes prove: then so do the trials.
    """

    def __init__(
        self,
        config: Config,
        engine: EngineKind,
        nodes: Nodes,
        *,
        on_change: Callable[[PathView], None] = lambda view: None,
        pause: float = 1.0,
        proof: Callable[[], Proof] | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._nodes = nodes
        self._on_change = on_change
        self._pause = pause
        self._proof = proof
        self._trials: dict[tuple[str, Path], Trial] = {}
        self._others: dict[str, Node] = {}
        self._questions: dict[tuple[Path, Address | None, int, bool], Questions] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._proven = asyncio.Event()
        self._may_tunnel = True  # this process may listen for answers in the tunnel
        self.view = PathView()

    def look_again(self) -> None:
        """Nodes have changed: try at once those of which nothing is known."""
        self._refresh()
        self._wake.set()

    async def proven(self) -> None:
        """Wait until every path to the nodes that are known has been tried once."""
        await self._proven.wait()

    @property
    def problems(self) -> list[Problem]:
        """What does not work now, sorted."""
        return sorted((p for node in list(self._others.values()) for p in self._problems(node)), key=str)

    @property
    def refused(self) -> int:
        """How many of the problems are with nodes that refuse the peer port: their agents are gone, not the network."""
        return sum(1 for n in list(self._others.values()) if self._refuses(n) for _ in self._problems(n))

    def states(self) -> list[tuple[Node, Path, PathState]]:
        """Every path that is tried, by node and path."""
        found = [(self._others[node], path, trial.state) for (node, path), trial in list(self._trials.items())]
        return sorted(found, key=lambda row: (row[0].name, row[0].id, row[1].value))

    def agent(self, node: str) -> str:
        """Whether a node's agent serves its peer port: answers, gone (nobody listens), silent; empty: not tried yet."""
        trial = self._trials.get((node, Path.PEER))
        if trial is None or trial.state is PathState.UNPROVEN:
            return ""
        if trial.state is PathState.UP or not trial.obstacle:
            return "answers"
        return "gone" if trial.obstacle == NOBODY else "silent"

    def notice(self, *, datagrams: bool) -> float:
        """Seconds after which the other nodes have found that this one answers no more trials; 0: there are none.

        Args:
            datagrams: by all paths; else by the peer port alone, where a connection is refused at once.
        """
        others = len(self._others)
        if not others:
            return 0.0
        if not datagrams:
            return max(EVERY, SHARE[Path.PEER] * others) + NOTICE
        return max(EVERY, SHARE[Path.TUNNEL] * others) + WAIT * TRIES + NOTICE

    async def run(self) -> None:
        """Try until cancelled."""
        try:
            while True:
                self._wake.clear()
                here = self._refresh()
                now = time.monotonic()
                waiting = sorted(
                    (trial.due, node, path.value, path)
                    for (node, path), trial in self._trials.items()
                    if not trial.busy
                )
                for due, node, _, path in waiting[: AT_ONCE - len(self._running)]:
                    if here is not None and due <= now:
                        self._start(here, self._others[node], path)
                if all(trial.state is not PathState.UNPROVEN for trial in self._trials.values()):
                    self._proven.set()
                await self._sleep()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            for questions in self._questions.values():
                questions.close()
            self._questions.clear()

    async def _sleep(self) -> None:
        """Until a trial is due or has ended, or the nodes have changed."""
        free = [] if len(self._running) >= AT_ONCE else [t.due for t in self._trials.values() if not t.busy]
        wait = min(free, default=float("inf")) - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(max(wait, 0.0), AGAIN)):
                await self._wake.wait()

    def _refresh(self) -> Node | None:
        """Take the nodes as they are now. Returns this one."""
        own, nodes = self._nodes()
        here = next((node for node in nodes if node.id == own), None)
        self._others = {n.id: n for n in nodes if n.id != own and n.address is not None}
        wanted = {(n.id, path) for n in self._others.values() for path in self._paths_to(here, n)}
        for kind in [k for k in self._questions if k[0] is Path.TUNNEL and (here is None or k[1] != here.address)]:
            self._questions.pop(kind).close()
        gone = self._trials.keys() - wanted
        for key in gone:
            del self._trials[key]
        for key in wanted - self._trials.keys():
            self._trials[key] = Trial()
            self._proven.clear()
        if gone:
            self._tell()
        return here

    def _paths_to(self, here: Node | None, node: Node) -> Iterator[Path]:
        yield Path.PEER
        yield Path.PEER_UDP
        own, other = here.address if here is not None else None, node.address
        both = self._engine == EngineKind.KERNEL and node.engine != EngineKind.PROXY and self._may_tunnel
        if both and own is not None and other is not None and own.version == other.version:
            yield Path.TUNNEL

    def _start(self, here: Node, node: Node, path: Path) -> None:
        self._trials[node.id, path].busy = True
        task = asyncio.create_task(self._try(here, node, path))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _try(self, here: Node, node: Node, path: Path) -> None:
        try:
            with recorded("paths"):
                return await self._trial(here, node, path)
        finally:
            self._wake.set()
            trial = self._trials.get((node.id, path))
            if trial is not None and trial.busy:  # neither an answer nor none: it was cancelled, or failed here
                trial.busy, trial.due = False, time.monotonic() + AGAIN

    async def _trial(self, here: Node, node: Node, path: Path) -> None:
        assert node.address is not None
        began = time.monotonic()
        if path is Path.PEER:
            port, prove = self._config.peer_port, self._prove if self._proof is not None else None
            most, obstacle = STREAM_WAIT, await ask_stream(node.address, port, STREAM_WAIT, HUNG, prove)
        else:
            most, obstacle = WAIT * TRIES, await self._ask(here, node.address, path)
        now = time.monotonic()
        trial = self._trials.get((node.id, path))
        if trial is None:
            return
        trial.busy = False
        if obstacle == tunnel_probe.NO_RIGHT:
            self._may_tunnel = False
            return
        if obstacle and most + LATE < now - began < HUNG:  # nothing was shown
            trial.due = now
            return
        changed = trial.take(obstacle, now)
        pace = max(AGAIN if obstacle else EVERY, SHARE[path] * len(self._others))
        trial.due = now + pace * self._pause
        if changed:
            self._log(node, path, trial)
            self._tell()

    async def _ask(self, here: Node, address: Address, path: Path) -> str:
        """By datagram."""
        source = here.address if path is Path.TUNNEL else None
        proof = self._proof() if self._proof is not None else NONE
        proven = address in (proof.tunnel_checking if path is Path.TUNNEL else proof.checking)
        key = path, source, address.version, proven
        try:
            questions = self._questions.get(key) or self._make(*key)
        except PermissionError:
            return tunnel_probe.NO_RIGHT
        except OSError as error:
            return error.strerror or str(error)
        self._questions[key] = questions
        return await questions.ask(address, WAIT, TRIES)

    def _prove(self, kind: int, body: bytes) -> bytes:
        assert self._proof is not None
        return self._proof().of(kind, body, int(time.time()))

    def _make(self, path: Path, source: Address | None, version: int, proven: bool) -> Questions:
        if path is Path.PEER_UDP:
            port, prove = self._config.peer_port, self._prove if proven else None
            return Questions(
                version,
                None,
                port,
                lambda nonce, _: peer_probe.question(nonce, prove),
                lambda data: peer_probe.nonce_of(data, 4),
            )
        inner = 1024 + secrets.randbelow(64512)

        def question(nonce: bytes, address: Address) -> bytes:
            keys = self._proof().keys if proven and self._proof is not None and source is not None else ()
            between = tunnel_probe.Between(keys[0], source, address) if keys and source is not None else None
            return tunnel_probe.question(inner, int.from_bytes(nonce, "big"), between)

        listener = tunnel_probe.listen_after_programs(inner)
        try:
            return Questions(
                version,
                source,
                self._config.tunnel_port,
                question,
                tunnel_probe.inner_nonce_of,
                listener,
            )
        except OSError:
            listener.close()
            raise

    def _tell(self) -> None:
        self.view = PathView({key: trial.state for key, trial in self._trials.items()})
        self._on_change(self.view)

    def _log(self, node: Node, path: Path, trial: Trial) -> None:
        if trial.state is PathState.UP:
            log.info("path up", node=node.name, path=path.value)
        else:
            log.warning("path down", node=node.name, path=path.value, found=trial.obstacle)

    def _down(self, node: Node) -> dict[Path, str]:
        """Obstacles of the paths to a node that do not work."""
        found = ((path, self._trials.get((node.id, path))) for path in SHARE)
        return {path: trial.why for path, trial in found if trial and trial.state is PathState.DOWN}

    def _refuses(self, node: Node) -> bool:
        trial = self._trials.get((node.id, Path.PEER))
        return trial is not None and trial.state is PathState.DOWN and trial.obstacle == NOBODY

    def _problems(self, node: Node) -> Iterator[Problem]:
        down, where = self._down(node), f"node {node.name} ({node.address})"
        tunnel = self._trials.get((node.id, Path.TUNNEL))
        if Path.PEER in down and (tunnel is None or Path.TUNNEL in down):
            if node.up:  # else the node is known to be down, and named as such
                said = ", ".join(f"{self._port(path)}: {why}" for path, why in down.items())
                means = "its tasks get no new connections from here while others can serve"
                yield Problem(where, f"no path to it works ({said}): {means}", self._cure(node, down))
            return
        if tunnel is not None and tunnel.state is PathState.UP:
            down.pop(Path.PEER_UDP, None)  # only datagrams of this node's own callers would go there
        for path, why in down.items():
            yield Problem(f"{where}, {self._port(path)}", f"{why}: {MEANS[path]}", self._cure(node, down))

    def _port(self, path: Path) -> str:
        if path is Path.TUNNEL:
            return f"tunnel UDP {self._config.tunnel_port}"
        return f"peer port {'TCP' if path is Path.PEER else 'UDP'} {self._config.peer_port}"

    def _cure(self, node: Node, down: Iterable[Path]) -> str:
        if self._refuses(node) or (not node.engine and Path.PEER in down):
            return "is mesh running there, with the same ports? `mesh check --cluster` here, `mesh status` there"
        names = ", ".join(self._port(path).split(" ", 1 if path is Path.TUNNEL else 2)[-1] for path in down)
        return f"let {names} through between all nodes, both ways; `mesh check --cluster` tries each path"
