# SPDX-License-Identifier: Apache-2.0
"""Keeps the kernel engine's hooks and pins where they are, whoever detaches or removes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh.datapath.kernel.hooks import Hooks
from mesh.datapath.kernel.maps import KernelMaps
from mesh.datapath.kernel.pins import ensure_bpf_fs
from mesh.datapath.losses import Losses
from mesh.datapath.netlink import Interface

MANY: Final = 4  # pins of one directory that are named one by one


class Keeper:
    """Looks after one pin directory. Not thread-safe.

    Args:
        directory: the pin directory, in a directory of its own that has one for each contract.
        bpf_fs: mount point of the bpf file system.
    """

    def __init__(self, maps: KernelMaps, hooks: Hooks, directory: Path, bpf_fs: Path, losses: Losses) -> None:
        self._maps, self._hooks = maps, hooks
        self._directory = directory
        self._bpf_fs = bpf_fs
        self._losses = losses

    def look(self, interfaces: Mapping[int, Interface], attach: Callable[[], None]) -> None:
        """Put back what is away.

        Args:
            interfaces: those that exist.
            attach: attaches the hooks that are missing.
        """
        if self._hooks.attached:
            self._losses.check("hooks", lambda: self._hooks.lost(interfaces), attach)
        self._losses.check("pins", self._lost_pins, self._pin)

    def _away(self) -> Mapping[Path, _bpf.Handle]:
        wanted = {**self._maps.pins(), **self._hooks.pins()}
        return {path: handle for path, handle in wanted.items() if not path.exists()}

    def _lost_pins(self) -> list[str]:
        away = self._away()
        if not away or self._moving():
            return []
        return [f"pin {path}" for path in away] if len(away) <= MANY else [f"pins in {self._directory}"]

    def _moving(self) -> bool:
        """Whether a build with another contract takes over: it moves the pins of links, and removes the others."""
        home = self._directory.parent
        return home.is_dir() and any(path != self._directory for path in home.iterdir())

    def _pin(self) -> None:
        ensure_bpf_fs(self._bpf_fs)
        for path, handle in self._away().items():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle.pin(str(path))
