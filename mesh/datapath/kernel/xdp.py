# SPDX-License-Identifier: Apache-2.0
"""The optional XDP stage (config key `xdp`): the network card's driver drops denied sources.

It only saves work: mesh_ingress applies the same acl after it, so an interface without the stage is served alike.
Native mode only: the generic mode runs after the skb is made, saves nothing, and rejects large segments.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh.config.keys import Config
from mesh.datapath.kernel.attach import exists
from mesh.datapath.kernel.locator import INGRESS
from mesh.datapath.netlink import Interface
from mesh.errors import BpfError

PROGRAM: Final = "mesh_xdp"
OBJECT: Final = "xdp.bpf.o"
XDP: Final = 37  # enum bpf_attach_type
DRIVER_MODE: Final = 0x4  # XDP_FLAGS_DRV_MODE, linux/if_link.h
CARDS: Final = ("", "bond")  # kinds of interface where packets arrive first from the wire
REASONS: Final = {
    errno.EOPNOTSUPP: "its driver has no native XDP, and generic mode is refused",
    errno.EBUSY: "it has another XDP program",
    errno.EEXIST: "it has another XDP program",
    errno.EINVAL: "its driver refuses the program (is the MTU too large for native XDP?)",
}


def objects(config: Config) -> tuple[str, ...]:
    """The objects to load for it."""
    return (OBJECT,) if config.xdp == "on" else ()


def candidates(interfaces: Mapping[int, Interface], programs: Mapping[int, str]) -> tuple[list[Interface], list[str]]:
    """The interfaces for the stage among those that `locator.wanted` names, and why others have none. Pure.

    Bridges, VLANs and the like are no problem: their packets pass a card before.
    """
    found, problems = [], []
    for index, program in programs.items():
        interface = interfaces.get(index)
        if program != INGRESS or interface is None or not interface.ethernet:
            continue
        if interface.kind in CARDS:
            found.append(interface)
        elif interface.kind == "veth":
            problems.append(
                complaint(interface, "it is a veth, where packets would lose the mark of checksums left to offload")
            )
    return found, problems


def complaint(interface: Interface, reason: str) -> str:
    return f"interface {interface.name} has no XDP stage: {reason} (rules apply without it; xdp = off)"


class XdpStage:
    """The program on interfaces, by pinned links that outlive the agent. Not thread-safe."""

    def __init__(self, program: _bpf.Program | None, directory: Path) -> None:
        """`program` None: the stage is off. `directory`: an existing one, for the links' pins."""
        self._program = program
        self._directory = directory
        self._links: dict[int, _bpf.Link] = {}
        self._refused: dict[int, tuple[Interface, str]] = {}  # not retried until the interface changes

    def _pin(self, index: int) -> Path:
        return self._directory / f"xdp_{index}"

    def restore(self) -> None:
        """Find what an earlier process left; `sync` replaces or detaches its program."""
        for pin in self._directory.glob("xdp_*"):
            link = _bpf.Link.open(str(pin))
            index = link.info()[1]
            if str(index) == pin.name[4:]:
                self._links[index] = link
            else:
                link.close()
                pin.unlink()  # its interface is gone

    def lost(self, interfaces: Mapping[int, str]) -> list[str]:
        """See Attachments.lost."""
        gone = [i for i, link in self._links.items() if i in interfaces and link.info()[1] != i and exists(i)]
        return [f"XDP stage of interface {interfaces[index]}" for index in gone]

    def pins(self) -> Mapping[str, _bpf.Link]:
        """See Attachments.pins."""
        return {f"xdp_{index}": link for index, link in self._links.items()}

    def sync(self, interfaces: Mapping[int, Interface], programs: Mapping[int, str]) -> list[str]:
        """Attach the program to exactly the `candidates`. Returns which have none, and why."""
        found, problems = ([], []) if self._program is None else candidates(interfaces, programs)
        wanted = {interface.index: interface for interface in found}
        for index, link in list(self._links.items()):
            if index not in wanted or link.info()[1] != index:
                self._detach(index)
        self._refused = {i: refused for i, refused in self._refused.items() if wanted.get(i) == refused[0]}
        for index in wanted.keys() - self._refused.keys():
            try:
                self._put(index)
            except BpfError as error:
                if exists(index):
                    reason = REASONS.get(error.errno or 0, str(error))
                    self._refused[index] = wanted[index], complaint(wanted[index], reason)
        return problems + [line for _, line in self._refused.values()]

    def _put(self, index: int) -> None:
        assert self._program is not None
        link = self._links.get(index)
        if link is None:
            link = _bpf.Link.create(self._program, index, XDP, DRIVER_MODE)
            link.pin(str(self._pin(index)))
            self._links[index] = link
        elif link.info()[0] != self._program.id:
            link.update(self._program)

    def _detach(self, index: int) -> None:
        self._pin(index).unlink(missing_ok=True)
        self._links.pop(index).close()

    def detach(self) -> None:
        """Detach everything."""
        for index in list(self._links):
            self._detach(index)
