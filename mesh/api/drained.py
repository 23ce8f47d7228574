# SPDX-License-Identifier: Apache-2.0
"""What operators drained: stored in a file, found by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from mesh.errors import MeshError
from mesh.reconcile.eligibility import Drained

log = structlog.get_logger("mesh")


DRAINED_FILE: Final = "drained.json"


def _find(kind: str, name: str, things: Mapping[str, str]) -> str:
    """The id of the one thing that `name` means: an id, a name, or the beginning of an id.

    Raises:
        MeshError: there is none, or more than one.
    """
    if name in things:
        return name
    found = [key for key, known in things.items() if known == name]
    found = found or [key for key in things if key.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise MeshError(f"{name!r} is ambiguous: {', '.join(sorted(found)[:5])}", where=f"{kind} {name}")
    raise MeshError(f"there is no {kind} {name!r}", remedy=f"`mesh backends` lists {kind}s" if things else "")


def _load_drained(file: Path) -> Drained:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Drained)
    except FileNotFoundError:
        return Drained()
    except (OSError, msgspec.DecodeError) as error:
        log.error("the list of what was drained cannot be read; nothing is drained", file=str(file), error=str(error))
        return Drained()


def _save_drained(file: Path, drained: Drained) -> None:
    try:
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(drained))
        new.replace(file)
    except OSError as error:
        raise MeshError(f"cannot be written: {error.strerror}", where=str(file)) from error
