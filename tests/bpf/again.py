# SPDX-License-Identifier: Apache-2.0
"""Packets that programs have come in again (bpf_clone_redirect), under BPF_PROG_TEST_RUN: by the loopback device, where
the test takes them and gives them to the program as the kernel would."""

from __future__ import annotations

import socket

from tests.bpf.plane import REDIRECT, Plane
from tests.bpf.wires import sh


class Again:
    """Packets through a program, and those that come in again."""

    def __init__(self, plane: Plane, program: str) -> None:
        self.plane, self.program = plane, program
        self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.tap.bind(("lo", 3))
        self.tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self.tap.setblocking(False)
        self.actions: list[int] = []
        self.sent: list[bytes] = []

    def __enter__(self) -> Again:
        sh("ip link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        self.tap.close()

    def run(self, frames: list[bytes]) -> list[int]:
        """What became of each; what came in again has been run as well."""
        actions = []
        for frame in frames:
            out = self.plane.run(self.program, frame)
            actions.append(out.retval)
            if out.retval == REDIRECT:
                self.sent.append(out.data)
            self.actions += [out.retval]
            self.run(self.back())
        return actions

    def back(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.tap.recv(65536))
            except BlockingIOError:
                return found
