# SPDX-License-Identifier: Apache-2.0
"""What stays closed while no agent enforces it: mesh.allow and mesh.deny as an nftables table of their own.

While the agent runs, the table says what the engine says. It stays when the agent ends, whatever ends it, so that
Docker's own mesh, which knows no rules, gets no packet of who is not admitted. It does not survive a reboot, and what
somebody else removes of it while no agent runs is put back by the next one only.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from mesh.config.keys import Config
from mesh.datapath.base import FrontendEntry
from mesh.datapath.losses import Losses, Watch
from mesh.datapath.netlink import Monitor
from mesh.datapath.proxy.nft import NftTable, monitor, table_name
from mesh.errors import DatapathError
from mesh.model import ANY_ADDRESS, Frontend, FrontendState, Network
from mesh.rules import compact

PRIORITY: Final = -150  # after connection tracking, ahead of this agent's and Docker's changes of addresses and ports
FAMILIES: Final = {4: "ip", 6: "ip6"}


def closed_table(state_dir: str) -> str:
    """The table's name: there is one per state directory."""
    return f"{table_name(state_dir)}_closed"


def rules(states: Iterable[FrontendState], writer: str = "") -> tuple[str, tuple[str, ...]]:
    """The table's content that drops who is not admitted to these frontends, and the names of its sets; processes of
    the node are admitted. Pure.

    Args:
        writer: is named in a comment.
    """
    sets: dict[tuple[Network, ...], str] = {}
    lines = [line for state in states for line in _of_frontend(state, sets)]
    text = "".join(
        f"  set {name} {{ type ipv{networks[0].version}_addr; flags interval; "
        f"elements = {{ {', '.join(map(str, networks))} }} }}\n"
        for networks, name in sets.items()
    )
    content = (
        f"{text}  chain prerouting {{\n    type filter hook prerouting priority {PRIORITY}; policy accept;\n"
        f'    iifname "lo" accept comment "{writer}"\n' + "".join(f"    {line}\n" for line in lines) + "  }\n"
    )
    return content, tuple(sets.values())


def _of_frontend(state: FrontendState, sets: dict[tuple[Network, ...], str]) -> Iterator[str]:
    frontend, allow_deny = state.frontend, compact(state.options.allow, state.options.deny)
    own = frontend.address == ANY_ADDRESS
    for version, family in FAMILIES.items():
        if not own and frontend.address.version != version:
            continue
        place = f"meta nfproto ipv{version} fib daddr type local" if own else f"{family} daddr {frontend.address}"
        match = f"{place} {frontend.protocol} dport {frontend.port}"
        allow, deny = (tuple(n for n in networks if n.version == version) for networks in allow_deny)
        everybody = any(not n.prefixlen for n in deny) or (allow_deny[0] and not allow)
        if everybody:
            yield f"{match} drop"
            continue
        for networks, sign in ((deny, ""), (allow, "!= ")):
            if networks and networks[0].prefixlen:
                name = sets.setdefault(networks, f"n{len(sets)}")
                yield f"{match} {family} saddr {sign}@{name} drop"


class StopRules:
    """Keeps the table in line with what is served, and puts it back when somebody else removes it. `apply` is called by
    one thread.

    Args:
        losses: is told when somebody else removes the table.
    """

    def __init__(self, config: Config, losses: Losses | None = None) -> None:
        self._all = config.on_stop == "closed"
        self._table = NftTable(closed_table(config.state_dir))
        self._states: tuple[FrontendState, ...] | None = None  # as the table has them; None: not known
        self._losses = losses or Losses()
        self._lock = threading.Lock()
        self._watch: Watch | None = None

    def apply(self, frontends: Mapping[Frontend, FrontendEntry]) -> str:
        """Have the table say what these frontends admit: with on_stop = closed all that have rules, else those of
        services that ask for it (mesh.fail-closed). Without any there is no table.

        Returns:
            Why it does not; empty: it does.
        """
        states = tuple(
            entry.state
            for entry in frontends.values()
            if (entry.state.options.allow or entry.state.options.deny)
            and (self._all or entry.state.options.fail_closed)
        )
        with self._lock:
            if self._states is not None and _same(self._states, states):
                return ""
            if not states and (shutil.which("nft") is None or not self._table.exists()):
                self._states = states
                return ""
            try:
                if states:
                    self._load(states)
                else:
                    self._table.delete()
            except DatapathError as error:
                self._states = None
                return f"rules of services are not kept for the time after a stop (on_stop, mesh.fail-closed): {error}"
            self._states = states
        if states and self._watch is None:
            told: Monitor | None = None
            with contextlib.suppress(DatapathError):  # then it is looked at now and again
                told = monitor()
            self._watch = Watch("mesh-stop-rules", self._look, told)
        return ""

    def _load(self, states: tuple[FrontendState, ...]) -> None:
        self._table.load(*rules(states, self._table.writer))

    def _look(self) -> None:
        with self._lock:
            states = self._states
            if states:
                self._losses.check("stop rules", self._lost, lambda: self._load(states))

    def _lost(self) -> list[str]:
        return [f"nftables table inet {self._table.name}"] if self._table.lost() else []

    def close(self) -> None:
        """Leave the table as it is."""
        if self._watch is not None:
            self._watch.close()


def _same(before: tuple[FrontendState, ...], now: tuple[FrontendState, ...]) -> bool:
    """Whether they have the same ports and rules."""
    return [(s.frontend, s.options.allow, s.options.deny) for s in before] == [
        (s.frontend, s.options.allow, s.options.deny) for s in now
    ]
