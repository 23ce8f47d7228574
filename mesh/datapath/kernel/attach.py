# SPDX-License-Identifier: Apache-2.0
"""Attaches programs to interfaces and to the root cgroup, replaces them in place, and detaches them.

From kernel 6.6 on an interface gets a pinned tcx link; before, a clsact filter with a fixed handle and priority.
Either is replaced atomically and outlives the agent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh.errors import BpfError

TCX_INGRESS: Final = 46  # enum bpf_attach_type, linux/bpf.h from 6.6 on
HANDLE, PRIORITY = 0x6D657368, 10
SOCKET_HOOKS: Final = {  # program -> enum bpf_attach_type
    "mesh_connect4": 10,
    "mesh_connect6": 11,
    "mesh_sendmsg4": 14,
    "mesh_sendmsg6": 15,
    "mesh_recvmsg4": 19,
    "mesh_recvmsg6": 20,
    "mesh_getpeername4": 29,
    "mesh_getpeername6": 30,
}
GONE: Final = (errno.ENODEV, errno.ENXIO, errno.ENOENT)


def exists(index: int) -> bool:
    """Whether there is an interface with this index."""
    try:
        return bool(socket.if_indextoname(index))
    except OSError:
        return False


def kernel_release() -> tuple[int, int]:
    """(major, minor) of the running kernel."""
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)


def cgroup_root() -> Path | None:
    """The mount point of the cgroup2 hierarchy; None: it is not mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    return None


def probe() -> None:
    """Attach an empty program to the loopback interface and detach it again.

    Raises:
        BpfError: the kernel refuses.
    """
    program = _bpf.Program.passing()
    if kernel_release() >= (6, 6):
        with contextlib.suppress(BpfError):
            _bpf.Link.create(program, 1, TCX_INGRESS).close()
            return
    created = _bpf.tc_attach(program, 1, True, HANDLE, PRIORITY + 1)
    _bpf.tc_detach(1, True, HANDLE, PRIORITY + 1)
    if created:
        _bpf.tc_clear(1)


class Attachments:
    """What one pin directory has attached, and where. Not thread-safe."""

    def __init__(self, programs: Mapping[str, _bpf.Program], directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        self._tcx = kernel_release() >= (6, 6)
        self._links: dict[int, _bpf.Link] = {}
        self._on: dict[int, int] = {}  # interface -> id of the program that is on it
        self._sockets: dict[str, _bpf.Link] = {}  # by program
        directory.mkdir(exist_ok=True, mode=0o700)

    @property
    def interfaces(self) -> frozenset[int]:
        """Indexes of the interfaces that carry a program."""
        return frozenset(self._on)

    def restore(self, interfaces: Mapping[int, object]) -> None:
        """Find what an earlier process left on these interfaces."""
        for pin in self._directory.glob("if_*"):
            link = _bpf.Link.open(str(pin))
            program, index = link.info()
            if index == 0 or str(index) != pin.name[3:]:
                pin.unlink()  # its interface is gone
                continue
            self._links[index], self._on[index] = link, program
        for index in interfaces:
            program = 0 if index in self._on else self._filter(index)
            if program:
                self._on[index] = program

    def lost(self, interfaces: Mapping[int, str]) -> list[str]:
        """What somebody else has detached; the next `sync` and `sync_sockets` attach it again.

        Args:
            interfaces: the names of those that exist, by index.
        """
        found = []
        for index in self._on.keys() & interfaces.keys():
            there = not self._defunct(index) if index in self._links else self._filter(index)
            if not there and exists(index):
                self._on[index] = 0
                found.append(f"program on interface {interfaces[index]}")
        detached = [name for name, link in self._sockets.items() if not link.info()[1]]
        return [*found, *(f"program {name} on the root cgroup" for name in detached)]

    @staticmethod
    def _filter(index: int) -> int:
        """The id of the program of our clsact filter; 0: there is none."""
        program: int = _bpf.tc_program(index, True, HANDLE, PRIORITY)
        return program

    def pins(self) -> Mapping[str, _bpf.Link]:
        """The links by the names of their pins."""
        sockets = {f"socket_{name}": link for name, link in self._sockets.items()}
        return {f"if_{index}": link for index, link in self._links.items()} | sockets

    def sync(self, wanted: Mapping[int, str]) -> list[str]:
        """Attach exactly these programs (by name) to exactly these interfaces (by index). Returns what failed."""
        problems = []
        for index, name in wanted.items():
            program = self._programs[name]
            if self._on.get(index) == program.id and not self._defunct(index):
                continue
            try:
                self._put(index, program)
                self._on[index] = program.id
            except BpfError as error:
                if error.errno not in GONE:
                    problems.append(f"interface {index} is not served: {error}")
        for index in set(self._on) - set(wanted):
            self._detach(index)
        return problems

    def _defunct(self, index: int) -> bool:
        link = self._links.get(index)
        return link is not None and link.info()[1] != index

    def _put(self, index: int, program: _bpf.Program) -> None:
        link = self._links.get(index)
        if link is not None and not self._defunct(index):
            link.update(program)
            return
        if link is not None:
            self._forget(index)
        if self._tcx and not _bpf.tc_program(index, True, HANDLE, PRIORITY):
            try:
                made = _bpf.Link.create(program, index, TCX_INGRESS)
            except BpfError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._tcx = False  # a kernel without tcx, whatever its release says
            else:
                made.pin(str(self._directory / f"if_{index}"))
                self._links[index] = made
                return
        _bpf.tc_attach(program, index, True, HANDLE, PRIORITY)

    def _forget(self, index: int) -> None:
        link = self._links.pop(index, None)
        if link is not None:
            (self._directory / f"if_{index}").unlink(missing_ok=True)
            link.close()

    def _detach(self, index: int) -> None:
        if index in self._links:
            self._forget(index)
        else:
            _bpf.tc_detach(index, True, HANDLE, PRIORITY)
        self._on.pop(index, None)

    def sync_sockets(self, cgroup: Path | None) -> list[str]:
        """Attach the socket hooks to the root cgroup. Returns what failed."""
        if cgroup is None:
            return ["local processes are not served: no cgroup2 is mounted (mount it at /sys/fs/cgroup)"]
        try:
            directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return [f"local processes are not served: {cgroup}: {error.strerror}"]
        try:
            for name, kind in SOCKET_HOOKS.items():
                if name in self._programs:
                    self._put_socket(directory, name, kind)
        except BpfError as error:
            return [f"local processes are not served: {error}"]
        finally:
            os.close(directory)
        return []

    def _put_socket(self, cgroup: int, name: str, kind: int) -> None:
        pin, program = self._directory / f"socket_{name}", self._programs[name]
        link = self._sockets.get(name)
        if link is None and pin.exists():
            link = _bpf.Link.open(str(pin))
        if link is not None and link.info()[1]:
            if link.info()[0] != program.id:
                link.update(program)
        else:
            pin.unlink(missing_ok=True)
            link = _bpf.Link.create(program, cgroup, kind)
            link.pin(str(pin))
        self._sockets[name] = link

    def move_from(self, other: Path) -> None:
        """Take over the links in another build's pin directory; `sync` then replaces their programs."""
        if not other.is_dir():
            return
        for pin in other.iterdir():
            target = self._directory / pin.name
            if not target.exists():
                pin.rename(target)

    def detach(self) -> None:
        """Detach everything."""
        for index in list(self._on):
            with contextlib.suppress(BpfError):
                self._detach(index)
        for link in self._sockets.values():
            link.close()
        self._sockets.clear()
        for pin in self._directory.glob("*"):
            pin.unlink(missing_ok=True)
