# SPDX-License-Identifier: Apache-2.0
"""What the agents of a swarm have agreed on to prove themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster


def kept(cluster: Cluster) -> list[dict[str, Any]]:
    """What each agent keeps of keys."""
    files = [Path(str(daemon.config["state_dir"])) / "keys.json" for daemon in cluster.daemons]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def agreed(cluster: Cluster) -> str:
    """The key in use, once all agents have it and demand proofs of all others; else empty."""
    found = kept(cluster)
    active = {tuple(name for name, (_, _, active) in held["keys"].items() if active) for held in found}
    others = len(cluster.daemons) - 1
    if (
        len(found) != others + 1
        or len(active) != 1
        or any(len(held[level]) != others for held in found for level in ("proving", "tunnel"))
    ):
        return ""
    return "".join(active.pop()[:1])
