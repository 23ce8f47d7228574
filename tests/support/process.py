# SPDX-License-Identifier: Apache-2.0
"""The command as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


async def run_mesh(*args: object, **env: str) -> Done:
    """Run `mesh` with these arguments."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MESH_")} | env
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mesh", *map(str, args),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environ,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert "Traceback" not in err.decode(), err.decode()
    return Done(process.returncode or 0, out.decode(), err.decode())
