# SPDX-License-Identifier: Apache-2.0
"""The swarm's keys, by which nodes prove to each other that they are nodes: made by managers, told over the relay.

Managers merge what they know, so all come to the same keys. A key is first held and then used: nodes prove by the
newest key that is `active`, and a manager makes a key active once all agents that call it hold it. So no node is ever
sent a proof by a key that it does not have, except one that no manager reaches.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from mesh._siphash import KEY_SIZE
from mesh.cluster.wire import Key

FILE: Final = "keys.json"
RENEWED: Final = 300.0  # seconds after which the key before one that a removed node does not know is given up
VALID: Final = 2  # active keys that are accepted: the one in use, and the one before it

log = structlog.get_logger("mesh.cluster")


class _Kept(msgspec.Struct, frozen=True):
    keys: dict[str, Key] = {}
    proving: tuple[str, ...] = ()
    tunnel: tuple[str, ...] = ()
    removed: int = 0


def name_of(number: int) -> str:
    """A key's name, by its number on the wire."""
    return f"{number:08x}"


def _order(entry: tuple[str, Key]) -> tuple[int, str]:
    return entry[1].made, entry[0]


def current(keys: Mapping[str, Key]) -> dict[str, Key]:
    """Those that are needed, the newest first: active keys, VALID of them, and the newest that is not active yet if it
    is newer. Pure."""
    ordered = sorted(keys.items(), key=_order, reverse=True)
    active = [entry for entry in ordered if entry[1].active][:VALID]
    waiting = [entry for entry in ordered if not entry[1].active and (not active or _order(entry) > _order(active[0]))]
    return dict([*waiting[:1], *active])


def merged(ours: Mapping[str, Key], theirs: Mapping[str, Key]) -> dict[str, Key]:
    """What two managers know together. Whoever merges in whatever order comes to the same. Pure."""
    found = dict(ours)
    for name, key in theirs.items():
        known = found.get(name)
        if len(key.secret) != KEY_SIZE or len(name) != 8:
            continue
        found[name] = key if known is None else Key(known.made, known.secret, known.active or key.active)
    return current(found)


def _ring(entries: Mapping[str, Key]) -> tuple[tuple[int, bytes], ...]:
    ordered = sorted(entries.items(), key=lambda entry: (not entry[1].active, -entry[1].made))
    return tuple((int(name, 16), key.secret) for name, key in ordered)


def ring_of(state_dir: Path) -> tuple[tuple[int, bytes], ...]:
    """`Keys.ring` of another process' file; empty: it has none, or may not be read."""
    try:
        return _ring(current(msgspec.json.decode((state_dir / FILE).read_bytes(), type=_Kept).keys))
    except (OSError, msgspec.DecodeError):
        return ()


class Keys:
    """The keys that this node holds, and its file, which only root reads.

    Args:
        file: where they are kept; a node that starts has them at once.
        clock: seconds since the epoch.

    Attributes:
        entries: by name (8 hexadecimal digits, the number on the wire), the newest first; replaced whole.
        proving: nodes that have proven themselves at some time, by id: nothing unproven is taken for theirs any more.
        tunnel: likewise in the tunnel.
        removed: when a node was last seen to be removed from the swarm, Unix milliseconds; it knows older keys.
    """

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file, self._clock = file, clock
        self._error = ""
        kept = self._read()
        self.entries: dict[str, Key] = current(kept.keys)
        self.proving, self.tunnel = frozenset(kept.proving), frozenset(kept.tunnel)
        self.removed = kept.removed

    def merge(self, others: Mapping[str, Key]) -> bool:
        """Take what a manager knows, or tells; whether anything was new."""
        return self._take(merged(self.entries, others))

    def make(self) -> None:
        """A new key, not active yet."""
        newest = next(iter(self.entries.values()), None)
        made = max(int(self._clock() * 1000), newest.made + 1 if newest else 0)
        ends = {known[4:] for known in self.entries}  # all that the tunnel tells of a name
        name = next(name for name in iter(lambda: secrets.token_hex(4), "") if name[4:] not in ends)
        self._take(merged(self.entries, {name: Key(made, secrets.token_bytes(KEY_SIZE))}))
        log.info("a key of the swarm was made", key=name)

    def activate(self, name: str) -> None:
        """All nodes hold this key: use it."""
        key = self.entries[name]
        self._take(merged(self.entries, {name: Key(key.made, key.secret, active=True)}))
        log.info("a key of the swarm is in use", key=name)

    def waiting(self) -> str:
        """The key that is not active yet, or empty."""
        return next((name for name, key in self.entries.items() if not key.active), "")

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def age(self) -> float:
        """Seconds since the newest key was made; infinite: there is none."""
        made = max((key.made for key in self.entries.values()), default=None)
        return float("inf") if made is None else self._clock() - made / 1000

    def next_in(self, period: float) -> float:
        """Seconds until a manager is to make the next key, 0 or less: now.

        A node that was removed knows the keys in use. So one is made at once; and another one when that is in use and
        RENEWED seconds old, which makes the last key that the node knows invalid.

        Args:
            period: of a swarm from which nobody is removed.
        """
        usual = period - self.age()
        if self.waiting() or not self.entries:
            return usual
        known = sum(key.made <= self.removed for key in self.entries.values())
        if not known:
            return usual
        return min(usual, 0.0 if known == len(self.entries) else RENEWED - self.age())

    def node_removed(self) -> None:
        """A node that may know the keys has left the swarm."""
        self.removed = max(int(self._clock() * 1000), *(key.made for key in self.entries.values()), 0)
        self._write()

    def remember(self, *, proving: frozenset[str] | None = None, tunnel: frozenset[str] | None = None) -> None:
        """Keep which nodes prove themselves; None: as before."""
        before = self.proving, self.tunnel
        self.proving = before[0] if proving is None else proving
        self.tunnel = before[1] if tunnel is None else tunnel
        if before != (self.proving, self.tunnel):
            self._write()

    def ring(self) -> tuple[tuple[int, bytes], ...]:
        """(number, secret) of each key, first the one to prove with: the newest active one, else the newest."""
        return _ring(self.entries)

    def _take(self, entries: dict[str, Key]) -> bool:
        if entries == self.entries:
            return False
        self.entries = entries
        self._write()
        return True

    def _read(self) -> _Kept:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return _Kept()
        except (OSError, msgspec.DecodeError) as error:
            log.error("the swarm's keys cannot be read; managers tell them", file=str(self._file), error=str(error))
            return _Kept()

    def _write(self) -> None:
        data = msgspec.json.encode(
            _Kept(self.entries, tuple(sorted(self.proving)), tuple(sorted(self.tunnel)), self.removed)
        )
        new = self._file.with_suffix(".new")
        try:
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
                out.write(data)
            new.replace(self._file)
            self._error = ""
        except OSError as error:
            if str(error) != self._error:
                self._error = str(error)
                log.error("the swarm's keys cannot be written; a restart asks for them", error=str(error))
