# SPDX-License-Identifier: Apache-2.0
"""Facts about the running kernel that a bcc program needs: tracepoint formats, struct offsets, headers.

bcc compiles against kernel headers, which seldom are those of the running kernel. So the program takes no offset from
them: tracepoint fields come from tracefs (Documentation/trace/events.rst), struct members from the kernel's own BTF.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.errors import MeshError

TRACEFS: Final = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_BTF_KIND_STRUCT: Final = 4
_MODIFIERS: Final = {8, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """A tracepoint: byte offsets of its fields, and the names of the numbers that `reason` can have."""

    fields: dict[str, int]
    reasons: dict[int, str]


def tracefs() -> Path:
    """Where tracefs is mounted.

    Raises:
        MeshError: nowhere.
    """
    for path in TRACEFS:
        if (path / "events").is_dir():
            return path
    raise MeshError(
        "tracefs is not mounted", where=str(TRACEFS[0]), remedy=f"as root: mount -t tracefs tracefs {TRACEFS[0]}"
    )


def tracepoint(name: str) -> Tracepoint | None:
    """The format of `category:event`, None where this kernel has no such tracepoint."""
    try:
        text = (tracefs() / "events" / name.replace(":", "/") / "format").read_text()
    except FileNotFoundError:
        return None
    fields = {
        match["name"]: int(match["offset"])
        for match in re.finditer(r"field:[^;]*?(?P<name>\w+)(\[\w*\])?;\s*offset:(?P<offset>\d+);", text)
    }
    symbolic = text.rpartition("REC->reason, ")[2]
    reasons = {int(number): word for number, word in re.findall(r'\{ (\d+), "(\w+)" \}', symbolic)}
    return Tracepoint(fields, reasons)


class _Member(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32))


class _Type(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size_or_type", ctypes.c_uint32))


class Btf:
    """The running kernel's type information, by libbpf (btf.h)."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise MeshError("libbpf is not installed", where="libbpf.so.1", remedy="apt install libbpf1") from error
        self._lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
        self._lib.btf__name_by_offset.restype = ctypes.c_char_p
        self._lib.btf__type_by_id.restype = ctypes.c_void_p
        self._btf = ctypes.c_void_p(self._lib.btf__load_vmlinux_btf())
        if not self._btf.value:
            raise MeshError("the kernel has no BTF", where="/sys/kernel/btf/vmlinux", remedy="CONFIG_DEBUG_INFO_BTF=y")

    def offset(self, struct: str, member: str) -> int:
        """Byte offset of a member, also of one inside anonymous structs and unions.

        Raises:
            MeshError: this kernel's struct has no such member.
        """
        found = self._lib.btf__find_by_name_kind(self._btf, struct.encode(), _BTF_KIND_STRUCT)
        bits = self._search(found, member) if found > 0 else None
        if bits is None:
            raise MeshError(f"struct {struct} has no member {member}", where="kernel BTF")
        return bits // 8

    def _search(self, type_id: int, member: str) -> int | None:
        address = self._resolve(type_id)
        head = _Type.from_address(address)
        kind, count, bitfields = head.info >> 24 & 0x1F, head.info & 0xFFFF, head.info >> 31
        if kind not in {_BTF_KIND_STRUCT, _BTF_KIND_STRUCT + 1}:  # or a union
            return None
        members = (_Member * count).from_address(address + ctypes.sizeof(_Type))
        for entry in members:
            offset = entry.offset & 0xFFFFFF if bitfields else entry.offset
            name = self._lib.btf__name_by_offset(self._btf, entry.name)
            if name == member.encode():
                return int(offset)
            if not name and (inner := self._search(entry.type, member)) is not None:
                return int(offset + inner)
        return None

    def _resolve(self, type_id: int) -> int:
        while True:
            address = int(self._lib.btf__type_by_id(self._btf, ctypes.c_uint32(type_id)))
            head = _Type.from_address(address)
            if head.info >> 24 & 0x1F not in _MODIFIERS:
                return address
            type_id = head.size_or_type


@contextmanager
def kernel_headers() -> Iterator[None]:
    """Point bcc at kernel headers: the running kernel's, else any of Debian's, merged in a temporary directory.

    Raises:
        MeshError: there are none.
    """
    if "BCC_KERNEL_SOURCE" in os.environ or Path(f"/lib/modules/{os.uname().release}/build/include").exists():
        yield
        return
    builds = sorted(Path("/usr/src").glob("linux-headers-*[!n]"))  # not *-common
    commons = sorted(Path("/usr/src").glob("linux-headers-*-common"))
    if not builds or not commons:
        raise MeshError("bcc needs kernel headers", where="/usr/src", remedy="apt install linux-headers-amd64")
    build, common = builds[-1], commons[-1]
    with tempfile.TemporaryDirectory(prefix="mesh-headers-") as directory:
        for sub in ("include", *(str(p.relative_to(common)) for p in common.glob("arch/*/include"))):
            (Path(directory) / sub).mkdir(parents=True)
            for source in (common / sub, build / sub):
                for entry in source.iterdir() if source.is_dir() else ():
                    link = Path(directory) / sub / entry.name
                    if not link.exists():
                        link.symlink_to(entry)
        os.environ["BCC_KERNEL_SOURCE"] = directory
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]
