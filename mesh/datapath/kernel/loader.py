# SPDX-License-Identifier: Apache-2.0
"""Loads the eBPF objects: opens them, sizes their maps, checks their contract, and loads them into the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mesh import _bpf
from mesh._abi import ABI_DIGEST
from mesh.errors import DatapathError

OBJECTS: Final = Path(__file__).parent / "objects"


FILES: Final = ("ingress.bpf.o", "task.bpf.o", "socket.bpf.o")


def load(
    directory: Path, sizes: Mapping[str, int], more: Sequence[str] = ()
) -> tuple[dict[str, _bpf.Program], dict[str, _bpf.Map]]:
    """Load the objects with the maps pinned in `directory`, and pin new maps there.

    Args:
        directory: in a bpf file system; created if absent.
        sizes: entries by map name, for maps that are created now.
        more: objects besides those that are always loaded.

    Raises:
        DatapathError: an object is missing or of another build, or the kernel rejects it.
    """
    programs: dict[str, _bpf.Program] = {}
    maps: dict[str, _bpf.Map] = {}
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for file in (*FILES, *more):
        path = OBJECTS / file
        if not path.exists():
            raise DatapathError("is missing", where=str(path), remedy="build the package again, with clang installed")
        opened = _bpf.Object(str(path))
        digest = opened.get("mesh_abi_digest", ".rodata.abi").rstrip(b"\0").decode()
        if digest != ABI_DIGEST:
            raise DatapathError(
                f"is of another build (contract {digest}, this is {ABI_DIGEST})",
                where=str(path),
                remedy="build the package again",
            )
        names = [name for name in opened.maps() if name.startswith("mesh_")]
        fresh = []
        for name in names:
            pin = directory / name
            if name not in maps and pin.exists():
                maps[name] = _bpf.Map.open(str(pin))
            if name in maps:
                opened.reuse(name, maps[name])
            else:
                fresh.append(name)
                if name in sizes:
                    opened.resize(name, sizes[name])
        opened.load()
        for name in fresh:
            maps[name] = opened.map(name)
            maps[name].pin(str(directory / name))
        programs |= {name: opened.program(name) for name in opened.programs()}
    return programs, maps


def probe() -> None:
    """Load the ingress programs with small maps and close them again.

    Raises:
        DatapathError: the kernel rejects them, or the object is missing.
    """
    path = OBJECTS / FILES[0]
    if not path.exists():
        raise DatapathError("is missing", where=str(path), remedy="build the package again, with clang installed")
    opened = _bpf.Object(str(path))
    for name in (
        "flows",
        "flows_new",
        "revnat",
        "revnat_udp",
        "revnat_new",
        "be_metrics",
        "fe_metrics",
        "fe_failures",
        "be_failures",
        "backends",
    ):
        opened.resize(f"mesh_{name}", 1024)
    opened.load()
