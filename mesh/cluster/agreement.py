# SPDX-License-Identifier: Apache-2.0
"""What a manager's agent knows of all agents, side by side, and where they differ, in words. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

OLD: Final = 5.0  # seconds after which a node's last word is worth a remark


@dataclass(frozen=True, slots=True)
class Row:
    """A node of the cluster and what its agent last said. `age` in seconds; None: it never said anything."""

    id: str
    name: str
    address: str
    up: bool
    engine: str = ""
    mesh: str = ""
    generation: int = 0
    age: float | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # of tables, by frontend


def differences(rows: Sequence[Row]) -> list[str]:
    """Where the nodes do not agree, one sentence each. A table is compared on the nodes that are heard of."""
    said = []
    for row in rows:
        if not row.up:
            said.append(f"node {row.name} does not answer: its tasks get no new connections")
        elif row.age is None:
            said.append(f"node {row.name}: no agent there has called yet, so clients of it are not served by the mesh")
        elif row.age > OLD:
            said.append(f"node {row.name}: its agent was last heard of {row.age:.0f} s ago")
    heard = [row for row in rows if row.up and row.age is not None and row.age <= OLD]
    versions = Counter(row.mesh for row in heard if row.mesh)
    if len(versions) > 1:
        found = ", ".join(f"{version} on {count}" for version, count in sorted(versions.items()))
        said.append(f"the nodes run different versions of mesh: {found}")
    for frontend in sorted({name for row in heard for name in row.digests}):
        said += _of_frontend(frontend, heard)
    return said


def _of_frontend(frontend: str, heard: Sequence[Row]) -> list[str]:
    tables = {row.name: row.digests.get(frontend, "") for row in heard}
    usual, _ = Counter(digest for digest in tables.values() if digest).most_common(1)[0]
    missing = [name for name, digest in tables.items() if not digest]
    other = [name for name, digest in tables.items() if digest and digest != usual]
    said = [f"{frontend} is not served by {', '.join(missing)}"] if missing else []
    if other:
        agree = [name for name, digest in tables.items() if digest == usual]
        said.append(
            f"{frontend}: {', '.join(other)} would choose other tasks than {', '.join(agree)} "
            "(normal for moments after a change; if it stays, compare `mesh backends` on both)"
        )
    return said
