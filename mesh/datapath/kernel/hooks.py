# SPDX-License-Identifier: Apache-2.0
"""All hooks of one pin directory: tc and XDP programs on interfaces, socket programs on the root cgroup."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mesh import _bpf
from mesh.datapath.kernel.attach import Attachments, cgroup_root
from mesh.datapath.kernel.locator import keepers
from mesh.datapath.kernel.xdp import PROGRAM, XdpStage
from mesh.datapath.netlink import Interface


class Hooks:
    """Keeps the programs where the network needs them. Not thread-safe.

    Args:
        programs: by name; without any, hooks can only be restored and detached.
        directory: the pin directory; the links' pins lie in its `links`.
        cgroup: root of the cgroup2 hierarchy; empty: wherever it is mounted.

    Attributes:
        problems: what the last `sync` could not attach, one sentence each.
    """

    def __init__(self, programs: Mapping[str, _bpf.Program], directory: Path, cgroup: str = "") -> None:
        self._links = directory / "links"
        self._attachments = Attachments(programs, self._links)
        self._xdp = XdpStage(programs.get(PROGRAM), self._links)
        self._cgroup = cgroup
        self._restored = False
        self.problems: list[str] = []

    @property
    def attached(self) -> bool:
        """Whether `sync` has been called: before the first plan nothing is attached."""
        return self._restored

    def restore(self, interfaces: Mapping[int, object]) -> None:
        """Find the hooks that an earlier process attached on these interfaces."""
        self._attachments.restore(interfaces)
        self._xdp.restore()
        self._restored = True

    def sync(self, interfaces: Mapping[int, Interface], programs: Mapping[int, str]) -> None:
        """Attach just these programs (by name) to just these interfaces (by index), and the socket hooks."""
        if not self._restored:
            self.restore(interfaces)
        cgroup = Path(self._cgroup) if self._cgroup else cgroup_root()
        self.problems = [
            *self._attachments.sync(programs),
            *self._xdp.sync(interfaces, programs),
            *self._attachments.sync_sockets(cgroup),
            *keepers(interfaces, programs),
        ]

    def lost(self, interfaces: Mapping[int, Interface]) -> list[str]:
        """What somebody else has detached; the next `sync` attaches it again."""
        names = {index: interface.name for index, interface in interfaces.items()}
        return [*self._attachments.lost(names), *self._xdp.lost(names)]

    def pins(self) -> Mapping[Path, _bpf.Link]:
        """All links by their pins."""
        return {self._links / name: link for name, link in {**self._attachments.pins(), **self._xdp.pins()}.items()}

    def move_from(self, directory: Path) -> None:
        """Take over the links in another build's pin directory; `sync` then replaces their programs."""
        self._attachments.move_from(directory / "links")

    def detach(self) -> None:
        """Detach all hooks and remove their pins."""
        self._xdp.detach()
        self._attachments.detach()
