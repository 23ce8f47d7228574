# SPDX-License-Identifier: Apache-2.0
"""docker-proxy, the user-space forwarder of published container ports. One process per port, one backend: it balances
nothing, so all work goes to the first."""

import shutil

from bench.lab import BACKENDS, ECHO_PORT, NODE, PORTS
from bench.peers.base import BASICS, Side, first_line


def binary() -> str:
    return shutil.which("docker-proxy", path="/usr/bin:/usr/sbin:/usr/libexec/docker:/usr/local/bin") or ""


class DockerProxy(Side):
    name = "docker-proxy"
    label = "docker-proxy"
    only = BASICS

    @classmethod
    def missing(cls) -> str:
        return "" if binary() else "docker-proxy is not installed (docker.io)"

    @classmethod
    def version(cls) -> str:
        return first_line("dockerd", "--version")

    def start(self) -> None:
        log = f"{self.name}.log"
        for protocol, port in (*(("tcp", port) for port in PORTS), ("udp", ECHO_PORT)):
            ends = (
                "-host-ip",
                NODE,
                "-host-port",
                str(port),
                "-container-ip",
                BACKENDS[0],
                "-container-port",
                str(port),
            )
            # It reports readiness on descriptor 3, which dockerd would hand it.
            shell = ("sh", "-c", 'ulimit -n hard; exec "$@" 3>/dev/null', "sh")
            self.processes.append(self.lab.start("node", *shell, binary(), "-proto", protocol, *ends, log=log))
        self.lab.wait_listening(self.processes[0], log=log)
